"""Base models quantised with bitsandbytes: frozen weights in 4 or 8 bits under float32 adapters.

`peft.prepare_model_for_kbit_training` is not used: it casts norms and head to float32 and makes the embedding's output
require gradients. Neither is needed, because only the adapters are trained, and norms compute in float32 themselves.
"""

from functools import partial
from importlib.util import find_spec
from types import MethodType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PretrainedConfig

from dpoctl.errors import SetupError, UsageError

if TYPE_CHECKING:
    from dpoctl.recipe.schema import QuantizationSection

_HEADS = ("lm_head", "embed_out", "output_projection")


def quantization_config(
    section: "QuantizationSection | None", dtype: torch.dtype, keep: list[str]
) -> BitsAndBytesConfig | None:
    """Return the arguments of bitsandbytes, or `None` for a model that is not quantised.

    Args:
        section: the recipe's `quantization` section.
        dtype: the precision that `bnb_4bit_compute_dtype: auto` means.
        keep: modules that are not quantised because they are trained whole; the head never is.

    Raises:
        SetupError: bitsandbytes is not installed.
    """
    if section is None or not (section.load_in_4bit or section.load_in_8bit):
        return None
    _require_bitsandbytes()
    compute_dtype = section.bnb_4bit_compute_dtype
    build: Any = BitsAndBytesConfig
    config: BitsAndBytesConfig = build(
        load_in_4bit=section.load_in_4bit,
        load_in_8bit=section.load_in_8bit,
        bnb_4bit_quant_type=section.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=section.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=dtype if compute_dtype == "auto" else getattr(torch, compute_dtype),
        # transformers looks for the head itself only if no module is named here.
        llm_int8_skip_modules=[*_HEADS, *keep] if keep else None,
    )
    return config


def check_quantised_checkpoint(config: PretrainedConfig, name: str, *, lora: bool) -> None:
    """Check that a checkpoint is not quantised, or can be trained as it is.

    Raises:
        UsageError: it is quantised, and would be trained whole or is not quantised with bitsandbytes.
        SetupError: bitsandbytes is not installed.
    """
    quantization: Any = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    settings = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = str(settings.get("quant_method", "unknown"))
    if "bitsandbytes" not in method:
        raise UsageError(
            f"model '{name}' is quantised with {method}, which cannot be trained", hint="give its unquantised weights"
        )
    if not lora:
        raise UsageError(f"model '{name}' is quantised, so it cannot be trained whole", hint="add a lora section")
    _require_bitsandbytes()


def is_quantised(module: nn.Module) -> bool:
    """Whether the weight of a layer is quantised with bitsandbytes; does not import bitsandbytes."""
    return type(getattr(module, "weight", None)).__name__ in ("Params4bit", "Int8Params")


def prepare_quantised_layers(model: nn.Module) -> None:
    """Make a quantised layer compute the same for policy and reference, whatever else is in the batch.

    In eval mode bitsandbytes uses a kernel with different rounding, and on some CPUs repacks 4-bit weights permanently:
    the layers stay in train mode, which changes nothing else, for they have no dropout. Its 8-bit product rounds the
    inputs to 8 bits, except columns in which any row of the batch has an outlier, so that a row's result depends on its
    neighbours: here the weight is dequantised instead, for both directions.
    """
    for module in model.modules():
        if is_quantised(module):
            module.train()
            module.train = partial(_ignore_mode, module)  # type: ignore[method-assign]
            if type(module.weight).__name__ == "Int8Params":
                vars(module)["forward"] = MethodType(_forward_8bit, module)


def dequantised_weight(layer: Any, dtype: torch.dtype) -> Tensor:
    """Return the weight `[out, in]` of a quantised layer."""
    packed = layer.weight
    if type(packed).__name__ == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit  # noqa: PLC0415 - an optional extra

        return dequantize_4bit(packed.view(-1, 1), packed.quant_state).to(dtype)
    if packed.CB is not None:
        layer.init_8bit_state()
    weight: Tensor = layer.state.CB.to(dtype, copy=True)
    return weight.mul_(layer.state.SCB.unsqueeze(1) * (1.0 / 127.0))


def _forward_8bit(layer: Any, x: Tensor) -> Tensor:
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    out: Tensor = cast(Any, _FrozenProduct).apply(x, layer)
    return out if layer.bias is None else out + layer.bias.to(out.dtype)


class _FrozenProduct(torch.autograd.Function):
    """The product of an input and a frozen quantised weight, which is dequantised again in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        return x @ dequantised_weight(layer, x.dtype).T

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream @ dequantised_weight(ctx.layer, upstream.dtype), None


def _ignore_mode(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def _require_bitsandbytes() -> None:
    if find_spec("bitsandbytes") is None:
        raise SetupError("quantization needs bitsandbytes", hint="pip install 'dpoctl[quant]'")

"""Quantised base models through bitsandbytes: frozen weights in 4 or 8 bits, adapters in float32 over them.

`peft.prepare_model_for_kbit_training` is not used: it would turn the norms and the head into float32 copies and make
the embedding's output require gradients. Neither is needed: everything but the adapters is frozen, and the norms
compute in float32 by themselves.
"""

from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig

from dpoctl.errors import SetupError, UsageError

if TYPE_CHECKING:
    from dpoctl.recipe.schema import QuantizationSection

_HEADS = ("lm_head", "embed_out", "output_projection")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def quantization_config(
    section: "QuantizationSection | None", dtype: torch.dtype, keep: list[str]
) -> BitsAndBytesConfig | None:
    """The arguments of bitsandbytes for a recipe's `quantization` section.

    Args:
        section: the section; with neither width asked for, the model is not quantised.
        dtype: what `auto` computes in.
        keep: modules that stay as they are because they are trained whole; the head always does.

    Raises:
        SetupError: bitsandbytes is not installed.
    """
    if section is None or not (section.load_in_4bit or section.load_in_8bit):
        return None
    require_bitsandbytes()
    asked = section.bnb_4bit_compute_dtype
    build: Any = BitsAndBytesConfig
    packed: BitsAndBytesConfig = build(
        load_in_4bit=section.load_in_4bit,
        load_in_8bit=section.load_in_8bit,
        bnb_4bit_quant_type=section.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=section.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=dtype if asked == "auto" else _DTYPES[asked],
        # transformers finds the head by itself only when it is told of no other module.
        llm_int8_skip_modules=[*_HEADS, *keep] if keep else None,
    )
    return packed


def require_bitsandbytes() -> None:
    """Refuse to go on without bitsandbytes.

    Raises:
        SetupError: it is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise SetupError("quantization needs bitsandbytes", hint="pip install 'dpoctl[quant]'")


def refuse_quantised_checkpoint(config: PretrainedConfig, name: str, *, lora: bool) -> None:
    """Check what a checkpoint that is quantised already can be used for.

    Raises:
        UsageError: it is to be trained whole, or its quantisation is not bitsandbytes'.
        SetupError: bitsandbytes is not installed.
    """
    quantised: Any = getattr(config, "quantization_config", None)
    if quantised is None:
        return
    method = str((quantised if isinstance(quantised, dict) else quantised.to_dict()).get("quant_method", "unknown"))
    if "bitsandbytes" not in method:
        raise UsageError(f"model '{name}' is quantised with {method}", hint="give its unquantised weights")
    if not lora:
        raise UsageError(f"model '{name}' is quantised, so it cannot be trained whole", hint="add a lora section")
    require_bitsandbytes()


def keep_one_kernel(model: nn.Module) -> None:
    """Hold quantised layers in train mode, so that policy and reference are computed alike.

    In eval mode bitsandbytes takes another kernel with other rounding for 8 bits on a CPU, and on some CPUs packs
    4-bit weights anew for good. Quantised layers have no dropout, so train mode means nothing else to them.
    """
    for module in model.modules():
        if type(getattr(module, "weight", None)).__name__ in ("Params4bit", "Int8Params"):
            module.train()
            module.train = partial(_unmoved, module)  # type: ignore[method-assign]


def _unmoved(module: nn.Module, mode: bool = True) -> nn.Module:
    return module

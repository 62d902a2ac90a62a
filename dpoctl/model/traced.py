"""Policies without memory: a recipe's model of fake tensors, in the dtypes in which it would be loaded.

A fake tensor has a shape, a dtype and a device, and no numbers. Operators on fakes return fakes, so a training step can
be traced that no machine could hold. Fakes live on the CPU here, also those of a model for a GPU: `simulating` makes
code choose the GPU's kernels, whose fakes need no GPU.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers.base import get_keys_to_not_convert

from dpoctl.model import fused_layers
from dpoctl.model.from_config import build_base
from dpoctl.model.load import assemble, weight_dtype
from dpoctl.model.memory import device_kind, simulating
from dpoctl.model.modules import embedding_and_head
from dpoctl.model.policy import Policy
from dpoctl.model.quantize import prepare_quantised_layers, quantization_config
from dpoctl.model.source import ADAPTER_CONFIG, ModelSource, base_of, find_source

if TYPE_CHECKING:
    from dpoctl.recipe.schema import LoraSection, Recipe

HOST = torch.device("cpu")


class _Packed(FakeTensor):
    """A quantised weight: bitsandbytes' own class of parameter cannot be a fake one, so its name has to do."""


def traced_policy(
    recipe: "Recipe",
    tokenizer: PreTrainedTokenizerBase,
    fakes: FakeTensorMode,
    dtype: torch.dtype,
    layers: int | None = None,
) -> Policy:
    """Return the policy of a recipe with fake weights, for the kind of device that is simulated.

    Args:
        recipe: names or describes the model.
        tokenizer: of the recipe.
        fakes: the mode that the fakes belong to.
        dtype: the precision of the computation.
        layers: the number of decoder layers; None is that of the model.

    Raises:
        SetupError: the model's configuration cannot be reached or read.
        UsageError: it is not a causal language model, or no module matches the adapter's targets.
    """
    model = build_base(recipe, tokenizer, layers)
    nn.Module.to(model, weight_dtype(recipe, dtype))
    model.train(False)
    _grow_vocabulary(model, len(tokenizer))
    source, lora = _source(recipe)
    with torch.device("meta"):
        if lora is not None:
            pack(model, recipe, dtype)
        policy = assemble(model, recipe, source, lora, dtype)
    to_fakes(policy.model, fakes, HOST)
    if device_kind(HOST) == "cuda" and not recipe.training.torch_compile:
        _fuse(policy)
    return policy


def _source(recipe: "Recipe") -> tuple[ModelSource | None, "LoraSection | None"]:
    """Return where a recipe's base is, and the adapter to train; one that is continued has the shape of its file."""
    section, lora = recipe.model, recipe.lora
    if section.from_scratch is not None:
        return None, None
    source = find_source(section.model_name_or_path or "", trust_remote_code=section.trust_remote_code)
    if lora is None or not source.is_local or not (file := Path(source.name) / ADAPTER_CONFIG).is_file():
        return source, lora
    if lora.start == "continue":
        saved = json.loads(file.read_text(encoding="utf-8"))
        known = {name: saved[name] for name in ("r", "target_modules", "modules_to_save") if saved.get(name)}
        lora = lora.model_copy(update={"start": "new", **known})
    return base_of(file.parent, trust_remote_code=section.trust_remote_code), lora


def _grow_vocabulary(model: PreTrainedModel, rows: int) -> None:
    """Give the embedding and the head as many rows as the tokenizer has tokens; neither has memory."""
    for layer in {id(layer): layer for layer in embedding_and_head(model) if layer is not None}.values():
        weight: Any = layer.weight
        if weight.shape[0] < rows:
            grown = nn.Parameter(weight.new_empty(rows, weight.shape[1]), requires_grad=weight.requires_grad)
            layer.weight = grown
            name = "num_embeddings" if isinstance(layer, nn.Embedding) else "out_features"
            setattr(layer, name, rows)
            model.config.vocab_size = rows
    if model.config.tie_word_embeddings:
        embedding, head = embedding_and_head(model)
        if embedding is not None and head is not None:
            head.weight = embedding.weight


def pack(model: PreTrainedModel, recipe: "Recipe", dtype: torch.dtype) -> None:
    """Put bitsandbytes' layers where transformers puts them."""
    keep = list(recipe.lora.modules_to_save or ()) if recipe.lora is not None else []
    packed = quantization_config(recipe.quantization, dtype, keep)
    if packed is None:
        return
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear  # noqa: PLC0415 - an optional extra

    skipped = packed.llm_int8_skip_modules or get_keys_to_not_convert(model)
    replace_with_bnb_linear(model, modules_to_not_convert=skipped, quantization_config=packed)
    # By this peft knows which of its layers to put over them.
    setattr(model, f"is_loaded_in_{'4bit' if packed.load_in_4bit else '8bit'}", True)
    prepare_quantised_layers(model)


def to_fakes(model: nn.Module, fakes: FakeTensorMode, device: torch.device) -> None:
    """Replace parameters and buffers on the meta device by fakes on a device; quantised ones are quantised there."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in made:
                fake = nn.Parameter(_fake(parameter.detach(), fakes, device), requires_grad=parameter.requires_grad)
                made[id(parameter)] = _quantise(module, parameter, fake, fakes)
            module._parameters[name] = made[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = _fake(buffer.detach().to("meta"), fakes, device)


def _fake(tensor: Tensor, fakes: FakeTensorMode, device: torch.device) -> FakeTensor:
    with fakes:
        # A view keeps the class of a parameter.
        return FakeTensor(fakes, tensor.data.as_subclass(Tensor), device)


def _quantise(module: nn.Module, like: Any, fake: nn.Parameter, fakes: FakeTensorMode) -> nn.Parameter:
    kind = type(like).__name__
    if kind not in ("Params4bit", "Int8Params"):
        return fake
    from bitsandbytes import functional  # noqa: PLC0415 - an optional extra

    with _dynamic_map(functional, fakes, fake.device), fakes:
        if kind == "Params4bit":
            options = {name: getattr(like, name) for name in ("blocksize", "compress_statistics", "quant_type")}
            data, state = functional.quantize_4bit(
                fake.data.to(torch.bfloat16), quant_storage=like.quant_storage, **options
            )
            packed = _named(kind, nn.Parameter(data, requires_grad=False), quant_state=state, bnb_quantized=True)
            module.quant_state = state  # type: ignore[assignment]
        else:
            data, scales, _ = functional.int8_vectorwise_quant(fake.data.half())
            packed = _named(kind, nn.Parameter(data, requires_grad=False), CB=data, SCB=scales)
    return packed


@contextmanager
def _dynamic_map(functional: Any, fakes: FakeTensorMode, device: torch.device) -> Iterator[None]:
    """Let bitsandbytes find a fake table of values inside, since it keeps the one that it first works out."""
    tables, before = functional.name2qmap, functional.name2qmap.get("dynamic")
    tables["dynamic"] = _fake(functional.create_dynamic_map().to("meta"), fakes, device)
    try:
        yield
    finally:
        if before is None:
            del tables["dynamic"]
        else:
            tables["dynamic"] = before


def _named(name: str, parameter: nn.Parameter, **attributes: Any) -> nn.Parameter:
    parameter.__class__ = type(name, (_Packed,), {})
    vars(parameter).update(attributes)
    return parameter


def _fuse(policy: Policy) -> None:
    """Fuse the layers that would be fused; of fakes nobody knows whether they agree, so a few real numbers tell."""
    verdicts: dict[str, bool] = {}

    def agrees(module: nn.Module, replacement: Callable[..., Any], dtype: torch.dtype) -> bool:
        kind = type(module).__name__
        if kind not in verdicts:
            verdicts[kind] = _is_silu(module) if hasattr(module, "gate_proj") else _is_norm(module, replacement, dtype)
        return verdicts[kind]

    fused_layers.fuse_layers_by(policy.causal, policy.dtype, agrees, one_kernel())
    for module in policy.causal.modules():
        if verdicts.get(type(module).__name__) and not hasattr(module, "gate_proj"):
            # On a CPU torch spells out what is one kernel on a GPU.
            vars(module)["forward"] = MethodType(_norm_forward, module)


def _is_silu(module: Any) -> bool:
    numbers = torch.linspace(-3, 3, 7)
    return bool(torch.allclose(module.act_fn(numbers), F.silu(numbers)))


def _is_norm(module: nn.Module, replacement: Callable[..., Any], dtype: torch.dtype) -> bool:
    parameters = dict(module._parameters)
    module._parameters["weight"] = nn.Parameter(torch.rand(module._parameters["weight"].shape))  # type: ignore[union-attr]
    try:
        with simulating("cpu"):
            return fused_layers.agrees_on_random_rows(module, replacement, dtype)
    finally:
        module._parameters.update(parameters)


def _norm_forward(norm: Any, x: Tensor) -> Tensor:
    out: Tensor = cast(Any, _RmsNorm).apply(x, norm.weight.to(x.dtype))
    return out


class _RmsNorm(torch.autograd.Function):
    """A norm that keeps its input and a number for each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


@cache
def one_kernel() -> Any:
    """Return a stand-in for the compiled product of gate and up: one kernel for each direction."""
    torch.library.define("dpoctl_traced::silu_times", "(Tensor gate, Tensor up) -> Tensor")
    torch.library.define(
        "dpoctl_traced::pull_silu_times", "(Tensor upstream, Tensor gate, Tensor up) -> (Tensor, Tensor)"
    )
    torch.library.register_fake("dpoctl_traced::silu_times", lambda gate, up: torch.empty_like(up))
    torch.library.register_fake(
        "dpoctl_traced::pull_silu_times", lambda _, gate, up: (torch.empty_like(gate), torch.empty_like(up))
    )
    made: Any = torch.ops.dpoctl_traced
    return fused_layers.GatedProduct(made.silu_times, made.pull_silu_times)

"""From a recipe, or from a finished run, to a policy."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dpoctl import console
from dpoctl.errors import SetupError, UsageError
from dpoctl.model.decoder import find_decoder
from dpoctl.model.dropout import disable_dropout
from dpoctl.model.modules import ends_of, names_of_ends
from dpoctl.model.policy import FROZEN, TRAINED, Policy
from dpoctl.model.quantize import keep_one_kernel, quantization_config, refuse_quantised_checkpoint
from dpoctl.model.scratch import build_model
from dpoctl.model.source import ADAPTER_WEIGHTS, Source, base_of, find_adapter, find_source, reading

if TYPE_CHECKING:
    from dpoctl.recipe.schema import LoraSection, QuantizationSection, Recipe

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision to compute in; `auto` is the fastest that a GPU does itself, and float32 elsewhere.

    A CPU keeps float32 even where it knows bfloat16: runs there are for trying out and testing, and must not give other
    numbers on the next machine.

    Args:
        name: `auto`, `float32`, `bfloat16` or `float16`.
        device: where the model runs.
    """
    if name != "auto":
        return _DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.float32


def load_policy(
    recipe: "Recipe",
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    *,
    model_init: Callable[[], PreTrainedModel] | None = None,
) -> Policy:
    """Load or build the model of a recipe, with its adapters, ready to be trained.

    Args:
        recipe: names or describes the model.
        tokenizer: of the recipe.
        device: where to put the model.
        model_init: makes the model instead.

    Raises:
        SetupError: the model, or the base of an adapter, cannot be reached or read.
        UsageError: the recipe asks for something that this model does not have.
    """
    section, lora = recipe.model, recipe.lora
    dtype = resolve_dtype(section.dtype, device)
    if model_init is not None or section.from_scratch is not None:
        if lora is not None or recipe.quantization is not None:
            made = "built from scratch" if model_init is None else "made by model_init"
            raise UsageError(f"a model that is {made} is trained whole: leave out lora and quantization")
        model = _make_model(recipe, tokenizer, model_init)
        _move(model, device)
        policy = _over_base(model, None, recipe, dtype)
    else:
        source = find_source(
            section.model_name_or_path or "",
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
        )
        adapter = find_adapter(source)
        if adapter is not None and lora is None:
            raise UsageError(
                f"model '{source.name}' is an adapter, and the recipe has no lora section",
                hint="add `lora: {start: continue}` to train it further, or `lora: {start: new}` to stack another",
            )
        if adapter is None and lora is not None and lora.start == "continue":
            raise UsageError(f"lora.start is continue, but model '{source.name}' is not an adapter")
        policy = _from_source(source, adapter, recipe, tokenizer, dtype, device)
    if section.disable_dropout:
        _disable_dropout(policy, lora)
    return policy


def load_run(
    folder: Path | str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    attn_implementation: str = "auto",
    quantization: "QuantizationSection | None" = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Policy:
    """Load a finished run to be looked at, not trained: nothing requires gradients.

    For an adapter the live reference is its base model. That is not what a run over an SFT adapter was compared with:
    the joined adapter no longer tells the two apart.

    Args:
        folder: a run directory, any folder with a model or an adapter, or a hub id.
        device: where to put it.
        dtype: the precision to store and compute in.
        attn_implementation: as in a recipe.
        quantization: how the base was quantised in training, if it was.
        trust_remote_code: whether code that comes with the model may run.
        revision: branch, tag or commit, of a hub id.
    """
    source = find_source(str(folder), revision=revision, trust_remote_code=trust_remote_code)
    adapter = find_adapter(source)
    base = source if adapter is None else base_of(adapter, trust_remote_code=trust_remote_code)
    model = _load_weights(base, attn_implementation, dtype, device, quantization, keep=[], lora=adapter is not None)
    if adapter is None:
        model.requires_grad_(False)
        return Policy(model=model, causal=model, dtype=dtype, kind="full", base=base.name)
    from dpoctl.model.lora import load_adapter  # noqa: PLC0415 - peft takes a second to import

    _fit_vocabulary(model, _rows_in(adapter, model), trained=True, seed=0)
    peft_model = load_adapter(model, adapter, TRAINED, trainable=False)
    return Policy(
        model=peft_model,
        causal=model,
        dtype=dtype,
        kind="lora",
        active=(TRAINED,),
        base=_absolute(base),
        base_revision=base.revision,
    )


def _make_model(
    recipe: "Recipe", tokenizer: PreTrainedTokenizerBase, model_init: Callable[[], PreTrainedModel] | None
) -> PreTrainedModel:
    """A model in float32, the same on every rank: built as the recipe says, or by the caller's code."""
    section, seed = recipe.model, recipe.training.seed
    if model_init is None:
        assert section.from_scratch is not None
        return build_model(section.from_scratch, tokenizer, seed=seed, attention=section.attn_implementation)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        made: object = model_init()
    if not isinstance(made, PreTrainedModel) or ends_of(made)[1] is None:
        raise UsageError(f"model_init gave a {type(made).__name__}, not a causal model of transformers")
    for tensor in [*made.parameters(), *made.buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()
    _fit_vocabulary(made, len(tokenizer), trained=True, seed=seed)
    made.train(False)
    return made


def _from_source(
    source: Source,
    adapter: Path | None,
    recipe: "Recipe",
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    device: torch.device,
) -> Policy:
    lora = recipe.lora
    saved = list(lora.modules_to_save or ()) if lora is not None else []
    base = source
    if adapter is not None:
        from dpoctl.model.lora import check_adapter  # noqa: PLC0415 - peft takes a second to import

        base = base_of(adapter, trust_remote_code=source.trust_remote_code)
        saved += check_adapter(adapter).get("modules_to_save") or []
    model = _load_weights(
        base,
        recipe.model.attn_implementation,
        dtype if lora is not None else torch.float32,
        device,
        recipe.quantization,
        keep=saved,
        lora=lora is not None,
    )
    if adapter is not None:
        _fit_vocabulary(model, _rows_in(adapter, model), trained=True, seed=recipe.training.seed)
    trained = lora is None or _trains_embeddings(model, saved)
    _fit_vocabulary(model, len(tokenizer), trained=trained, seed=recipe.training.seed)
    if adapter is None:
        return _over_base(model, base, recipe, dtype)
    return _over_adapter(model, base, adapter, recipe, dtype)


def _over_base(model: PreTrainedModel, base: Source | None, recipe: "Recipe", dtype: torch.dtype) -> Policy:
    """Train a plain model: all of it, or an adapter on it."""
    before = _without_cache(model)
    place: dict[str, Any] = {} if base is None else {"base": _absolute(base), "base_revision": base.revision}
    if recipe.lora is None:
        model.requires_grad_(True)
        return Policy(model=model, causal=model, dtype=dtype, kind="full", original_config=before, **place)
    from dpoctl.model.lora import add_adapter, to_float32  # noqa: PLC0415 - peft takes a second to import
    from dpoctl.model.plain_lora import use_plain_lora  # noqa: PLC0415

    model.requires_grad_(False)
    peft_model = add_adapter(model, recipe.lora, seed=recipe.training.seed)
    to_float32(model, dtype)
    use_plain_lora(model)
    return Policy(
        model=peft_model, causal=model, dtype=dtype, kind="lora", active=(TRAINED,), original_config=before, **place
    )


def _over_adapter(model: PreTrainedModel, base: Source, adapter: Path, recipe: "Recipe", dtype: torch.dtype) -> Policy:
    """Start from an SFT adapter, which is the reference: under a new one, or as a frozen copy."""
    from dpoctl.model.lora import continue_adapter, stack_adapter, to_float32  # noqa: PLC0415 - peft takes a second to import
    from dpoctl.model.plain_lora import use_plain_lora  # noqa: PLC0415

    assert recipe.lora is not None
    before = _without_cache(model)
    model.requires_grad_(False)
    saved: tuple[str, ...] = ()
    active: tuple[str, ...] = (TRAINED,)
    if recipe.lora.start == "continue":
        peft_model = continue_adapter(model, adapter)
    else:
        peft_model, saved = stack_adapter(model, adapter, recipe.lora, seed=recipe.training.seed)
        active = (FROZEN, TRAINED)
    to_float32(model, dtype)
    use_plain_lora(model)
    return Policy(
        model=peft_model,
        causal=model,
        dtype=dtype,
        kind="lora",
        active=active,
        reference_adapters=(FROZEN,),
        saved_modules=saved,
        original_config=before,
        base=_absolute(base),
        base_revision=base.revision,
    )


def _load_weights(
    source: Source,
    attention: str,
    dtype: torch.dtype,
    device: torch.device,
    quantization: "QuantizationSection | None",
    *,
    keep: list[str],
    lora: bool,
) -> PreTrainedModel:
    decoder = find_decoder(source)
    refuse_quantised_checkpoint(decoder.config, source.name, lora=lora)
    packed = quantization_config(quantization, dtype, keep)
    with reading(source.name):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.name,
            config=decoder.config,
            dtype=dtype,
            use_safetensors=True,
            attn_implementation=decoder.attention(attention),
            key_mapping=decoder.key_mapping,
            quantization_config=packed,
            device_map=None if packed is None else {"": str(device)},
            output_loading_info=True,
            # transformers looks for an adapter once more, and would wait for the hub if it were not told.
            adapter_kwargs={"local_files_only": source.options["local_files_only"]},
            **source.options,
        )
    model: PreTrainedModel = loaded[0]
    report: dict[str, Any] = loaded[1]
    missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if missing:
        raise SetupError(f"model '{source.name}' lacks weights of {type(model).__name__}: '{missing[0]}'")
    if decoder.narrowed_from is not None:
        # Saving would otherwise try to rename the weights back to those of the multimodal model.
        vars(model)["_weight_conversions"] = None
        console.note(
            f"model '{source.name}' is multimodal ({decoder.narrowed_from}); its text tower is trained, "
            f"as a {type(model).__name__}"
        )
    if packed is None:
        _move(model, device)
    keep_one_kernel(model)
    return model


def _move(model: nn.Module, device: torch.device) -> None:
    model.to(device)


def _fit_vocabulary(model: PreTrainedModel, rows: int, *, trained: bool, seed: int) -> None:
    have = int(cast(Tensor, ends_of(model)[0].weight).shape[0])
    if rows <= have:
        return
    if not trained:
        ends = ", ".join(_ends_of(model))
        raise UsageError(
            f"the tokenizer has {rows} tokens and the model's embedding {have} rows",
            hint=f"new rows must be trained: set lora.modules_to_save: [{ends}]",
        )
    # New rows are drawn on the model's own device, and must be the same on every rank.
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        model.resize_token_embeddings(rows)
    console.note(f"the embedding grows from {have} to {rows} rows, to hold the tokenizer's tokens")


def _ends_of(model: PreTrainedModel) -> list[str]:
    """Last names of the embedding and the head."""
    return [name.rpartition(".")[2] for name in names_of_ends(model)]


def _trains_embeddings(model: PreTrainedModel, saved: list[str]) -> bool:
    return set(_ends_of(model)) <= {name.rpartition(".")[2] for name in saved}


def _rows_in(adapter: Path, model: PreTrainedModel) -> int:
    """How many embedding rows an adapter brings along; zero if it leaves the embedding alone."""
    embedding = ends_of(model)[0]
    name = next(name for name, module in model.named_modules() if module is embedding)
    key = f"base_model.model.{name}.weight"
    with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as file:
        return int(file.get_slice(key).get_shape()[0]) if key in file.keys() else 0  # noqa: SIM118 - no mapping


def _disable_dropout(policy: Policy, lora: "LoraSection | None") -> None:
    rates = {config.lora_dropout for config in getattr(policy.model, "peft_config", {}).values()} - {0.0}
    # Of a rate that stands in the recipe the advice speaks.
    if lora is not None and (found := rates - {lora.lora_dropout}):
        console.note(f"the adapter's own lora_dropout {min(found)} has no effect: model.disable_dropout is true")
    before = disable_dropout(policy.model, policy.causal.config)
    policy.original_config = {**policy.original_config, **before}


def _without_cache(model: PreTrainedModel) -> dict[str, Any]:
    before = {"use_cache": getattr(model.config, "use_cache", None)}
    model.config.use_cache = False
    return {name: value for name, value in before.items() if value is not None}


def _absolute(source: Source) -> str:
    return str(Path(source.name).resolve()) if source.is_local else source.name

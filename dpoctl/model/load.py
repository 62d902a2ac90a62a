"""Loading a policy from a recipe or from a finished run."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from dpoctl import console
from dpoctl.errors import SetupError, UsageError
from dpoctl.model.from_config import build_empty, build_model
from dpoctl.model.fused_layers import fuse_layers
from dpoctl.model.integrity import check_weights, refuse_unused, verify_export
from dpoctl.model.lazy_weights import is_lazy, load_lazily, read_whole
from dpoctl.model.modules import (
    disable_dropout,
    embedding_and_head,
    embedding_and_head_names,
    is_trainable,
    keep_activations_in,
    last_name,
)
from dpoctl.model.policy import FROZEN, TRAINED, Policy
from dpoctl.model.quantize import check_quantised_checkpoint, prepare_quantised_layers, quantization_config
from dpoctl.model.source import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    GENERATION_CONFIG,
    Decoder,
    ModelSource,
    base_of,
    find_adapter,
    find_decoder,
    find_source,
    read_json,
    reading_model,
    recipe_source,
    wrong_setting,
)

if TYPE_CHECKING:
    from dpoctl.recipe.schema import LoraSection, QuantizationSection, Recipe

# Causal masks and rotations that old checkpoints hold, constants of quantised weights, and heads that predict further.
_HARMLESS = re.compile(
    r"(attn|attention)\.(masked_)?bias$|rotary_emb\.inv_freq$|\.(absmax|quant_map|quant_state\.|nested_|SCB|weight_format)"
    r"|^(model\.)?mtp\."
)
_OTHER_TOWERS = re.compile(r"vision|visual|audio|image|projector|connector")


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the precision to compute in; `auto` is bfloat16 or else float16 on a GPU, and float32 on a CPU.

    `auto` is float32 also on a CPU with bfloat16: runs on CPUs are trials and tests, and must give the same numbers on
    every machine.

    Args:
        name: `auto`, `float32`, `bfloat16` or `float16`.
        device: where the model runs.
    """
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.float32


def compute_dtype(recipe: "Recipe", device: torch.device) -> torch.dtype:
    """Return the precision that a recipe's model computes in.

    Raises:
        SetupError: The weights are to be bfloat16, and the GPU has no bfloat16.
    """
    if recipe.training.param_dtype != "bfloat16":
        return resolve_dtype(recipe.model.dtype, device)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        raise SetupError("training.param_dtype: this GPU has no bfloat16", hint="remove training.param_dtype")
    return torch.bfloat16


def weight_dtype(recipe: "Recipe", dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that the weights of a model are stored in, apart from adapters, which are float32.

    Args:
        recipe: decides between full fine-tuning and LoRA.
        dtype: the precision of the computation.
    """
    if recipe.lora is not None:
        return dtype
    return torch.bfloat16 if recipe.training.param_dtype == "bfloat16" else torch.float32


def load_policy(
    recipe: "Recipe",
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    *,
    model_init: Callable[[], PreTrainedModel] | None = None,
    lazy: bool = False,
) -> Policy:
    """Load or build the model of a recipe, with its adapters, ready to be trained.

    Args:
        recipe: names or describes the model.
        tokenizer: of the recipe.
        device: where to put the model.
        model_init: returns the model, in place of the recipe's.
        lazy: leave weights in their files, if that can be done, until the model is divided over the ranks.

    Raises:
        SetupError: the model, or the base of an adapter, cannot be reached or read.
        UsageError: the recipe asks for something that this model does not support.
    """
    section, lora = recipe.model, recipe.lora
    dtype = compute_dtype(recipe, device)
    if model_init is not None or section.from_scratch is not None:
        if lora is not None or recipe.quantization is not None:
            origin = "from model_init" if model_init is not None else "built from scratch"
            raise UsageError(f"a model {origin} is trained whole", hint="leave out lora and quantization")
        module: nn.Module = _new_model(recipe, tokenizer, model_init)
        model = cast(PreTrainedModel, module.to(device, weight_dtype(recipe, dtype)))
        policy = _full_policy(model, None, dtype, recipe.training.trainable)
    else:
        source = recipe_source(section)
        adapter = find_adapter(source)
        if adapter is not None and lora is None:
            raise UsageError(
                f"model '{source.name}' is an adapter, and the recipe has no lora section",
                hint="add `lora: {start: continue}` to train it further, or `lora: {start: new}` to stack another",
            )
        if adapter is None and lora is not None and lora.start == "continue":
            raise UsageError(
                f"lora.start is continue, but model '{source.name}' is not an adapter", hint="set lora.start: new"
            )
        policy = _policy_from_source(source, adapter, recipe, tokenizer, dtype, device, lazy=lazy)
    if section.disable_dropout:
        _disable_dropout(policy, lora)
    if lazy:
        _move_to(policy.model, device)
    if device.type == "cuda" and not recipe.training.torch_compile:
        fuse_layers(policy.causal, policy.dtype, compiled=True)
    return policy


def assemble(
    model: PreTrainedModel, recipe: "Recipe", source: ModelSource | None, lora: "LoraSection | None", dtype: torch.dtype
) -> Policy:
    """Return the policy of a base model that is there already, without weights, as `load_policy` would make it.

    Args:
        model: quantised, if the recipe asks for it.
        recipe: how it is trained.
        source: of the model; None if it is built from scratch.
        lora: the new adapter; None trains all weights.
        dtype: the precision of the computation.
    """
    if lora is None or source is None:
        policy = _full_policy(model, source, dtype, recipe.training.trainable)
    else:
        policy = _lora_policy(model, source, None, lora, dtype, recipe.training.seed)
    if recipe.model.disable_dropout:
        disable_dropout(policy.model, policy.causal.config)
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
    lazy: bool = False,
) -> Policy:
    """Load a finished run for inference: no parameter requires gradients.

    The live reference of an adapter is its base model. For a run over an SFT adapter that is not the reference of the
    training, because the export joins both adapters into one.

    Args:
        folder: a run directory, any folder with a model or an adapter, or a hub id.
        device: where to put it.
        dtype: the precision to store and compute in.
        attn_implementation: as in a recipe.
        quantization: the quantisation of the base in training, if any.
        trust_remote_code: whether code that comes with the model may run.
        revision: branch, tag or commit, of a hub id.
        lazy: as in `load_policy`.
    """
    source = find_source(str(folder), revision=revision, trust_remote_code=trust_remote_code)
    adapter = find_adapter(source)
    if adapter is not None:
        verify_export(source)
        _refuse_division(adapter, lazy=lazy)
    base = source if adapter is None else base_of(adapter, trust_remote_code=trust_remote_code)
    is_adapter = adapter is not None
    model = _load_weights(base, attn_implementation, dtype, device, quantization, keep=[], lora=is_adapter, lazy=lazy)
    if device.type == "cuda":
        fuse_layers(model, dtype)
    if adapter is None:
        model.requires_grad_(False)
        return Policy(model=model, causal=model, dtype=dtype, kind="full", base=base.name)
    from dpoctl.model.fused_lora import fuse_lora  # noqa: PLC0415 - peft takes a second to import
    from dpoctl.model.lora import load_adapter  # noqa: PLC0415

    _take_generation_settings(model, source)
    _resize_embedding(model, _embedding_rows(adapter, model), trained=True, seed=0)
    peft_model = load_adapter(model, adapter, TRAINED, trainable=False)
    if lazy:
        _move_to(peft_model, device)
    # As in training. peft adds the update to a product that is rounded already: in bfloat16 a small one is lost.
    fuse_lora(model)
    return Policy(
        model=peft_model,
        causal=model,
        dtype=dtype,
        kind="lora",
        active=(TRAINED,),
        base=_absolute(base),
        base_revision=base.revision,
    )


def _move_to(model: nn.Module, device: torch.device) -> None:
    """Move what is in memory to a device: peft puts an adapter beside its layer, and a lazy one is on the CPU."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if not is_lazy(tensor):
            tensor.data = tensor.data.to(device)


def _new_model(
    recipe: "Recipe", tokenizer: PreTrainedTokenizerBase, model_init: Callable[[], PreTrainedModel] | None
) -> PreTrainedModel:
    """Build the recipe's model from scratch, or call `model_init`: a float32 model, the same on every rank."""
    section, seed = recipe.model, recipe.training.seed
    if model_init is None:
        assert section.from_scratch is not None
        return build_model(section.from_scratch, tokenizer, seed=seed, attention=section.attn_implementation)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model: object = model_init()
    if not isinstance(model, PreTrainedModel) or embedding_and_head(model)[1] is None:
        raise UsageError(f"model_init returned a {type(model).__name__}, not a causal language model of transformers")
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()
    _resize_embedding(model, len(tokenizer), trained=True, seed=seed)
    model.train(False)
    return model


def _policy_from_source(
    source: ModelSource,
    adapter: Path | None,
    recipe: "Recipe",
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    device: torch.device,
    *,
    lazy: bool,
) -> Policy:
    lora, seed = recipe.lora, recipe.training.seed
    saved = list(lora.modules_to_save or ()) if lora is not None else []
    base = source
    if adapter is not None:
        from dpoctl.model.lora import check_adapter  # noqa: PLC0415 - peft takes a second to import

        verify_export(source)
        base = base_of(adapter, trust_remote_code=source.trust_remote_code)
        saved += check_adapter(adapter).get("modules_to_save") or []
        _refuse_division(adapter, lazy=lazy)
    model = _load_weights(
        base,
        recipe.model.attn_implementation,
        weight_dtype(recipe, dtype),
        device,
        recipe.quantization,
        keep=saved,
        lora=lora is not None,
        lazy=lazy,
    )
    if adapter is not None:
        _take_generation_settings(model, source)
        _resize_embedding(model, _embedding_rows(adapter, model), trained=True, seed=seed)
    patterns, ends = recipe.training.trainable, embedding_and_head_names(model)
    if lora is None:
        trained = all(is_trainable(f"{name}.weight", patterns) for name in ends)
        _resize_embedding(model, len(tokenizer), trained=trained, seed=seed, key="training.trainable")
        return _full_policy(model, base, dtype, patterns)
    trained = {last_name(name) for name in ends} <= {last_name(name) for name in saved}
    _resize_embedding(model, len(tokenizer), trained=trained, seed=seed)
    return _lora_policy(model, base, adapter, lora, dtype, seed)


def _refuse_division(adapter: Path, *, lazy: bool) -> None:
    """Refuse to divide an adapter over the ranks that computes with whole weight matrices."""
    if lazy and read_json(adapter / ADAPTER_CONFIG).get("use_dora"):
        raise UsageError(
            f"adapter '{adapter}' is a DoRA, which needs whole weight matrices, and a sharded model has parts of them",
            hint="set training.sharding: none, or merge it into its base model first",
        )


def _full_policy(
    model: PreTrainedModel, base: ModelSource | None, dtype: torch.dtype, patterns: Sequence[str] | None
) -> Policy:
    """Return a policy of which all weights are trained, or those whose names match one of the patterns."""
    original_config = _disable_cache(model)
    # A tied weight has two names.
    named = list(model.named_parameters(remove_duplicate=False))
    for pattern in patterns or ():
        if not any(is_trainable(name, [pattern]) for name, _ in named):
            examples = ", ".join(name for name, _ in named[:2])
            raise UsageError(
                f"training.trainable: no weight of this model matches '{pattern}'",
                hint=f"its weights have names such as {examples}, {named[-1][0]}",
            )
    model.requires_grad_(False)
    for name, parameter in named:
        if is_trainable(name, patterns):
            parameter.requires_grad_(True)
    if dtype == torch.bfloat16:
        keep_activations_in(model, dtype)
    origin: dict[str, Any] = {} if base is None else {"base": _absolute(base), "base_revision": base.revision}
    return Policy(model=model, causal=model, dtype=dtype, kind="full", original_config=original_config, **origin)


def _lora_policy(
    model: PreTrainedModel, base: ModelSource, adapter: Path | None, lora: "LoraSection", dtype: torch.dtype, seed: int
) -> Policy:
    """Return a policy with a new adapter on a base model or on an SFT adapter, or with an SFT adapter to continue."""
    from dpoctl.model import lora as adapters  # noqa: PLC0415 - peft takes a second to import
    from dpoctl.model.fused_lora import fuse_lora  # noqa: PLC0415

    original_config = _disable_cache(model)
    model.requires_grad_(False)
    active: tuple[str, ...] = (TRAINED,)
    saved: tuple[str, ...] = ()
    if adapter is None:
        peft_model = adapters.add_adapter(model, lora, seed=seed)
    elif lora.start == "continue":
        peft_model = adapters.continue_adapter(model, adapter)
    else:
        peft_model, saved = adapters.stack_adapter(model, adapter, lora, seed=seed)
        active = (FROZEN, TRAINED)
    changes_base = lora.start == "new" and lora.changes_base
    adapters.cast_trainable_to_float32(model, dtype)
    fuse_lora(model)
    return Policy(
        model=peft_model,
        causal=model,
        dtype=dtype,
        kind="lora",
        active=active,
        reference_adapters=() if adapter is None and not changes_base else (FROZEN,),
        taken_out=(FROZEN,) if changes_base else (),
        saved_modules=saved,
        original_config=original_config,
        base=_absolute(base),
        base_revision=base.revision,
    )


def _load_weights(
    source: ModelSource,
    attention: str,
    dtype: torch.dtype,
    device: torch.device,
    quantization: "QuantizationSection | None",
    *,
    keep: list[str],
    lora: bool,
    lazy: bool = False,
) -> PreTrainedModel:
    decoder = find_decoder(source)
    check_quantised_checkpoint(decoder.config, source.name, lora=lora)
    verify_export(source)
    check_weights(source, lambda: build_empty(source, decoder))
    _generation_settings(source)
    options = {
        "config": decoder.config,
        "dtype": dtype,
        "use_safetensors": True,
        "attn_implementation": decoder.attention_name(attention),
        "key_mapping": decoder.key_mapping,
        "quantization_config": quantization_config(quantization, dtype, keep),
        "output_loading_info": True,
        # They are reported, and refused here.
        "ignore_mismatched_sizes": True,
        # transformers looks for an adapter here too, and would wait for an unreachable hub.
        "adapter_kwargs": {"local_files_only": source.options["local_files_only"]},
        **source.options,
    }
    loaded: Any = load_lazily(source, decoder, device, options) if lazy else None
    if loaded is None:
        load: Any = AutoModelForCausalLM.from_pretrained
        with reading_model(source.name, "config.json"):
            # Each tensor goes to the device as it is read, so that no rank ever holds the model in host memory.
            loaded = load(source.name, device_map={"": str(device)}, **options)
        if lazy:
            console.note(
                f"model '{source.name}' cannot be read in parts: each process loads all of it before it is divided"
            )
    model: PreTrainedModel = loaded[0]
    _refuse_misfits(source, decoder, model, loaded[1])
    if decoder.multimodal_type is not None:
        # Saving would otherwise rename the weights to those of the multimodal model.
        vars(model)["_weight_conversions"] = None
        console.note(
            f"model '{source.name}' is multimodal ({decoder.multimodal_type}): only its text tower is trained, "
            f"as a {type(model).__name__}"
        )
    prepare_quantised_layers(model)
    return model


def _refuse_misfits(
    source: ModelSource, decoder: Decoder, model: PreTrainedModel, report: Mapping[str, Collection[Any]]
) -> None:
    """Refuse a model whose files do not hold exactly its weights.

    Args:
        source: the model.
        decoder: its configuration.
        model: as it was loaded.
        report: what transformers found.
    """
    if misfits := sorted(report["mismatched_keys"]):
        name, stored, expected = misfits[0]
        raise SetupError(
            f"model '{source.name}': the weight '{name}' has shape {list(stored)}, and {list(expected)} by config.json",
            hint="give the config.json that belongs to the weights",
        )
    if missing := sorted(report["missing_keys"]):
        raise SetupError(
            f"model '{source.name}' lacks the weight '{missing[0]}' of {type(model).__name__}",
            hint="give a complete checkpoint",
        )
    unused = sorted(str(key) for key in report["unexpected_keys"] if not _HARMLESS.search(str(key)))
    if decoder.multimodal_type is not None:
        # Those of the other towers are left out on purpose.
        own = tuple(f"{name}." for name, _ in model.named_children())
        unused = [key for key in unused if key.startswith(own) and not _OTHER_TOWERS.search(key)]
    refuse_unused(source, type(model).__name__, unused)


def _take_generation_settings(model: PreTrainedModel, adapter: ModelSource) -> None:
    """Generate with the settings that were saved with an adapter, if there are any, and not with those of its base."""
    if (settings := _generation_settings(adapter)) is not None:
        model.generation_config = settings


def _generation_settings(source: ModelSource) -> GenerationConfig | None:
    """Read the generation settings of a model, if it has a file of them."""
    path = source.file(GENERATION_CONFIG)
    if path is None:
        return None
    for key, value in read_json(path).items():
        tokens = value if isinstance(value, list) else [value]
        if key.endswith("_token_id") and not all(token is None or type(token) is int for token in tokens):
            raise wrong_setting(source, key, value, "token id, or list of them", GENERATION_CONFIG)
    with reading_model(source.name, GENERATION_CONFIG):
        return GenerationConfig.from_pretrained(path.parent)


def _resize_embedding(
    model: PreTrainedModel, rows: int, *, trained: bool, seed: int, key: str = "lora.modules_to_save"
) -> None:
    """Grow the embedding and the head to `rows`; refuse to if the new rows would not be `trained`, as `key` decides."""
    layers = [layer for layer in embedding_and_head(model) if layer is not None]
    current = int(cast(Tensor, layers[0].weight).shape[0])
    if rows <= current:
        return
    if not trained:
        raise UsageError(
            f"the tokenizer has {rows} tokens, but the model's embedding has {current} rows",
            hint=f"train the new rows: set {key}: [{', '.join(map(last_name, embedding_and_head_names(model)))}]",
        )
    # The new rows depend on the present ones.
    for layer in layers:
        read_whole(layer)
    # New rows are initialised on the model's device, and must be the same on every rank.
    device = cast(Tensor, layers[0].weight).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model.resize_token_embeddings(rows)
    console.note(f"the model's embedding was resized from {current} to {rows} rows, to fit the tokenizer")


def _embedding_rows(adapter: Path, model: PreTrainedModel) -> int:
    """Return the number of embedding rows in an adapter's file, zero if it holds no embedding."""
    embedding = embedding_and_head(model)[0]
    name = next(name for name, module in model.named_modules() if module is embedding)
    key = f"base_model.model.{name}.weight"
    with reading_model(str(adapter), ADAPTER_WEIGHTS), safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as file:
        return int(file.get_slice(key).get_shape()[0]) if key in file.keys() else 0  # noqa: SIM118 - no mapping


def _disable_dropout(policy: Policy, lora: "LoraSection | None") -> None:
    rates = {config.lora_dropout for config in getattr(policy.model, "peft_config", {}).values()} - {0.0}
    # The advice on the recipe reports a rate that the recipe itself sets.
    if lora is not None and (unused := rates - {lora.lora_dropout}):
        console.note(f"the adapter's own lora_dropout {min(unused)} has no effect: model.disable_dropout is true")
    before = disable_dropout(policy.model, policy.causal.config)
    policy.original_config = {**policy.original_config, **before}


def _disable_cache(model: PreTrainedModel) -> dict[str, Any]:
    """Turn the KV cache off, and return the previous setting."""
    before = getattr(model.config, "use_cache", None)
    model.config.use_cache = False
    return {} if before is None else {"use_cache": before}


def _absolute(source: ModelSource) -> str:
    return str(Path(source.name).resolve()) if source.is_local else source.name

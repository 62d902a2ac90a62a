"""LoRA adapters: a new one on a base model, a new one on top of an SFT adapter, or an SFT adapter trained further."""

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dpoctl import console
from dpoctl.errors import SetupError, UsageError, UserError
from dpoctl.model.lazy_weights import float32, read_whole
from dpoctl.model.memory import is_out_of_memory
from dpoctl.model.modules import (
    base_layer,
    embedding_and_head,
    embedding_and_head_names,
    is_adapted,
    last_name,
    layer_number,
    linear_layers,
)
from dpoctl.model.policy import FROZEN, TRAINED
from dpoctl.model.source import ADAPTER_CONFIG, ADAPTER_WEIGHTS, first_line, read_json, reading_model

if TYPE_CHECKING:
    from dpoctl.recipe.schema import LoraSection

# Settings that an adapter may change from their defaults: without it the model is still the base, and adapters add up.
_SUPPORTED = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "modules_to_save",
    "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "target_parameters", "task_type", "use_dora", "use_rslora",
}  # fmt: skip


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_dict_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or (isinstance(value, dict) and all(map(fits, value.values())))


def _is_names(value: Any) -> bool:
    return value is None or isinstance(value, str) or _is_list_of(str)(value)


def _is_list_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(isinstance(item, kind) for item in value)


_SETTINGS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_count, "number of 1 or more"),
    "lora_alpha": (_is_number, "number"),
    "lora_dropout": (lambda value: _is_number(value) and 0 <= value < 1, "number from 0 to below 1"),
    "rank_pattern": (_is_dict_of(_is_count), "mapping to numbers of 1 or more"),
    "alpha_pattern": (_is_dict_of(_is_number), "mapping to numbers"),
    "target_modules": (_is_names, "list of names"),
    "modules_to_save": (lambda value: value is None or _is_list_of(str)(value), "list of names"),
    "use_rslora": (lambda value: isinstance(value, bool), "true or false"),
    "use_dora": (lambda value: isinstance(value, bool), "true or false"),
    "fan_in_fan_out": (lambda value: isinstance(value, bool), "true or false"),
}
"""Settings that an adapter's update depends on: whether a value is one, and what it should be."""
_HARMLESS_INITS = (True, False, "gaussian")
_MERGE_HINT = "merge it into its base model"


def check_adapter(folder: Path) -> dict[str, Any]:
    """Read an adapter's configuration, and check that it is plain LoRA.

    Returns:
        The configuration in the file.

    Raises:
        UsageError: the adapter changes the base itself, or computes something other than LoRA.
        SetupError: a setting is not of its kind.
    """
    config = read_json(folder / ADAPTER_CONFIG)
    for name, (fits, words) in _SETTINGS.items():
        if name in config and not fits(config[name]):
            raise SetupError(f"adapter '{folder}' cannot be loaded: {name} in {ADAPTER_CONFIG} is no {words}")
    if config.get("peft_type") != "LORA":
        raise UsageError(f"adapter '{folder}' has peft_type {config.get('peft_type')}, not LORA", hint=_MERGE_HINT)
    plain = LoraConfig()
    defaults = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
    supported = _SUPPORTED | ({"init_lora_weights"} if config.get("init_lora_weights") in _HARMLESS_INITS else set())
    unsupported = sorted(
        name
        for name, value in config.items()
        if name in defaults and name not in supported and value and value != defaults[name]
    )
    if unsupported:
        settings = ", ".join(f"{name}: {config[name]}" for name in unsupported)
        raise UsageError(f"adapter '{folder}' is more than plain LoRA ({settings})", hint=_MERGE_HINT)
    return config


def add_adapter(model: PreTrainedModel, lora: "LoraSection", *, seed: int) -> PeftModel:
    """Put a new adapter on a base model; its update starts at zero.

    Or it starts as a part of the weights, which is taken out of them. Then a frozen copy stays beside it: base and copy
    together are the weights as they were.

    Raises:
        UsageError: a target or a module to save does not exist, or cannot be adapted.
    """
    config = _new_config(model, lora)
    if lora.init_lora_weights == "olora" and config.fan_in_fan_out:
        raise UsageError(
            "lora.init_lora_weights: olora: peft cannot decompose the transposed weights of this model",
            hint="use pissa",
        )
    if lora.changes_base and getattr(model.config, "tie_word_embeddings", False):
        ends = set(embedding_and_head_names(model)) & set(_targeted_modules(model, config))
        if ends:
            raise UsageError(
                f"lora.init_lora_weights: {lora.init_lora_weights} would change embedding and head, which are tied",
                hint=f"leave {min(ends)} out of lora.target_modules",
            )
    with _adding_adapter(model, config, seed):
        config.init_lora_weights = True if lora.init_lora_weights == "default" else lora.init_lora_weights
        peft_model = get_peft_model(model, config, adapter_name=TRAINED)
        if lora.changes_base:
            _freeze_copy(peft_model, config)
    return peft_model


def _freeze_copy(peft_model: PeftModel, config: LoraConfig) -> None:
    """Put a frozen copy of the new adapter beside it."""
    settings = copy.deepcopy(config)
    settings.init_lora_weights, settings.modules_to_save = True, None
    peft_model.add_adapter(FROZEN, settings)
    tuner: Any = peft_model.base_model
    for layer in peft_model.modules():
        if is_adapted(layer) and FROZEN in layer.lora_A:
            pairs: Any = (layer.lora_A, layer.lora_B)
            for factors in pairs:
                factors[FROZEN].weight.data = factors[TRAINED].weight.detach().clone()
    tuner.set_adapter(TRAINED)
    tuner.set_requires_grad(FROZEN, False)


def stack_adapter(
    model: PreTrainedModel, folder: Path, lora: "LoraSection", *, seed: int
) -> tuple[PeftModel, tuple[str, ...]]:
    """Put a new adapter on top of an SFT adapter, which is frozen and becomes the reference.

    Modules that the SFT adapter trained whole become part of the base, so that the reference has them too.

    Returns:
        The model with both adapters active, and the names of the modules that became part of the base.

    Raises:
        UsageError: the two adapters cannot be joined into one.
    """
    if lora.changes_base:
        raise UsageError(
            f"lora.init_lora_weights: {lora.init_lora_weights} starts from the weights of a model, not from an adapter",
            hint=f"merge '{folder}' into its base model first, or remove lora.init_lora_weights",
        )
    if lora.use_dora or read_json(folder / ADAPTER_CONFIG).get("use_dora"):
        raise UsageError(
            f"adapter '{folder}' and the new one cannot be joined: the updates of DoRA are no sum",
            hint="set lora.start: continue, or merge the adapter into its base model first",
        )
    peft_model = load_adapter(model, folder, FROZEN, trainable=False)
    saved = _move_saved_modules_to_base(model, FROZEN)
    config = _new_config(model, lora)
    targets = _targeted_modules(model, config)
    conflicts = sorted(name for name in saved for target in targets if _is_at_or_under(target, name))
    if conflicts:
        raise UsageError(
            f"lora.target_modules includes {conflicts[0]}, which adapter '{folder}' trained whole",
            hint="leave it out, or name it in lora.modules_to_save",
        )
    with _adding_adapter(model, config, seed):
        peft_model.add_adapter(TRAINED, config)
        peft_model.active_adapter = TRAINED
        tuner: Any = peft_model.base_model
        tuner.set_adapter([FROZEN, TRAINED])
        tuner.set_requires_grad(FROZEN, False)
    if any(adapter.target_parameters for adapter in tuner.peft_config.values()):
        raise UsageError(
            f"adapter '{folder}' and the new one cannot be joined, because one of them targets experts",
            hint="set lora.start: continue, or merge the adapter into its base model first",
        )
    return peft_model, saved


def continue_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Train an SFT adapter further, with a frozen copy of it as the reference."""
    peft_model = load_adapter(model, folder, TRAINED, trainable=True)
    add_frozen_adapter(peft_model, folder)
    return peft_model


def add_frozen_adapter(model: nn.Module, folder: Path) -> None:
    """Load the reference's adapter into a `PeftModel` beside the active one."""
    peft_model = cast(PeftModel, model)
    with _silent(), _not_fitting(folder):
        peft_model.load_adapter(
            folder, FROZEN, is_trainable=False, torch_device=str(peft_model.device), low_cpu_mem_usage=False
        )
        peft_model.set_adapter(TRAINED)


def load_adapter(model: PreTrainedModel, folder: Path, name: str, *, trainable: bool) -> PeftModel:
    """Load an adapter, and check that all its weights are those of the model's adapted layers.

    Raises:
        SetupError: the adapter cannot be read, or belongs to another model.
        UsageError: it contains base weights that differ from the model's.
    """
    check_adapter(folder)
    with reading_model(str(folder), ADAPTER_WEIGHTS):
        saved = load_file(folder / ADAPTER_WEIGHTS)
    _check_ranks(folder, saved)
    # peft copies what an adapter's file has of the base's weights, or trained whole, into the weights that are there.
    for key in _base_weights_among(saved, model):
        read_whole(model.get_submodule(_base_name(key).rpartition(".")[0]))
    base_weights = {key: tensor.detach().clone() for key, tensor in _base_weights_among(saved, model).items()}
    with _silent(), _not_fitting(folder):
        peft_model = PeftModel.from_pretrained(
            model, folder, adapter_name=name, is_trainable=trainable, torch_device=str(model.device)
        )
    loaded = get_peft_model_state_dict(peft_model, adapter_name=name, save_embedding_layers=False)
    unmatched = sorted(loaded.keys() - saved.keys()) or sorted(saved.keys() - loaded.keys() - base_weights.keys())
    if unmatched:
        raise SetupError(f"adapter '{folder}' does not fit its base model: only one of them has '{unmatched[0]}'")
    for key, tensor in base_weights.items():
        if key not in loaded and not torch.equal(saved[key].to(tensor), tensor):
            raise UsageError(f"adapter '{folder}' replaces '{key}' of its base model", hint=_MERGE_HINT)
    return peft_model


def cast_trainable_to_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast trainable parameters to float32; the model still computes in `dtype` under autocast."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and TRAINED in module.modules_to_save:
            # Autocast does not cover embeddings and norms: without this the residual stream would be float32 in the
            # policy and not in the reference, and the two would differ before the first step.
            trained = module.modules_to_save[TRAINED]
            trained.register_forward_hook(lambda _module, _inputs, output: output.to(dtype))
        elif is_adapted(module) and dtype != torch.float32:
            # peft would cast the input of every adapted layer to float32, and autograd would keep that copy; autocast
            # casts input and adapter to one dtype.
            module.cast_input_dtype_enabled = False
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = float32(parameter.data)


def unmatched_targets(model: PreTrainedModel, lora: "LoraSection") -> tuple[str, ...]:
    """Return the recipe's target modules that match no module of an adapted model.

    Args:
        model: with the new adapter on it.
        lora: the recipe's section.
    """
    if isinstance(lora.target_modules, str) or lora.start == "continue":
        return ()
    # peft removes from its own list the targets that are parameters of experts.
    targets = cast(Any, model).peft_config[TRAINED].target_modules
    adapted = [
        name
        for name, module in model.named_modules()
        if is_adapted(module) and (TRAINED in module.lora_A or TRAINED in module.lora_embedding_A)
    ]
    return tuple(t for t in lora.target_modules if t in targets and not any(_ends_with(name, t) for name in adapted))


def _new_config(model: PreTrainedModel, lora: "LoraSection") -> LoraConfig:
    """Return peft's configuration of a new adapter."""
    saved = lora.modules_to_save or []
    names = [name for name, _ in model.named_modules()]
    for name in saved:
        if not any(_ends_with(other, name) for other in names):
            raise UsageError(f"lora.modules_to_save: this model has no module '{name}'", hint=_modules_hint(model))
    _note_untied(model, [*saved, *(lora.target_modules if isinstance(lora.target_modules, list) else [])])
    # Layers can be numbered beside a list of names only.
    targets = list(linear_layers(model)) if lora.adapts_all and lora.layers_to_transform else lora.target_modules
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=_int_if_whole(lora.lora_alpha),
        lora_dropout=lora.lora_dropout,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern={name: _int_if_whole(alpha) for name, alpha in lora.alpha_pattern.items()},
        target_modules=targets,
        layers_to_transform=lora.layers_to_transform,
        modules_to_save=lora.modules_to_save,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        bias="none",
    )
    targeted = _targeted_modules(model, config)
    _check_patterns(config, targeted)
    config.fan_in_fan_out = any(isinstance(base_layer(model.get_submodule(name)), Conv1D) for name in targeted)
    return config


def _check_patterns(config: LoraConfig, targeted: list[str]) -> None:
    """Refuse patterns and numbers of layers that no adapted module has."""
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, key):
            if targeted and not any(get_pattern_key([pattern], name) == pattern for name in targeted):
                raise UsageError(
                    f"lora.{key}: no adapted module matches '{pattern}'",
                    hint=f"the adapted modules are {', '.join(sorted({last_name(name) for name in targeted}))}",
                )
    numbers = [number for name in targeted if (number := layer_number(name)) is not None]
    if missing := sorted(set(cast(list[int], config.layers_to_transform or [])) - set(numbers)):
        there = f"from 0 to {max(numbers)}" if numbers else "none"
        raise UsageError(f"lora.layers_to_transform: there is no adapted module in layer {missing[0]}", hint=there)


def _note_untied(model: PreTrainedModel, changed: list[str]) -> None:
    if not getattr(model.config, "tie_word_embeddings", False):
        return
    names = {name for name in embedding_and_head_names(model) for end in changed if _ends_with(name, end)}
    if names:
        console.note(f"embedding and head are tied in this model: {', '.join(sorted(names))} is trained separately")


def _modules_hint(model: PreTrainedModel) -> str:
    return f"its linear layers are {', '.join(linear_layers(model))}"


def _targeted_modules(model: PreTrainedModel, config: LoraConfig) -> list[str]:
    """Return the names of the modules that a configuration would adapt."""
    head = embedding_and_head(model)[1]
    targeted = []
    for name, module in model.named_modules():
        if ".lora_" in name or name.endswith(".base_layer"):
            continue
        if any(_is_at_or_under(name, saved) or _ends_with(name, saved) for saved in config.modules_to_save or ()):
            continue
        if config.target_modules == "all-linear":
            matches: Any = isinstance(base_layer(module), (nn.Linear, Conv1D)) and module is not head
        else:
            matches = check_target_module_exists(config, name)
        if matches:
            targeted.append(name)
    return targeted


def _move_saved_modules_to_base(model: PreTrainedModel, adapter: str) -> tuple[str, ...]:
    """Replace modules of the base by the ones that an adapter trained whole, and return their names."""
    wrappers = {name: m for name, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)}
    for name, wrapper in wrappers.items():
        model.set_submodule(name, wrapper.modules_to_save[adapter].requires_grad_(False))
    return tuple(wrappers)


def _base_weights_among(saved: Iterable[str], model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the weights of the base that are also in an adapter's file; peft saves resized embeddings there."""
    own = dict(model.named_parameters())
    return {key: own[name] for key in saved if (name := _base_name(key)) in own}


def _base_name(key: str) -> str:
    """Return the name that a weight in an adapter's file has in the base."""
    return key.removeprefix("base_model.model.").replace(".base_layer", "")


def _int_if_whole(number: float) -> Any:
    """Return an int for a whole number: readers of adapter_config.json expect one."""
    return int(number) if number == int(number) else number


def _ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def _is_at_or_under(name: str, parent: str) -> bool:
    return name == parent or name.startswith(f"{parent}.")


@contextmanager
def _adding_adapter(model: PreTrainedModel, config: LoraConfig, seed: int) -> Iterator[None]:
    """Initialise an adapter from the seed only, and turn peft's errors into usage errors."""
    hint, targets = _modules_hint(model), config.target_modules
    is_unmatched = not _targeted_modules(model, config)
    with _peft_errors("lora"), torch.random.fork_rng(devices=[]):
        # peft draws adapters on the CPU.
        torch.default_generator.manual_seed(seed)
        try:
            yield
        except ValueError as error:
            # Not every version of peft has an error of its own for this.
            if not is_unmatched:
                raise
            named = targets if isinstance(targets, str) else ", ".join(sorted(targets or ()))
            raise UsageError(f"lora.target_modules: no module of this model matches {named}", hint=hint) from error


def _check_ranks(folder: Path, saved: Mapping[str, Tensor]) -> None:
    """Refuse ranks that the file does not have, before memory is taken for them."""
    config = read_json(folder / ADAPTER_CONFIG)
    ranks = {config.get("r", LoraConfig().r), *(config.get("rank_pattern") or {}).values()}
    for name, tensor in saved.items():
        if ".lora_A" in name and not config.get("target_parameters") and tensor.shape[:1] and len(tensor) not in ranks:
            raise SetupError(
                f"adapter '{folder}' cannot be loaded: '{name}' has rank {len(tensor)} in {ADAPTER_WEIGHTS}, "
                f"and r is {config.get('r')} in {ADAPTER_CONFIG}"
            )


@contextmanager
def _not_fitting(folder: Path) -> Iterator[None]:
    """Turn whatever peft raises about a saved adapter into an error of one line."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        raise SetupError(f"adapter '{folder}' does not fit its base model: {first_line(error)}") from error


@contextmanager
def _silent() -> Iterator[None]:
    """Silence peft's warnings, which repeat checks made here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _peft_errors(prefix: str) -> Iterator[None]:
    """Turn peft's errors about a new adapter into usage errors of one line."""
    with _silent():
        try:
            yield
        except (ValueError, TypeError, RuntimeError) as error:
            raise UsageError(f"{prefix}: {first_line(error)}") from error

"""Adapters: a new one over a plain model, a new one over an SFT adapter, or an SFT adapter trained further."""

import dataclasses
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.error import NoMatchingPeftModuleError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dpoctl import console
from dpoctl.errors import UsageError
from dpoctl.model.modules import bare, ends_of, is_adapted, linear_layers, names_of_ends
from dpoctl.model.policy import FROZEN, TRAINED
from dpoctl.model.source import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_json, reading, reason

if TYPE_CHECKING:
    from dpoctl.recipe.schema import LoraSection

# What an adapter may be besides its defaults, such that adapters off is the base and two adapters add up.
_UNDERSTOOD = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "target_parameters",
    "task_type",
    "use_rslora",
}
_HARMLESS_INITS = (True, False, "gaussian")


def check_adapter(folder: Path) -> dict[str, Any]:
    """Read an adapter's configuration, and see that it is plain LoRA.

    Returns:
        The configuration as it stands in the file.

    Raises:
        UsageError: it trains something that cannot be told apart from the base, or computes something else than LoRA.
    """
    config = read_json(folder / ADAPTER_CONFIG)
    if config.get("peft_type") != "LORA":
        raise UsageError(f"adapter '{folder}' is {config.get('peft_type')}, not LORA", hint="merge it into its base")
    plain = LoraConfig()
    defaults = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
    odd = sorted(
        name
        for name, value in config.items()
        if name in defaults and name not in _UNDERSTOOD and value and value != defaults[name]
    )
    if config.get("init_lora_weights") in _HARMLESS_INITS:
        odd = [name for name in odd if name != "init_lora_weights"]
    if odd:
        settings = ", ".join(f"{name}: {config[name]}" for name in odd)
        raise UsageError(f"adapter '{folder}' is more than plain LoRA ({settings})", hint="merge it into its base")
    return config


def add_adapter(model: PreTrainedModel, lora: "LoraSection", *, seed: int) -> PeftModel:
    """Put a new adapter on a plain model; it starts as zero.

    Raises:
        UsageError: a target or a module to save is not there, or cannot be adapted.
    """
    config = _new_config(model, lora)
    with _peft_speaks_our_way(), _seeded(seed), _naming_targets(model, lora):
        return get_peft_model(model, config, adapter_name=TRAINED)


def stack_adapter(
    model: PreTrainedModel, folder: Path, lora: "LoraSection", *, seed: int
) -> tuple[PeftModel, tuple[str, ...]]:
    """Put a new adapter on top of an SFT adapter, which is frozen and becomes the reference.

    What the SFT adapter trained whole becomes part of the base, so that the reference has it too.

    Returns:
        The model with both adapters active, and the names of the modules that became part of the base.

    Raises:
        UsageError: the two adapters cannot be joined into one.
    """
    peft_model = load_adapter(model, folder, FROZEN, trainable=False)
    saved = _absorb_saved_modules(model, FROZEN)
    config = _new_config(model, lora)
    clash = sorted(name for name in saved for target in _targeted(model, config) if _is_at_or_under(target, name))
    if clash:
        raise UsageError(
            f"lora.target_modules includes {clash[0]}, which adapter '{folder}' trained whole",
            hint="leave it out, or name it in lora.modules_to_save",
        )
    with _peft_speaks_our_way(), _seeded(seed), _naming_targets(model, lora):
        peft_model.add_adapter(TRAINED, config)
        peft_model.active_adapter = TRAINED
        tuner: Any = peft_model.base_model
        tuner.set_adapter([FROZEN, TRAINED])
        tuner.set_requires_grad(FROZEN, False)
    if any(adapter.target_parameters for adapter in tuner.peft_config.values()):
        raise UsageError(
            f"adapter '{folder}' and the new one cannot be joined: experts are adapted",
            hint="set lora.start: continue, or train over a merged model",
        )
    return peft_model, saved


def continue_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Train an SFT adapter further, with a frozen copy of it as the reference."""
    peft_model = load_adapter(model, folder, TRAINED, trainable=True)
    add_frozen_adapter(peft_model, folder)
    return peft_model


def add_frozen_adapter(model: nn.Module, folder: Path) -> None:
    """Load the reference's adapter beside the one that is active in a `PeftModel`."""
    peft_model = cast(PeftModel, model)
    with _peft_speaks_our_way():
        peft_model.load_adapter(
            folder, FROZEN, is_trainable=False, torch_device=str(peft_model.device), low_cpu_mem_usage=False
        )
        peft_model.set_adapter(TRAINED)


def load_adapter(model: PreTrainedModel, folder: Path, name: str, *, trainable: bool) -> PeftModel:
    """Load an adapter and see that every one of its weights found its place.

    Raises:
        UsageError: the adapter belongs to another model, or brings weights of the base that differ from the base's.
    """
    check_adapter(folder)
    with reading(str(folder)):
        saved = load_file(folder / ADAPTER_WEIGHTS)
    before = {key: tensor.detach().clone() for key, tensor in _base_weights_among(saved, model).items()}
    with _peft_speaks_our_way(f"adapter '{folder}' does not fit its base model"):
        peft_model = PeftModel.from_pretrained(
            model, folder, adapter_name=name, is_trainable=trainable, torch_device=str(model.device)
        )
    placed = get_peft_model_state_dict(peft_model, adapter_name=name, save_embedding_layers=False)
    lost = sorted(placed.keys() - saved.keys()) or sorted(saved.keys() - placed.keys() - before.keys())
    if lost:
        raise UsageError(f"adapter '{folder}' does not fit its base model: '{lost[0]}' is on one side only")
    for key, tensor in before.items():
        if key not in placed and not torch.equal(saved[key].to(tensor), tensor):
            raise UsageError(f"adapter '{folder}' replaces '{key}' of its base model", hint="merge it into its base")
    return peft_model


def to_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Keep trainable parameters in float32, while the model goes on computing in `dtype` under autocast."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and TRAINED in module.modules_to_save:
            # An embedding or a norm is not autocast: without this the policy's residual stream would be float32
            # and the reference's not, so that they differed before the first step.
            own = module.modules_to_save[TRAINED]
            own.register_forward_hook(lambda _module, _inputs, output: output.to(dtype))
        elif is_adapted(module) and dtype != torch.float32:
            # peft would copy the input of every adapted layer to float32, and autograd would keep the copy; autocast
            # brings input and adapter to one dtype by itself.
            module.cast_input_dtype_enabled = False
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def unmatched_targets(model: PreTrainedModel, lora: "LoraSection") -> tuple[str, ...]:
    """Names in a recipe's targets that nothing in an adapted model has.

    Args:
        model: with the new adapter on it.
        lora: what was asked for.
    """
    if isinstance(lora.target_modules, str) or lora.start == "continue":
        return ()
    # peft drops the targets that it finds as an expert's parameter from its own list.
    left = cast(Any, model).peft_config[TRAINED].target_modules
    adapted = [name for name, module in model.named_modules() if is_adapted(module) and _has_new(module)]
    return tuple(t for t in lora.target_modules if t in left and not any(_ends_with(name, t) for name in adapted))


def _new_config(model: PreTrainedModel, lora: "LoraSection") -> LoraConfig:
    _check_names(model, lora)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=_whole(lora.lora_alpha),
        lora_dropout=lora.lora_dropout,
        target_modules=lora.target_modules,
        modules_to_save=lora.modules_to_save,
        use_rslora=lora.use_rslora,
        bias="none",
    )
    conv1d = [isinstance(bare(model.get_submodule(name)), Conv1D) for name in _targeted(model, config)]
    config.fan_in_fan_out = any(conv1d)
    return config


def _check_names(model: PreTrainedModel, lora: "LoraSection") -> None:
    names = [name for name, _ in model.named_modules()]
    for name in lora.modules_to_save or ():
        if not any(_ends_with(found, name) for found in names):
            raise UsageError(f"lora.modules_to_save: '{name}' is no module of this model", hint=_modules_hint(model))
    targets = [] if isinstance(lora.target_modules, str) else lora.target_modules
    _say_tied(model, [*(lora.modules_to_save or ()), *targets])


@contextmanager
def _naming_targets(model: PreTrainedModel, lora: "LoraSection") -> Iterator[None]:
    hint = _modules_hint(model)
    try:
        yield
    except NoMatchingPeftModuleError as error:
        targets = lora.target_modules
        named = targets if isinstance(targets, str) else ", ".join(targets)
        raise UsageError(f"lora.target_modules: nothing in this model is {named}", hint=hint) from error


def _say_tied(model: PreTrainedModel, touched: list[str]) -> None:
    if not getattr(model.config, "tie_word_embeddings", False):
        return
    split = sorted({name for name in names_of_ends(model) for touch in touched if _ends_with(name, touch)})
    if split:
        console.note(f"embedding and head are tied in this model; {', '.join(split)} gets weights of its own")


def _modules_hint(model: PreTrainedModel) -> str:
    return f"its linear layers are {', '.join(linear_layers(model))}"


def _has_new(module: LoraLayer) -> bool:
    return TRAINED in module.lora_A or TRAINED in module.lora_embedding_A


def _targeted(model: PreTrainedModel, config: LoraConfig) -> list[str]:
    """Names of the modules that a configuration would adapt."""
    head = ends_of(model)[1]
    found = []
    for name, module in model.named_modules():
        if ".lora_" in name or name.endswith(".base_layer"):
            continue
        if any(_is_at_or_under(name, saved) or _ends_with(name, saved) for saved in config.modules_to_save or ()):
            continue
        if config.target_modules == "all-linear":
            matches = isinstance(bare(module), (nn.Linear, Conv1D)) and module is not head
        else:
            matches = any(_ends_with(name, target) for target in config.target_modules or ())
        if matches:
            found.append(name)
    return found


def _absorb_saved_modules(model: PreTrainedModel, adapter: str) -> tuple[str, ...]:
    """Make what an adapter trained whole a plain part of the model."""
    wrappers = {name: m for name, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)}
    for name, wrapper in wrappers.items():
        model.set_submodule(name, wrapper.modules_to_save[adapter].requires_grad_(False))
    return tuple(wrappers)


def _base_weights_among(saved: Iterable[str], model: PreTrainedModel) -> dict[str, Tensor]:
    """Weights of the base that an adapter file carries besides its own, as peft does for resized embeddings."""
    own = dict(model.named_parameters())
    names = {key: key.removeprefix("base_model.model.").replace(".base_layer", "") for key in saved}
    return {key: own[name] for key, name in names.items() if name in own}


def _whole(number: float) -> Any:
    """The readers of peft's files expect a whole number to be written as one."""
    return int(number) if number == int(number) else number


def _ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def _is_at_or_under(name: str, parent: str) -> bool:
    return name == parent or name.startswith(f"{parent}.")


@contextmanager
def _peft_speaks_our_way(prefix: str = "lora") -> Iterator[None]:
    """Peft's warnings repeat what is checked here by name, and its errors become one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except (ValueError, TypeError, RuntimeError) as error:
            raise UsageError(f"{prefix}: {reason(error)}") from error


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Adapters are initialised on the CPU, from the recipe's seed and from nothing else."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield

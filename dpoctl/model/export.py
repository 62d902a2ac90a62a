"""Export of a trained model or adapter to files that transformers and peft load without dpoctl."""

import copy
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from dpoctl.errors import SetupError
from dpoctl.files import temporary_folder
from dpoctl.model.generate import stops_of
from dpoctl.model.integrity import EXPORT_MANIFEST, write_export_manifest
from dpoctl.model.modules import is_adapted, last_name
from dpoctl.model.policy import Policy
from dpoctl.model.sharding import Sharding
from dpoctl.model.source import ADAPTER_CONFIG, ADAPTER_WEIGHTS, GENERATION_CONFIG

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

_CONFIGS = ("config.json", ADAPTER_CONFIG)
# A manifest that is older than the weights beside it tells that an export was interrupted.
_LAST = {EXPORT_MANIFEST: 1, **dict.fromkeys(_CONFIGS, 2)}
_PREFIX = "base_model.model."
_LAYER = re.compile(r".*?\.\d+\.|.*")
"""The start of a weight's name up to the number of its layer; all of it outside of the layers."""
FILE_BYTES = 5 * 10**9
"""The size of a weight file of a sharded model, and so the host memory that writing it takes."""
Whole = Callable[[Tensor], Tensor]


def export_model(
    policy: Policy,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sharding: Sharding | None = None,
    writes: bool = True,
    base_weights: str | None = None,
) -> None:
    """Save weights, configuration, generation settings, tokenizer and chat template, and a manifest of them.

    Files are written to a folder beside the target and renamed into it: the weights first, the configuration last.

    Args:
        policy: the policy.
        folder: takes the files.
        tokenizer: its tokenizer.
        sharding: the division of the policy over the ranks, which then all call this.
        writes: whether this rank writes.
        base_weights: the fingerprint of the weights of an adapter's base.

    Raises:
        SetupError: something in the folder is in the way.
    """
    whole: Whole = Tensor.detach if sharding is None else sharding.whole
    if not writes:
        # A sharded policy is gathered by all ranks, tensor by tensor.
        if sharding is not None:
            for _ in _gathered(policy, whole):
                pass
        return
    folder.mkdir(parents=True, exist_ok=True)
    with temporary_folder(folder / "export") as staging:
        if policy.kind == "lora":
            _save_adapter(policy, staging, dict(_gathered(policy, whole)))
        elif sharding is None:
            policy.causal.save_pretrained(staging, state_dict=_cast(policy.causal.state_dict(), policy.dtype))
        else:
            _save_in_files(policy, staging, _gathered(policy, whole))
        if policy.kind == "full":
            _save_config(policy, staging)
        tokenizer.save_pretrained(staging)
        save_generation_settings(policy.causal, staging, tokenizer)
        make_weights_readable(staging)
        write_export_manifest(staging, base_weights)
        for file in sorted(staging.iterdir(), key=lambda file: (_LAST.get(file.name, 0), file.name)):
            _move(file, folder / file.name)


def _move(file: Path, target: Path) -> None:
    try:
        file.replace(target)
    except OSError as error:
        raise SetupError(
            f"{target} cannot be written: {error.strerror}", hint="remove what is there, then continue with --resume"
        ) from error


def save_generation_settings(causal: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Save the generation settings of a model, with every token that ends a turn in training.

    The model's own settings may not name the end-of-turn token of a chat template that training brought along.
    """
    own = getattr(causal, "generation_config", None)
    settings = {} if own is None else json.loads(own.to_json_string(use_diff=True))
    stops = list(stops_of(causal, tokenizer))
    settings |= {"eos_token_id": stops[0] if len(stops) == 1 else stops, "pad_token_id": tokenizer.pad_token_id}
    # Not saved by transformers, which refuses to save some settings that it loads.
    known = {name: value for name, value in settings.items() if value not in (None, [])}
    (folder / GENERATION_CONFIG).write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")


def make_weights_readable(folder: Path) -> None:
    """Give weight files the permissions of the configuration; safetensors writes them for their owner only."""
    (config, *_) = (folder / name for name in _CONFIGS if (folder / name).exists())
    for file in folder.glob("*.safetensors"):
        shutil.copymode(config, file)


def _gathered(policy: Policy, whole: Whole) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors to save, one at a time and in `policy.dtype`: of an adapter its own, else all of the model."""
    seen: set[int] = set()
    for name, tensor in policy.model.state_dict(keep_vars=True).items():
        if policy.kind == "lora":
            adapters = (*policy.active, *policy.taken_out)
            if any(f".{adapter}." in f"{name}." for adapter in adapters) or _is_saved(policy, name):
                yield name, whole(tensor)
        # A tied weight is saved under its first name.
        elif id(tensor) not in seen:
            seen.add(id(tensor))
            plain = tensor.detach()
            # In the lower precision half as much is gathered.
            yield name, whole(plain.to(policy.dtype) if plain.is_floating_point() else plain)


def _is_saved(policy: Policy, name: str) -> bool:
    """Whether a tensor belongs to a module that an SFT adapter trained whole."""
    return name.removeprefix(_PREFIX).startswith(tuple(f"{module}." for module in policy.saved_modules))


def _save_in_files(policy: Policy, folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Save a whole model file by file, of which one at a time is in host memory."""
    # Configuration and code, without weights.
    policy.causal.save_pretrained(folder, state_dict={})
    for file in folder.glob("*.safetensors"):
        file.unlink()
    part: dict[str, Tensor] = {}
    weight_map: dict[str, int] = {}
    number, size, total = 1, 0, 0
    for name, tensor in _as_stored(policy.causal, tensors):
        if part and size + tensor.nbytes > FILE_BYTES:
            save_file(part, folder / _file_name(number), metadata={"format": "pt"})
            part, number, size = {}, number + 1, 0
        part[name] = tensor.to("cpu", copy=True).contiguous()
        weight_map[name] = number
        size, total = size + tensor.nbytes, total + tensor.nbytes
    save_file(part, folder / _file_name(number), metadata={"format": "pt"})
    if number == 1:
        (folder / _file_name(1)).rename(folder / "model.safetensors")
        return
    index = {"metadata": {"total_size": total}, "weight_map": {name: _file_name(at) for name, at in weight_map.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _as_stored(causal: PreTrainedModel, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield weights under the names and in the shapes of the architecture's files, on the CPU, layer by layer.

    A layer may compute with all its experts in one tensor, where the files have a tensor for each of them.
    """
    ignored = causal._keys_to_ignore_on_save or ()
    kept = ((name, tensor.cpu()) for name, tensor in tensors if name not in ignored)
    for _, layer in groupby(kept, key=lambda item: _LAYER.findall(item[0])[0]):
        yield from revert_weight_conversion(causal, dict(layer)).items()


def _file_name(number: int) -> str:
    return f"model-{number:05d}.safetensors"


def _save_config(policy: Policy, folder: Path) -> None:
    """Save the configuration of a whole model in `policy.dtype`, with the values that training changed restored."""
    config = copy.deepcopy(policy.causal.config)
    for name, value in {**policy.original_config, "dtype": policy.dtype}.items():
        setattr(config, name, value)
    config.save_pretrained(folder)


def _save_adapter(policy: Policy, folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Save one adapter over the base model: the trained one, joined with a frozen one under it, or less its own start.

    Args:
        policy: the policy.
        folder: takes the files.
        tensors: all tensors of its adapters, and of modules that they trained whole, by their names in `policy.model`.
    """
    if len(policy.active) > 1 or policy.taken_out:
        config, state = _joined(policy, tensors)
    else:
        trained = policy.active[0]
        config = copy.deepcopy(_peft(policy).peft_config[trained])
        if not config.target_parameters:
            adapted = {name for name, m in policy.causal.named_modules() if is_adapted(m) and trained in m.scaling}
            config.target_modules = _shortest_names(policy.causal, adapted)
        state = _adapter_state(policy, tensors)
    # The names say it all.
    config.layers_to_transform = None
    config.inference_mode = True
    config.init_lora_weights = True
    config.base_model_name_or_path = policy.base
    config.revision = policy.base_revision
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Cast floating-point tensors; tied weights stay one tensor, or transformers would save both."""
    done: dict[tuple[int, torch.Size], Tensor] = {}
    for tensor in tensors.values():
        key = (tensor.data_ptr(), tensor.shape)
        if key not in done:
            done[key] = tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach()
    return {name: done[tensor.data_ptr(), tensor.shape] for name, tensor in tensors.items()}


def _joined(policy: Policy, tensors: Mapping[str, Tensor]) -> tuple["LoraConfig", dict[str, Tensor]]:
    """Concatenate the factors of all active adapters: the sum of two updates is one update of the summed rank.

    An update that was taken out of the base counts negative: the joined one is over the base as it was. B is multiplied
    by the scale, so ranks, alphas and rsLoRA may differ between adapters and between layers.
    """
    signs = dict.fromkeys(policy.active, 1.0) | dict.fromkeys(policy.taken_out, -1.0)
    layers = {
        name: _joined_layer(module, signs, f"{_PREFIX}{name}.", tensors)
        for name, module in policy.causal.named_modules()
        if is_adapted(module)
    }
    state = {f"{_PREFIX}{name}.{part}": tensor for name, parts in layers.items() for part, tensor in parts.items()}
    ranks = {name: next(t.shape[0] for part, t in parts.items() if "_A" in part) for name, parts in layers.items()}
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in ranks.items() if rank != common}

    trained = policy.active[-1]
    config = copy.deepcopy(_peft(policy).peft_config[trained])
    state |= _saved_modules(policy, tensors)
    config.r, config.lora_alpha, config.use_rslora = common, common, False
    config.rank_pattern, config.alpha_pattern = dict(others), dict(others)
    config.target_modules = _shortest_names(policy.causal, set(layers))
    config.modules_to_save = sorted({*(config.modules_to_save or ()), *policy.saved_modules}) or None
    config.fan_in_fan_out = any(_peft(policy).peft_config[name].fan_in_fan_out for name in policy.active)
    return config, state


def _joined_layer(
    layer: "LoraLayer", signs: Mapping[str, float], prefix: str, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    factor = {name: sign * layer.scaling[name] for name, sign in signs.items() if name in layer.scaling}
    linear = [name for name in factor if name in layer.lora_A]
    if linear:
        a = [tensors[f"{prefix}lora_A.{name}.weight"] for name in linear]
        b = [tensors[f"{prefix}lora_B.{name}.weight"] * factor[name] for name in linear]
        return {"lora_A.weight": torch.cat(a, dim=0), "lora_B.weight": torch.cat(b, dim=1)}
    embedding = [name for name in factor if name in layer.lora_embedding_A]
    a = [tensors[f"{prefix}lora_embedding_A.{name}"] for name in embedding]
    b = [tensors[f"{prefix}lora_embedding_B.{name}"] * factor[name] for name in embedding]
    return {"lora_embedding_A": torch.cat(a, dim=0), "lora_embedding_B": torch.cat(b, dim=1)}


def _saved_modules(policy: Policy, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the modules that either adapter trained whole; if both did, the copy of the trained adapter."""
    saved = {name: tensor for name, tensor in _adapter_state(policy, tensors).items() if ".lora_" not in name}
    for module in policy.saved_modules:
        prefix = f"{_PREFIX}{module}."
        if not any(key.startswith(prefix) for key in saved):
            saved |= {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return saved


def _adapter_state(policy: Policy, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the trained adapter under peft's names."""
    from peft import get_peft_model_state_dict  # noqa: PLC0415 - peft takes a second to import

    state: dict[str, Tensor] = get_peft_model_state_dict(
        policy.model, state_dict=dict(tensors), adapter_name=policy.active[-1], save_embedding_layers=False
    )
    return state


def _shortest_names(model: nn.Module, targeted: set[str]) -> list[str]:
    """Return last name components, such as `q_proj`, if they match these modules only, else full names."""
    last = {last_name(name) for name in targeted}
    inside = tuple(f"{name}." for name in targeted)
    matched = {name for name, _ in model.named_modules() if last_name(name) in last and not name.startswith(inside)}
    return sorted(last if matched == targeted else targeted)


def _peft(policy: Policy) -> Any:
    return policy.model

"""The files of a model on disk: those that hold its weights, fingerprints of them, and the manifest of an export.

A checksum covers every byte of a file: one changed weight is found for certain. xxh3 reads as fast as memory delivers,
so that this costs less than to load the model; it finds damage and other weights, and is no proof against forgery.
"""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from dpoctl import console
from dpoctl.errors import SetupError
from dpoctl.files import checksum, to_json, write_atomically
from dpoctl.model.source import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    ModelSource,
    base_of,
    find_adapter,
    first_line,
    read_json,
)

EXPORT_MANIFEST = "model_manifest.json"
"""The file of an exported model with the checksums of the others."""
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FORMAT = 1
# Values that do not change what a model computes.
_PROVENANCE = {
    *("_name_or_path", "transformers_version", "architectures", "use_cache"),
    *("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping"),
}
_COPY_AGAIN = "copy it again"
_LAYER = re.compile(r"\.(\d+)\.")
_MASK = re.compile(r"(^|\.)(attn|attention|crossattention)\.(masked_)?bias$")
"""Causal masks that old checkpoints hold; they are not vectors, as biases are."""
_DEPTHS = {"num_hidden_layers", "n_layer", "n_layers", "num_layers"}


class _Held(NamedTuple):
    """A tensor in a file of weights."""

    file: str
    shape: tuple[int, ...]
    dtype: str


def weight_files(source: ModelSource) -> list[Path]:
    """Return the files that a model's weights are read from; none for a hub model without safetensors.

    Raises:
        SetupError: there are none in a folder, or its index is damaged or names files that are not there.
    """
    entry = _entry(source)
    if entry is not None:
        return _shards(source, entry) if _is_index(entry) else [entry]
    if source.is_local:
        raise SetupError(
            f"model '{source.name}' cannot be loaded: it has no {WEIGHTS}",
            hint="save it with safetensors: pickled weights are never opened",
        )
    return []


def check_weights(source: ModelSource, build: Callable[[], PreTrainedModel]) -> None:
    """Compare the headers of a model's files with its configuration, before memory is taken for its weights.

    Args:
        source: the model.
        build: builds it on the meta device; called once the number of its layers is known to be right.

    Raises:
        SetupError: a file is damaged, index and files disagree, or a weight has another shape or kind of number.
    """
    held: dict[str, _Held] = {}
    for file in weight_files(source):
        for name, about in _headers(source, file).items():
            if name in held:
                raise SetupError(
                    f"model '{source.name}' cannot be loaded: both {held[name].file} and {file.name} hold '{name}'",
                    hint="copy the whole model again",
                )
            held[name] = about
    if not held:
        return
    _check_index(source, {name: about.file for name, about in held.items()})
    config = read_json(_config_file(source))
    _check_layers(source, config, held)
    if "quantization_config" in config:
        return  # packed in other shapes
    model = build()
    expected = model.state_dict()
    placed = _places(source, model.base_model_prefix, held, expected)
    for name, place in placed.items():
        _check_tensor(source, name, held[name], expected[place])
    if expected.keys() - placed.values() <= set(model.all_tied_weights_keys):
        # Nothing is left that transformers could make from the others.
        _refuse_unused(source, model, {name: held[name] for name in held.keys() - placed.keys()})


def fingerprint_model(source: ModelSource) -> dict[str, str]:
    """Return fingerprints of a model's configuration, with code that comes with it, and of its weights."""
    config = _config_file(source)
    about: dict[str, Any] = {"config": _settings(read_json(config))}
    if source.trust_remote_code:
        about["code"] = _checksums(sorted(config.parent.glob("*.py")))
    # The snapshot of a hub model whose files are not those of safetensors is named by its commit.
    weights = _checksums(weight_files(source)) or {"commit": config.parent.name}
    return {"config": _digest(about), "weights": _digest(weights)}


def fingerprint_adapter(adapter: Path) -> str:
    """Return a fingerprint of an adapter's settings and weights."""
    return _digest([_settings(read_json(adapter / ADAPTER_CONFIG)), _checksums([adapter / ADAPTER_WEIGHTS])])


def fingerprint_all(source: ModelSource) -> str:
    """Return one fingerprint of everything that a model, or an adapter with its base, computes with."""
    adapter = find_adapter(source)
    if adapter is None:
        return _digest(fingerprint_model(source))
    base = base_of(adapter, trust_remote_code=source.trust_remote_code)
    return _digest([fingerprint_adapter(adapter), fingerprint_model(base)])


def write_export_manifest(folder: Path, base: str | None = None) -> None:
    """Write the checksums of all files of an exported model.

    Args:
        folder: holds the export, and nothing else.
        base: the fingerprint of the weights of an adapter's base model.
    """
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    files = {name: {"size": (folder / name).stat().st_size, "xxh3_128": checksum(folder / name)} for name in names}
    body = {"format": FORMAT, "base_weights": base, "files": files}
    write_atomically(folder / EXPORT_MANIFEST, to_json({**body, "checksum": _digest(body)}))


def verify_export(source: ModelSource) -> None:
    """Compare an exported model with its manifest; a model that dpoctl did not export has none.

    Weights must be those that were exported. Other files may be edited on purpose: of those a difference is said.

    Raises:
        SetupError: a file of weights, or the manifest itself, is damaged or has been replaced.
    """
    adapter = find_adapter(source)
    used = [adapter / ADAPTER_WEIGHTS] if adapter is not None else weight_files(source)
    if not used or not (used[0].parent / EXPORT_MANIFEST).is_file():
        return
    folder = used[0].parent
    manifest = _read_manifest(folder)
    replaced = f"copy the model again; if you changed it on purpose, delete {folder / EXPORT_MANIFEST}"
    expected, weights = manifest["files"], {file.name for file in used}
    for name in sorted(weights - expected.keys()):
        raise SetupError(f"{folder / name} is not a file of the exported model", hint=replaced)
    changed = [name for name, about in sorted(expected.items()) if _differs(folder / name, about)]
    for name in changed:
        if name in weights or name.endswith(".safetensors"):
            raise SetupError(f"{folder / name} is damaged: it is not what the run exported", hint=replaced)
    if changed:
        console.warn(f"{folder}: changed since the model was exported: {', '.join(changed)}")
    if adapter is not None and manifest["base_weights"] is not None:
        base = base_of(adapter, trust_remote_code=source.trust_remote_code)
        if fingerprint_model(base)["weights"] != manifest["base_weights"]:
            console.warn(
                f"adapter '{folder}' was trained on other weights than those of its base '{base.name}' today: "
                "it computes something else than in training"
            )


def _entry(source: ModelSource) -> Path | None:
    """Return the file from which transformers starts to read the weights: they, or an index of files of them."""
    config = _config_file(source)
    named = read_json(config).get("transformers_weights")
    names = [name for name in (named, WEIGHTS, INDEX) if isinstance(name, str)]
    # What a hub model has on this machine needs no question to the hub.
    here = [path for name in names if (path := config.parent / name).is_file()]
    return here[0] if here else next(filter(None, map(source.file, names)), None)


def _is_index(entry: Path) -> bool:
    return entry.name.endswith(".index.json")


def _shards(source: ModelSource, index: Path) -> list[Path]:
    places = _weight_map(source, index)
    found = []
    for name in sorted(set(places.values())):
        is_plain, here = Path(name).name == name, index.parent / name
        path = here if is_plain and here.is_file() else source.file(name) if is_plain else None
        if path is None:
            raise SetupError(
                f"model '{source.name}' cannot be loaded: {index.name} names the file '{name}', which is not there",
                hint="copy the whole model again",
            )
        found.append(path)
    return found


def _weight_map(source: ModelSource, index: Path) -> dict[str, str]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise SetupError(
            f"model '{source.name}' cannot be loaded: weight_map in {index.name} does not name a file for each weight",
            hint=_COPY_AGAIN,
        )
    return places


def _check_index(source: ModelSource, places: Mapping[str, str]) -> None:
    index = _entry(source)
    if index is None or not _is_index(index):
        return
    wanted = _weight_map(source, index)
    for name in sorted(wanted.keys() | places.keys()):
        if wanted.get(name) != places.get(name):
            raise SetupError(
                f"model '{source.name}' cannot be loaded: {index.name} has the weight '{name}' in "
                f"{wanted.get(name, 'no file')}, and it is in {places.get(name, 'none of its files')}",
                hint="copy the whole model again",
            )


def _places(source: ModelSource, prefix: str, held: Iterable[str], expected: Collection[str]) -> dict[str, str]:
    """Return the weight of the model that each tensor is for, by name; transformers adds or removes a prefix."""
    placed: dict[str, str] = {}
    for name in held:
        found = next((n for n in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")) if n in expected), None)
        if found is None:
            continue
        if found in placed.values():
            twin = next(other for other, place in placed.items() if place == found)
            raise SetupError(
                f"model '{source.name}' cannot be loaded: '{twin}' and '{name}' are two values of one weight",
                hint=_COPY_AGAIN,
            )
        placed[name] = found
    return placed


def _refuse_unused(source: ModelSource, model: PreTrainedModel, unused: Mapping[str, _Held]) -> None:
    """Refuse tensors for which a model has no place: its configuration belongs to another one."""
    # Some patterns of transformers, such as `attn.bias`, are true of more names than they are meant for.
    further = [key for key in model._keys_to_ignore_on_load_unexpected or () if "layers" in key or "mtp" in key]
    refuse_unused(
        source,
        type(model).__name__,
        [
            name
            for name, about in unused.items()
            if not (_MASK.search(name) and len(about.shape) != 1)
            and not name.endswith("rotary_emb.inv_freq")
            and not any(re.search(pattern, name) for pattern in further)
        ],
    )


def refuse_unused(source: ModelSource, kind: str, names: Iterable[str]) -> None:
    """Refuse a model whose files hold weights for which it has no place.

    Raises:
        SetupError: there is such a weight.
    """
    unused = sorted(names)
    if unused:
        more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        raise SetupError(
            f"model '{source.name}': its files hold the weight '{unused[0]}'{more}, "
            f"for which there is no place in the {kind} that its config.json describes",
            hint="copy config.json again, or save the model without them",
        )


def _check_tensor(source: ModelSource, name: str, held: _Held, expected: Tensor) -> None:
    if held.shape != tuple(expected.shape):
        raise SetupError(
            f"model '{source.name}' cannot be loaded: '{name}' has shape {list(held.shape)} in {held.file}, "
            f"and {list(expected.shape)} by config.json",
            hint="copy config.json again",
        )
    if expected.is_floating_point() and not held.dtype.startswith(("F", "BF")):
        raise SetupError(
            f"model '{source.name}' cannot be loaded: '{name}' in {held.file} has numbers of type {held.dtype}, "
            "and weights are floating-point numbers",
            hint="give its unquantised weights",
        )


def _check_layers(source: ModelSource, config: Mapping[str, Any], held: Iterable[str]) -> None:
    """Refuse a number of layers that the files cannot hold: to build a million of them would take hours."""
    there = max((int(layer[1]) + 1 for name in held if (layer := _LAYER.search(name))), default=0)
    nested = config.get("text_config")
    for settings in (config, nested if isinstance(nested, dict) else {}):
        for key in _DEPTHS & settings.keys():
            wanted = settings[key]
            if isinstance(wanted, int) and there and not 0 < wanted <= there:
                raise SetupError(
                    f"model '{source.name}' cannot be loaded: {key} in config.json is {wanted}, "
                    f"and its files hold {there} layers",
                    hint="copy config.json again",
                )


def _headers(source: ModelSource, file: Path) -> dict[str, _Held]:
    """Return the shape and type of each tensor in a file."""
    try:
        with safe_open(file, framework="pt") as opened:
            parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
            return {name: _Held(file.name, tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise SetupError(
            f"model '{source.name}' cannot be loaded: {file.name} is damaged: {first_line(error)}", hint=_COPY_AGAIN
        ) from error


def _config_file(source: ModelSource) -> Path:
    config = source.file("config.json")
    if config is None:
        raise SetupError(f"model '{source.name}' has no config.json", hint="copy the whole model again")
    return config


def _read_manifest(folder: Path) -> dict[str, Any]:
    content = read_json(folder / EXPORT_MANIFEST)
    stated = content.pop("checksum", None)
    if stated != _digest(content) or content.get("format") != FORMAT:
        raise SetupError(
            f"{folder / EXPORT_MANIFEST} is damaged",
            hint="copy the model again; without this file, nothing tells whether the model is what the run exported",
        )
    return content


def _differs(file: Path, expected: Mapping[str, Any]) -> bool:
    try:
        is_whole = file.stat().st_size == expected["size"]
        return not is_whole or _checksums([file])[file.name] != expected["xxh3_128"]
    except OSError:
        return True


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in _PROVENANCE}


def _checksums(files: Iterable[Path]) -> dict[str, str]:
    found = {}
    with console.WorkProgress("checking the files of the model", unit="files") as progress:
        for file in files:
            stat = file.stat()
            found[file.name] = _checksum(file, (stat.st_size, stat.st_mtime_ns, stat.st_ino))
            progress.advance()
    return found


@cache
def _checksum(file: Path, identity: tuple[int, ...]) -> str:
    """Return the checksum of a file; one that has not changed is read once in a process."""
    return checksum(file)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]

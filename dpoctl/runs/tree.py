"""Nested data with tensors in it, as one safetensors file and one JSON file.

Dicts, lists, tuples, numbers, strings and None come back with their types, tensors with their bits. Nothing is pickled,
so reading a tree runs no code. In the JSON a one-entry object whose key starts with `$` stands for what JSON lacks.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from dpoctl.runs.files import sync, write_atomically


def write_tree(folder: Path, name: str, tree: Any) -> list[str]:
    """Write a tree and force it onto the disk.

    Returns:
        The names of the files written: `name.json`, and `name.safetensors` where the tree holds tensors.

    Raises:
        TypeError: The tree holds something that is neither plain data nor a tensor.
    """
    tensors: dict[str, Tensor] = {}
    plain = _Encoder(tensors).encode(tree, ())
    names = [f"{name}.json"]
    write_atomically(folder / names[0], json.dumps(plain, allow_nan=False))
    if tensors:
        names.append(f"{name}.safetensors")
        save_file(tensors, folder / names[1])
        shutil.copymode(folder / names[0], folder / names[1])  # safetensors lets nobody but the owner read
        sync(folder / names[1])
    return names


def read_tree(folder: Path, name: str) -> Any:
    """Read back what `write_tree` wrote; tensors are on the CPU and belong to the caller."""
    file = folder / f"{name}.safetensors"
    # A clone does not depend on the file any more, and is aligned as a tensor that was never saved would be.
    tensors = {key: value.clone() for key, value in load_file(file).items()} if file.exists() else {}
    return _decode(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")), tensors)


def tree_bytes(tree: Any) -> int:
    """Bytes of the tensors in a tree: about what it takes on disk."""
    if isinstance(tree, Tensor):
        return tree.nbytes
    if isinstance(tree, dict):
        return sum(map(tree_bytes, tree.values()))
    if isinstance(tree, list | tuple):
        return sum(map(tree_bytes, tree))
    return 0


def copy_tree(tree: Any, copies: dict[Any, Tensor]) -> Any:
    """A copy of a tree with its tensors on the host; a tensor that stands there twice is one in the copy too.

    Args:
        tree: Plain data and tensors.
        copies: The copies made so far, to which this adds.
    """
    if isinstance(tree, Tensor):
        identity = _identity(tree)
        if identity not in copies or not tree.numel():
            copies[identity] = tree.detach().to("cpu", copy=True)
        return copies[identity]
    if isinstance(tree, dict):
        return {key: copy_tree(value, copies) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(copy_tree(value, copies) for value in tree)
    return tree


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.data_ptr(), tensor.device, tensor.dtype, tuple(tensor.shape), tensor.stride())


class _Encoder:
    """Moves the tensors of a tree into a dict, and leaves their names behind."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.names: dict[tuple[Any, ...], str] = {}
        self.storages: set[int] = set()

    def encode(self, value: Any, path: tuple[str, ...]) -> Any:
        if isinstance(value, Tensor):
            return {"$tensor": self.name_of(value, "/".join(path) or "value")}
        if isinstance(value, float) and not math.isfinite(value):
            return {"$float": repr(value)}
        if value is None or isinstance(value, str | int | float):
            return value
        if isinstance(value, tuple):
            return {"$tuple": [self.encode(item, (*path, str(i))) for i, item in enumerate(value)]}
        if isinstance(value, list):
            return [self.encode(item, (*path, str(i))) for i, item in enumerate(value)]
        if isinstance(value, dict):
            items = [(key, self.encode(item, (*path, str(key)))) for key, item in value.items()]
            if all(isinstance(key, str) and not key.startswith("$") for key in value):
                return dict(items)
            return {"$items": [[self.encode(key, path), item] for key, item in items]}
        raise TypeError(f"{'/'.join(path)}: a {type(value).__name__} cannot be saved without pickle")

    def name_of(self, tensor: Tensor, wanted: str) -> str:
        # Optimizers share tensors between parameters (quantization maps); one copy is written, and one comes back.
        identity = _identity(tensor)
        if tensor.numel() and identity in self.names:
            return self.names[identity]
        name = wanted
        while name in self.tensors:
            name += "_"
        self.names[identity] = name
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage().data_ptr()
        self.tensors[name] = plain.clone() if storage in self.storages else plain  # safetensors refuses views
        self.storages.add(storage)
        return name


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    match list(value.items()):
        case [("$tensor", name)]:
            return tensors[name]
        case [("$float", number)]:
            return float(number)
        case [("$tuple", items)]:
            return tuple(_decode(item, tensors) for item in items)
        case [("$items", pairs)]:
            return {_decode(key, tensors): _decode(item, tensors) for key, item in pairs}
    return {key: _decode(item, tensors) for key, item in value.items()}

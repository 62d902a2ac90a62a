"""Nested data with tensors, as one safetensors file and one JSON file.

Dicts, lists, tuples, numbers, strings and None keep their types, tensors their bits. Nothing is pickled, so reading a
tree runs no code. In the JSON file, an object with one key that starts with `$` encodes what JSON does not have.
"""

import json
import math
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dpoctl.files import sync, write_atomically


def write_tree(folder: Path, name: str, tree: Any) -> list[str]:
    """Write a tree and sync it to disk.

    Returns:
        The names of the written files: `name.json`, and `name.safetensors` if the tree has tensors.

    Raises:
        TypeError: The tree has a value that is neither plain data nor a tensor.
    """
    tensors: dict[str, Tensor] = {}
    plain = _Encoder(tensors).encode(tree, ())
    names = [f"{name}.json"]
    write_atomically(folder / names[0], json.dumps(plain, allow_nan=False))
    if tensors:
        names.append(f"{name}.safetensors")
        save_file(tensors, folder / names[1])
        shutil.copymode(folder / names[0], folder / names[1])  # safetensors makes the file readable by its owner only
        sync(folder / names[1])
    return names


def read_tree(folder: Path, name: str) -> Any:
    """Read what `write_tree` wrote; the tensors are on the CPU and belong to the caller."""
    file = folder / f"{name}.safetensors"
    # A clone does not depend on the file, and has the alignment of a tensor that was never saved.
    tensors = {key: value.clone() for key, value in load_file(file).items()} if file.exists() else {}
    return _decode(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")), tensors)


def read_rows(folder: Path, names: Sequence[str], index: int, parts: int) -> Any:
    """Read a part of a tree that was written in another number of parts; each holds some rows of every tensor.

    Args:
        folder: The folder of the files.
        names: The trees of the stored parts, in the order of their rows.
        index: The part to read.
        parts: The number of parts that all rows are divided into; they are of the same size, apart from the last ones.

    Raises:
        ValueError: A tensor cannot be divided by rows: the state of an 8-bit optimizer.
    """
    with ExitStack() as stack:
        trees = []
        for name in names:
            file = folder / f"{name}.safetensors"
            stored = stack.enter_context(safe_open(file, "pt")) if file.exists() else None
            text = (folder / f"{name}.json").read_text(encoding="utf-8")
            trees.append(_decode(json.loads(text), _Slices(stored)))
        return _joined(trees, index, parts)


def tree_bytes(tree: Any) -> int:
    """Return the bytes of the tensors in a tree: about its size on disk."""
    if isinstance(tree, Tensor):
        return tree.nbytes
    if isinstance(tree, dict):
        return sum(map(tree_bytes, tree.values()))
    if isinstance(tree, list | tuple):
        return sum(map(tree_bytes, tree))
    return 0


def copy_tree(tree: Any, copies: dict[Any, Tensor]) -> Any:
    """Return a copy of a tree with its tensors on the CPU; a tensor that occurs twice is one tensor in the copy too.

    Args:
        tree: Plain data and tensors.
        copies: The copies made so far; new ones are added.
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
    """Moves the tensors of a tree into a dict, and puts their names in the tree."""

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
        # Optimizers share tensors between parameters (quantization maps); such a tensor is written once.
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


def _decode(value: Any, tensors: Any) -> Any:
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


class _Slices:
    """The tensors of an open file by name, unread."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __getitem__(self, name: str) -> "_Slice":
        return _Slice(self._file, name)


@dataclass(frozen=True)
class _Slice:
    """A tensor of an open file, of which some rows can be read."""

    file: Any
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.file.get_slice(self.name).get_shape())

    def read(self, start: int, stop: int) -> Tensor:
        rows: Tensor = self.file.get_slice(self.name)[start:stop]
        return rows.clone()

    def whole(self) -> Tensor:
        tensor: Tensor = self.file.get_tensor(self.name)
        return tensor.clone()


def _joined(values: Sequence[Any], index: int, parts: int) -> Any:
    """Join the same place of several trees. A part without rows of a parameter has no state for it."""
    first = values[0]
    if isinstance(first, _Slice):
        return _rows(values, index, parts)
    if isinstance(first, dict):
        keys = dict.fromkeys(key for value in values for key in value)
        return {key: _joined([value[key] for value in values if key in value], index, parts) for key in keys}
    if isinstance(first, list | tuple):
        return type(first)(_joined(items, index, parts) for items in zip(*values, strict=True))
    return first


def _rows(slices: Sequence[_Slice], index: int, parts: int) -> Tensor:
    """Return a part of the rows that several tensors hold together."""
    if not slices[0].shape:
        return slices[0].whole()
    starts = [0, *accumulate(stored.shape[0] for stored in slices)]
    size = -(-starts[-1] // parts)
    wanted = range(min(index * size, starts[-1]), min((index + 1) * size, starts[-1]))
    pieces = [
        stored.read(max(wanted.start, start) - start, min(wanted.stop, start + stored.shape[0]) - start)
        for stored, start in zip(slices, starts, strict=False)
        if max(wanted.start, start) < min(wanted.stop, start + stored.shape[0])
    ]
    rows = torch.cat(pieces) if pieces else slices[0].read(0, 0)
    if rows.dtype == torch.uint8:
        raise ValueError(
            "the state of an 8-bit optimizer cannot be divided anew; resume with the number of processes that wrote it"
        )
    return rows

"""Small checkpoints to save, to compare and to damage."""

from pathlib import Path
from typing import Any

import torch

from dpoctl.runs.checkpoint import Checkpoint, Saver


def small(step: int) -> Checkpoint:
    values = {"w": torch.full((8,), float(step)), "b": torch.tensor(step)}
    optimizer = {"state": {0: {"step": torch.tensor(1.0), "m": torch.ones(8) * step}}, "param_groups": [{"lr": 0.1}]}
    return Checkpoint(step, values, optimizer, {"python": (3, (1, 2), None)}, {"step was": step})


def save(checkpoints: Path, checkpoint: Checkpoint, **options: Any) -> Path:
    """Write a checkpoint, wait for it, and return its folder; every rank calls this at the same step."""
    saver = Saver(checkpoints, **options)
    saver.save(checkpoint)
    saver.wait()
    return checkpoints / f"step-{checkpoint.step:06d}"


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def tree_equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(tree_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(tree_equal, a, b))
    return bool(a == b)


def flip(file: Path, offset: int) -> None:
    content = bytearray(file.read_bytes())
    content[offset] ^= 1
    file.write_bytes(bytes(content))

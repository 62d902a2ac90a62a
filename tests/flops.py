"""Counted work: the FLOPs and the largest sum of live tensor bytes of a piece of code, whatever the clock says."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import finalize

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten
Shape = tuple[int, ...]


def seen_keys(queries: int, keys: int, causal: bool) -> int:
    """Pairs of a query and a key that a kernel multiplies; both end at the same position where it is causal."""
    if not causal:
        return queries * keys
    hidden = min(queries, keys)
    return queries * keys - hidden * (hidden - 1) // 2


def _forward(query: Shape, key: Shape, value: Shape, dropout: float = 0.0, causal: bool = False, **_: Any) -> int:
    batch, heads, queries, width = query
    return 2 * batch * heads * seen_keys(queries, key[2], causal) * (width + value[3])


def _backward(
    grad: Shape, query: Shape, key: Shape, value: Shape, out: Shape, lse: Shape, dropout: float, causal: bool, **_: Any
) -> int:
    # Scores once more, then the gradients of values, weights, queries and keys.
    batch, heads, queries, width = query
    return 2 * batch * heads * seen_keys(queries, key[2], causal) * (3 * width + 2 * value[3])


# What torch's own counter leaves out, or counts as if nothing were masked.
FORMULAS: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
}


@dataclass
class Work:
    """What was counted.

    Attributes:
        flops: two for a multiplication and an addition.
        peak_bytes: most bytes of tensors that were alive at once and were made meanwhile.
    """

    flops: int = 0
    peak_bytes: int = 0


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that operators make, for as long as these live; those of `known` are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: Any) -> None:
        identity = storage._cdata
        if identity in self.known or storage.nbytes() == 0:
            return
        self.known.add(identity)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        finalize(storage, self._forget, identity, storage.nbytes())

    def _forget(self, identity: int, size: int) -> None:
        self.known.discard(identity)
        self.live -= size


@contextmanager
def counted(*, memory: bool = True) -> Iterator[Work]:
    """Count FLOPs, and peak bytes too if wanted, of what runs inside; the figures are there afterwards."""
    work, live = Work(), LiveBytes()
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter, live if memory else nullcontext():
        yield work
    work.flops, work.peak_bytes = counter.get_total_flops(), live.peak

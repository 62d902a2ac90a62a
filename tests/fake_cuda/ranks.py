"""Ranks that are not there, for a sharded model: a process group that answers at once, and streams that run nothing."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import models
import torch
import torch.distributed as dist
from bitsandbytes.nn import modules as bitsandbytes
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group
from torch.testing._internal.distributed.fake_pg import FakeStore
from tracker import Tracker

from dpoctl.model.sharding import Gradients, Sharding


class Nothing:
    """A stream or an event: whatever is asked of it is done."""

    device = models.GPU

    def __init__(self, *_: Any, **__: Any) -> None:
        """Take anything."""

    def __getattr__(self, name: str) -> Callable[..., "Nothing"]:
        return lambda *_, **__: self


def join(count: int) -> None:
    """Become the first of some ranks, in a process that believes in a GPU."""
    if dist.is_initialized():
        return
    torch.cuda.Stream = torch.cuda.Event = torch.Event = Nothing  # type: ignore[misc,assignment]
    one = Nothing()
    for name in ("current_stream", "default_stream"):
        setattr(torch.cuda, name, lambda *_: one)
    torch.cuda.stream = lambda _: contextlib.nullcontext()  # type: ignore[assignment]
    torch.cuda.set_device = lambda _: None
    torch.Tensor.record_stream = lambda *_: None  # type: ignore[method-assign,assignment]
    # It would make a parameter of its own class, which cannot be a fake one.
    bitsandbytes.fix_4bit_weight_quant_state_from_module = _restore
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)


def divide(
    scorer: nn.Module, kind: str, count: int, fakes: FakeTensorMode, tracker: Tracker
) -> tuple[Iterator[tuple[str, nn.Parameter]], Callable[[float], Tensor]]:
    """Divide a scorer, as a run does.

    Returns:
        What the optimizer is given, and what clips the gradient.
    """
    join(count)
    sharding = Sharding(models.GPU, count, dtype=models.BF16 if kind == "full" else None)
    # Made before the fakes, which know no numbers of ranks.
    assert sharding.mesh.size() == count
    _watch_sizes(tracker)
    with fakes:
        sharding.divide(scorer)
    gradients = Gradients(sharding, [(name, p) for name, p in scorer.named_parameters() if p.requires_grad])
    return gradients.parts(), gradients.clip


def _watch_sizes(tracker: Tracker) -> None:
    """Let a tracker know when FSDP empties and fills what it gathers parameters in."""

    def watched(change: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        original: Callable[[Tensor], None] = getattr(change, "original", change)

        def changed(tensor: Tensor) -> None:
            original(tensor)
            tracker.resized(tensor.untyped_storage())

        vars(changed)["original"] = original
        return changed

    freeing, filling = watched(_fsdp_param.free_storage), watched(_fsdp_param.alloc_storage)
    _fsdp_param.free_storage = freeing
    _fsdp_param.alloc_storage = _fsdp_param_group.alloc_storage = filling


def _restore(layer: Any) -> None:
    vars(layer.weight).setdefault("quant_state", layer.quant_state)

"""The tracker, checked on what is known: waits that there are and waits that there are not, and another's peak."""

from collections.abc import Callable
from typing import Any

import models
import steps
import torch
from shim import PINNED
from tracker import Tracker, areas

RECORDS = [(5, [3, 4]), (1, [6]), (2, [1, 2, 3]), (0, [4])]
ON_GPU: dict[str, Any] = {"device": "cuda"}


def run() -> dict[str, Any]:
    """Return the waits that were seen in each snippet, areas beside counted ones, and two peaks."""
    return {
        "waiting": {name: waits(snippet) for name, snippet in WAITING.items()},
        "running on": {name: waits(snippet) for name, snippet in RUNNING_ON.items()},
        "areas": [[areas(RECORDS)(window), counted(window)] for window in (None, 1, 3, 100)],
        "peaks": peaks(),
    }


def waits(snippet: Callable[[Any], Any]) -> int:
    """Count the waits of a snippet, which is given a vector on the GPU."""
    tracker = Tracker()
    with models.world(), tracker:
        vector = torch.ones(8, **ON_GPU)
        tracker.restart()
        try:
            snippet(vector)
        except Exception as problem:
            # Among fakes it has no answer, and has been counted before.
            if not tracker.waits:
                raise AssertionError("no wait was seen") from problem
    return len(tracker.waits)


def _arrived(tensor: Any) -> Any:
    assert tensor.untyped_storage() in PINNED
    return tensor.to("cuda", non_blocking=True)


WAITING: dict[str, Callable[[Any], Any]] = {
    "a number": lambda v: v[0].item(),
    "a branch": lambda v: bool((v > 0).any()),
    "a mask as an index": lambda v: v[v > 0],
    "assigning under a mask": lambda v: v.index_put_((v > 0,), v[0]),
    "places": lambda v: v.nonzero(),
    "repeating an unknown number of times": lambda v: v.repeat_interleave(v.long()),
    "different values": lambda v: v.unique(),
    "numbers from the host": lambda v: torch.tensor([1.0, 2.0], **ON_GPU),
    "a copy to the GPU": lambda v: torch.ones(3).to("cuda"),
    "a copy of memory that is not pinned": lambda v: torch.ones(3).to("cuda", non_blocking=True),
    "a copy to the host": lambda v: v.cpu(),
    "a sum whose segments are checked": lambda v: torch.segment_reduce(v, "sum", lengths=v.long()),
    "a choice of a number on the host": lambda v: torch.where(v > 0, v, torch.zeros(())),
    "a copy into another tensor": lambda v: v.copy_(torch.ones(8)),
}
RUNNING_ON: dict[str, Callable[[Any], Any]] = {
    "arithmetic": lambda v: (v * 2 + torch.arange(8, **ON_GPU)).sum(),
    "a choice": lambda v: torch.where(v > 0, v, 0.0),
    "numbers as an index": lambda v: v[torch.arange(3, **ON_GPU)],
    "repeating a known number of times": lambda v: v.repeat_interleave(v.long(), output_size=8),
    "a copy of pinned memory": lambda v: _arrived(torch.ones(3).pin_memory()),
    "a sum whose segments are not checked": lambda v: torch.segment_reduce(v, "sum", lengths=v.long(), unsafe=True),
    "a number on the host": lambda v: v * torch.ones(()),
    "another dtype": lambda v: v.to(torch.bfloat16).float(),
}


def counted(window: int | None) -> int:
    """Pairs of a query and a key within the records, one by one."""
    total = 0
    for shared, suffixes in RECORDS:
        for number, suffix in enumerate(suffixes):
            keys = shared + suffix
            for query in range(0 if number == 0 else shared, keys):
                total += sum(window is None or query - key < window for key in range(query + 1))
    return total


def peaks() -> list[int]:
    """The peak of a small step here, and by torch's own `MemTracker`."""
    from torch.distributed._tools.mem_tracker import MemTracker

    changes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 8}
    found = []
    for theirs in (False, True):
        fakes = models.world()
        with models.fakes_count_as_parameters():
            policy = models.build(fakes, "llama", "full", **changes)
            scene = steps.prepare(fakes, policy, "full")
            if not theirs:
                found.append(steps.run(scene).peak_of_tensors)
                continue
            with fakes:
                tracker = MemTracker()
                batches = [batch.to(models.GPU) for batch in scene.batches]
                tracker.track_external(policy.model)
                with tracker:
                    scene.objective.backward(scene.step, scene.reader, steps.Meter(models.GPU), batches)
                snapshot = tracker.get_tracker_snapshot("peak")
                found.append(next(sizes["Total"] for device, sizes in snapshot.items() if device.type == "cuda"))
    return found

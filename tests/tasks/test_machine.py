"""What a machine is asked for: tokens of a micro-batch, and memory that stays."""

import platform
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dpoctl.tasks import machine

SCRIPT = """
import resource
from dpoctl.tasks.machine import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [bytearray(size << 20) for size in (24, 24, 24, 100)]
    del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
print(faults(), faults(), faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps memory in its own way")
def test_pages_come_from_the_system_once() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    first, *later = map(int, done.stdout.split())
    assert first > 40_000, "172 MB in pages of 4 kB"
    assert max(later) < first / 50


@pytest.mark.parametrize(
    ("device", "longest", "fitting", "expected"),
    [
        ("cpu", 1500, {0: 100_000}, (2048, 0)),
        ("cpu", 5000, {0: 100_000}, (2048, 0)),
        ("cpu", 1500, {0: 2500, 4: 2900, 2: 3100}, (2048, 2)),
        ("cuda", 1500, {0: 2500, 4: 2900, 2: 3100}, (3100, 2)),
        ("cuda", 1500, {0: 100_000}, (100_000, 0)),
        ("cpu", 1500, {0: 10, 4: 20, 2: 30, 1: 40}, (40, 1)),
    ],
)
def test_layers_are_recomputed_where_two_of_the_longest_records_do_not_fit_otherwise(
    device: str, longest: int, fitting: dict[int, int], expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That a CPU is given small micro-batches says nothing about what fits."""
    monkeypatch.setattr(machine, "_fitting", lambda policy, every, accelerator: fitting.get(every, 0))
    training = SimpleNamespace(gradient_checkpointing="auto", max_tokens_per_device="auto")
    accelerator: Any = SimpleNamespace(device=torch.device(device))
    recipe: Any = SimpleNamespace(training=training)
    lengths: Any = SimpleNamespace(tokens=np.array([10, longest]))
    policy: Any = None
    assert machine.token_budget(recipe, policy, lengths, accelerator) == expected

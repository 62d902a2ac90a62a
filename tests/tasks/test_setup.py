"""What a machine is asked for: tokens of a micro-batch, and memory that stays."""

import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dpoctl.model.probe import ProbeResult
from dpoctl.recipe.schema import TrainingSection
from dpoctl.tasks import setup

SCRIPT = """
import resource
from dpoctl.model.memory import keep_freed_memory, return_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [bytearray(size << 20) for size in (24, 24, 24, 100)]
    del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
print(faults(), faults(), faults())
return_freed_memory()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps memory in its own way")
def test_pages_come_from_the_system_once() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    first, *later, returned = map(int, done.stdout.split())
    assert first > 40_000, "172 MB in pages of 4 kB"
    assert max(later) < first / 50
    assert returned > 40_000, "what was returned comes from the system again"


@pytest.mark.parametrize(
    ("training", "sizes"),
    [
        ({}, (4, 4, 8, 2)),
        ({"optim": "adamw_8bit"}, (4, 4, 2, 2)),
        ({"param_dtype": "bfloat16"}, (2, 2, 4, 0)),
        ({"param_dtype": "bfloat16", "optim": "adamw_8bit"}, (2, 2, 2, 0)),
        ({"optim": "paged_adamw_8bit"}, (4, 4, 0, 2)),
    ],
)
def test_bytes_of_a_trained_parameter(training: dict[str, Any], sizes: tuple[int, ...]) -> None:
    section = TrainingSection(output_dir="runs/x", learning_rate=1e-5, **training)
    recipe: Any = SimpleNamespace(training=section)
    policy: Any = SimpleNamespace(dtype=torch.bfloat16)
    nothing: Any = None
    chosen = setup.Setup(recipe, nothing, nothing, policy, ProbeResult("shared", True, ""))
    assert chosen.state_bytes == sizes


def test_a_mac_computes_on_the_cpu_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(sys, "platform", "darwin")
    recipe: Any = SimpleNamespace(
        model=SimpleNamespace(dtype="float32", init=None, model_name_or_path="x", trust_remote_code=False),
        training=SimpleNamespace(ddp_timeout=60),
        lora=None,
        quantization=None,
    )
    monkeypatch.setattr(setup, "_has_experts", lambda recipe: False)
    monkeypatch.setattr(setup, "compute_dtype", lambda recipe, device: torch.float32)
    assert setup.build_accelerator(recipe).device == torch.device("cpu")
    assert (
        "note: dpoctl has not been tried on darwin; it computes on the CPU, and not on mps" in capsys.readouterr().err
    )


@pytest.mark.parametrize("arguments", [["--version"], ["dpo", "recipe.yaml"]])
def test_a_system_that_is_not_supported_is_told_so_before_anything_is_imported(arguments: list[str]) -> None:
    script = (
        "import runpy, sys; sys.platform = 'win32'; sys.modules['fcntl'] = sys.modules['resource'] = None; "
        f"sys.argv = ['dpoctl', *{arguments!r}]; runpy.run_module('dpoctl', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    said = "error: dpoctl runs on Linux, not on win32; on Windows, use WSL\n"
    assert (done.returncode, done.stdout, done.stderr) == (5, "", said)


def test_locks_and_limits_are_left_out_where_the_system_has_none(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib; sys.modules['fcntl'] = sys.modules['resource'] = None; from dpoctl import files; "
        "from dpoctl.data import memory_limit; memory_limit._SIZES = pathlib.Path('/none'); "
        "memory_limit.memory_limit(1).__enter__(); files.write_atomically(pathlib.Path(sys.argv[1]), '')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "file"], capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert [path.name for path in tmp_path.iterdir()] == ["file"]

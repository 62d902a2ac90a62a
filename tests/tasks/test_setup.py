"""What a machine is asked for: tokens of a micro-batch, and memory that stays."""

import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dpoctl.errors import SetupError
from dpoctl.model.probe import ProbeResult
from dpoctl.recipe.schema import TrainingSection
from dpoctl.tasks import setup

SCRIPT = """
import resource
from dpoctl.tasks.setup import keep_freed_memory

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
        ("cuda", 1500, {0: 1_000_000}, (262_144, 0)),
        ("cpu", 1500, {0: 10, 4: 20, 2: 30, 1: 40}, (40, 1)),
    ],
)
def test_layers_are_recomputed_where_two_of_the_longest_records_do_not_fit_otherwise(
    device: str, longest: int, fitting: dict[int, int], expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bound where larger micro-batches bring no speed says nothing about what fits."""
    monkeypatch.setattr(setup.Setup, "_room", lambda self: 1e9 / setup.SAFETY_FACTOR)
    monkeypatch.setattr(setup, "activation_bytes_per_token", lambda config, dtype, every: 1e9 / fitting.get(every, 1))
    training = SimpleNamespace(gradient_checkpointing="auto", max_tokens_per_device="auto")
    accelerator: Any = SimpleNamespace(device=torch.device(device))
    recipe: Any = SimpleNamespace(training=training)
    lengths: Any = SimpleNamespace(tokens=np.array([10, longest]))
    config = SimpleNamespace(hidden_size=256)
    policy: Any = SimpleNamespace(causal=SimpleNamespace(config=config), dtype=torch.float32)
    tokenizer: Any = None
    chosen = setup.Setup(recipe, accelerator, tokenizer, policy, ProbeResult("shared", True, "")).token_budget(lengths)
    assert chosen == expected


def sized(gigabytes: float, monkeypatch: pytest.MonkeyPatch, **training: Any) -> setup.Setup:
    """A model of a billion parameters, trained whole in bfloat16, on a device with so much free memory."""
    monkeypatch.setattr(setup, "free_bytes", lambda device: gigabytes * 1e9)
    section = TrainingSection(output_dir="runs/x", learning_rate=1e-5, **training)
    accelerator: Any = SimpleNamespace(device=torch.device("cpu"), gather=lambda tensor: tensor)
    recipe: Any = SimpleNamespace(training=section)
    with torch.device("meta"):
        model = torch.nn.Linear(10_000, 100_000, bias=False)
    policy: Any = SimpleNamespace(model=model, dtype=torch.bfloat16)
    tokenizer: Any = None
    return setup.Setup(recipe, accelerator, tokenizer, policy, ProbeResult("shared", True, ""))


@pytest.mark.parametrize(
    ("training", "sizes", "needed"),
    [
        ({}, (4, 4, 8, 2), 14),
        ({"optim": "adamw_8bit"}, (4, 4, 2, 2), 8),
        ({"param_dtype": "bfloat16"}, (2, 2, 4, 0), 6),
        ({"param_dtype": "bfloat16", "optim": "adamw_8bit"}, (2, 2, 2, 0), 4),
        ({"optim": "paged_adamw_8bit"}, (4, 4, 0, 2), 6),
    ],
)
def test_states_that_do_not_fit_are_refused_with_the_arithmetic(
    training: dict[str, Any], sizes: tuple[int, ...], needed: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are loaded already: gradients, optimizer state and casts are still to come."""
    assert sized(1, monkeypatch, **training).state_bytes == sizes
    assert sized(needed + 1, monkeypatch, **training)._room() == pytest.approx(1e9)
    with pytest.raises(SetupError, match=f"the model does not fit on this cpu: weights {sizes[0]}.0 GB") as refusal:
        sized(needed - 0.5, monkeypatch, **training)._room()
    assert "0.5 GB too much" in str(refusal.value)
    assert "training.param_dtype: bfloat16" in refusal.value.hint


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

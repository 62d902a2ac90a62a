"""Memory of whole runs: what the plan allows is used and fits, and a budget that is too large is halved."""

import gc
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_stage import Stage
from tiny_runs import merge, pair_rows, write_rows

import dpoctl
from dpoctl.tasks import estimate, setup

# Each of these wants the device for itself.
pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("memory")]

LORA: dict[str, Any] = {"lora": {"r": 16, "lora_alpha": 32}}
KINDS: dict[str, dict[str, Any]] = {"full": {}, "lora": LORA, "qlora": LORA | {"quantization": {"load_in_4bit": True}}}


@pytest.fixture
def recipe(folder_1b: Path, tmp_path: Path, stage: Stage) -> dict[str, Any]:
    """Many pairs for a model of a billion parameters, in bfloat16, and one step."""
    count = 32 if stage.rehearsal else 1024
    rows = write_rows(tmp_path / "pairs.jsonl", pair_rows(count, seed=3))
    return {
        "method": "dpo",
        "model": {"model_name_or_path": str(folder_1b), "dtype": "bfloat16"},
        "data": {"train": [{"path": str(rows)}], "max_length": 256},
        "dpo": {"reference": {"mode": "live"}},
        "training": {
            "output_dir": str(tmp_path / "run"),
            "global_batch_size": count,
            "learning_rate": 1e-5,
            "logging_steps": 1,
            "max_steps": 1,
        },
    }


def test_out_of_memory_halves_the_budget_once(
    recipe: dict[str, Any], stage: Stage, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Three quarters of the memory that a step takes, and a budget that knows nothing of it."""
    changes = LORA | {"training.gradient_checkpointing": False, "training.global_batch_size": 128}
    if stage.rehearsal:
        fail_once(monkeypatch)
    else:
        monkeypatch.setattr(setup, "free_bytes", lambda device: 1 << 40)
        monkeypatch.setattr(estimate, "GPU_ACTIVATIONS", 1 << 40)
        dpoctl.dpo(merge(recipe, changes))
        taken = torch.cuda.max_memory_reserved()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(0.75 * taken / torch.cuda.mem_get_info()[1])
    try:
        dpoctl.dpo(merge(recipe, changes), overwrite=True)
    finally:
        if not stage.rehearsal:
            torch.cuda.set_per_process_memory_fraction(1.0)
    told = capfd.readouterr().err
    assert re.search(r"out of memory with at most [\d,]+ tokens in a micro-batch; retrying once with", told), told[
        -500:
    ]


def fail_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from dpoctl.core.objective import Objective

    backward, failed = Objective.backward, []

    def failing(self: Objective, *arguments: Any, **options: Any) -> Any:
        if not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("out of memory")
        return backward(self, *arguments, **options)

    monkeypatch.setattr(Objective, "backward", failing)


@pytest.mark.parametrize("kind", KINDS)
def test_the_automatic_budget_fits(
    recipe: dict[str, Any], kind: str, stage: Stage, record_property: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many tokens as the memory is said to hold, without the bound beyond which they bring no speed."""
    monkeypatch.setattr(estimate, "GPU_ACTIVATIONS", 1 << 40)
    dpoctl.dpo(merge(recipe, KINDS[kind]))
    if stage.rehearsal:
        return
    peak, total = torch.cuda.max_memory_reserved(), torch.cuda.mem_get_info()[1]
    record_property("peak_of_total", f"{peak / total:.2f}")
    assert peak < total

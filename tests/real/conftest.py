"""A real model, trained once as a user would train it: SFT of all weights, then DPO with an adapter."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_runs import command, write_rows

HERE = Path(__file__).parent
MODEL = HERE.parents[1] / "build" / "real" / "smollm2-135m-instruct"
"""The model stays here: it takes half a minute to make."""
STEPS, LEARNING_RATE, SEED = 2, 2e-5, 1
LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16.0}
Row = dict[str, Any]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.real)


@dataclass(frozen=True)
class Trained:
    """A real model and its runs, and the rows that they saw: all of them in each step."""

    model: Path
    sft: Path
    dpo: Path
    rows: list[Row]
    heldout: list[Row]
    call: Callable[..., str]
    """Calls `dpoctl` and returns what it says on stdout."""


@pytest.fixture(scope="session")
def _all_cores() -> Iterator[None]:
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model() -> Path:
    """SmolLM2-135M-Instruct, which is fetched and converted where it is not there yet."""
    if not MODEL.is_dir():
        MODEL.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, str(HERE / "make_llama.py"), str(MODEL)], check=True)
    return MODEL


@pytest.fixture(scope="session")
def trained(model: Path, tmp_path_factory: pytest.TempPathFactory, _all_cores: None) -> Trained:
    folder = tmp_path_factory.mktemp("real")

    def call(*arguments: str | Path) -> str:
        env = os.environ | {"DPOCTL_CACHE": str(folder / "cache")}
        ended = subprocess.run(command(*arguments), env=env, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr[-3000:]
        return ended.stdout

    rows = [json.loads(line) for line in (HERE / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    rows, heldout = rows[:4], rows[4:]
    files = {"train": write_rows(folder / "train.jsonl", rows), "eval": write_rows(folder / "heldout.jsonl", heldout)}
    started = model
    for method in ("sft", "dpo"):
        recipe = {
            "method": method,
            "model": {"model_name_or_path": str(started), "dtype": "float32"},
            "data": {side: [str(file)] for side, file in files.items()},
            "training": {
                **{"output_dir": str(folder / method), "global_batch_size": len(rows), "max_steps": STEPS},
                **{"learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant", "warmup_steps": 0},
                **{"adam_epsilon": 1e-6, "logging_steps": 1, "eval_steps": STEPS, "eval_on_start": False},
                "seed": SEED,
            },
            **({"lora": LORA} if method == "dpo" else {}),
        }
        file = folder / f"{method}.yaml"
        file.write_text(yaml.safe_dump(recipe))
        call(method, file)
        started = folder / method
    return Trained(model, folder / "sft", folder / "dpo", rows, heldout, call)

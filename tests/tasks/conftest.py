"""Recipes for tiny runs, and two ways to run them: in this process, and as a user would."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from forked import Ended
from tiny_runs import merge, pair_rows, write_rows

from dpoctl.recipe import parse_recipe

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """23 training pairs: no batch size divides them."""
    return write_rows(tmp_path / "pairs.jsonl", pair_rows(23))


@pytest.fixture
def heldout(tmp_path: Path) -> Path:
    """7 pairs to evaluate on."""
    return write_rows(tmp_path / "heldout.jsonl", pair_rows(7, seed=1))


@pytest.fixture
def dpo_recipe(tiny_llama_folder: Path, pairs: Path, heldout: Path, tmp_path: Path) -> dict[str, Any]:
    """Five short steps of full fine-tuning."""
    return {
        "method": "dpo",
        "model": {"model_name_or_path": str(tiny_llama_folder)},
        "data": {"train": [{"path": str(pairs)}], "eval": [{"path": str(heldout)}], "max_length": 128},
        "training": {
            "output_dir": str(tmp_path / "run"),
            "global_batch_size": 5,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "eval_steps": 5,
            "seed": 1,
        },
    }


@pytest.fixture
def sft_recipe(dpo_recipe: dict[str, Any]) -> dict[str, Any]:
    """The same data as demonstrations: the chosen answers."""
    return dpo_recipe | {"method": "sft"}


@pytest.fixture(scope="session")
def train() -> Run:
    """Train a recipe in this process, with changes to it by dotted keys."""

    def run(recipe: dict[str, Any], changes: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
        from dpoctl.tasks import train as task

        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        text = yaml.safe_dump(merge(recipe, changes or {}))
        parsed = parse_recipe(text, "recipe.yaml", command=recipe["method"])
        task.run(parsed, recipe_text=text, **options)
        return merge(recipe, changes or {})

    return run


@pytest.fixture
def in_fork(tmp_path: Path) -> Callable[..., Ended]:
    """Call the command line in a fork of this process, and the ranks that it starts in forks too."""

    def call(*arguments: str | Path, code: int = 0) -> Ended:
        ended = forked.run(*arguments, files=tmp_path / "said")
        assert ended.code == code, ended.err[-3000:]
        return ended

    return call


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Call the command line in this process, and return its exit code."""

    def call(*arguments: str | Path) -> int:
        from dpoctl.cli.app import main

        monkeypatch.setattr(sys, "argv", ["dpoctl", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert isinstance(ended.value.code, int)
        return ended.value.code

    return call

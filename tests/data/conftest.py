"""Recipes and files for the tests of the data floor."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from dpoctl.recipe.schema import Recipe

HH = Path(__file__).parents[3] / "shared" / "data" / "hh-harmless.jsonl.gz"


@pytest.fixture
def hh_file() -> Path:
    """Real transcripts; they are not part of the project."""
    if not HH.is_file():
        pytest.skip("the real transcripts are not here")
    return HH


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., str]:
    """Write rows as JSON lines and return the path."""

    def write(rows: Iterable[Any], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def make_recipe() -> Callable[..., Recipe]:
    """Build a recipe from its data section."""

    def make(method: str = "dpo", seed: int = 0, sft: dict[str, Any] | None = None, **data: Any) -> Recipe:
        return Recipe.model_validate(
            {
                "method": method,
                "model": {"model_name_or_path": "none"},
                "data": data,
                "sft": sft or {},
                "training": {"output_dir": "none", "learning_rate": 1e-5, "seed": seed},
            }
        )

    return make

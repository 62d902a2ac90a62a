"""Recipes and files for the tests of the data package."""

import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hostile_files import Ended, last, read
from transformers import PreTrainedTokenizerFast

from dpoctl.cli.app import main
from dpoctl.data.pairing import Wants
from dpoctl.data.prepare import PreparedData, prepare
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

    def make(
        method: str = "dpo",
        seed: int = 0,
        sft: dict[str, Any] | None = None,
        dpo: dict[str, Any] | None = None,
        **data: Any,
    ) -> Recipe:
        return Recipe.model_validate(
            {
                "method": method,
                "model": {"model_name_or_path": "none"},
                "data": data,
                "sft": sft or {},
                "dpo": dpo or {},
                "training": {"output_dir": "none", "learning_rate": 1e-5, "seed": seed},
            }
        )

    return make


@pytest.fixture
def convert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ended]:
    """Run the command, and check everything that must hold however it ends."""
    monkeypatch.setenv("GOMP_SPINCOUNT", os.environ.get("GOMP_SPINCOUNT", "20000"))

    def run(source: Path | str, *arguments: str, output: str = "out.jsonl") -> Ended:
        goal = tmp_path / output
        before = goal.exists()
        monkeypatch.setattr(sys, "argv", ["dpoctl", "convert-data", str(source), "-o", str(goal), *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        out, err = capsys.readouterr()
        assert isinstance(code, int)
        assert "Traceback" not in err
        assert not {character for character in err if not character.isprintable()} - {"\n"}
        assert "\x1b" not in out
        assert [line for line in err.splitlines() if line.startswith("error:")] == ([] if code == 0 else [last(err)])
        assert not list(tmp_path.glob(".*.tmp"))
        if code == 0:
            assert all(isinstance(row, dict) for row in read(goal))
        else:
            assert goal.exists() == before, err
        return Ended(code, out, err)

    return run


@pytest.fixture
def run(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, make_recipe: Callable[..., Recipe]
) -> Callable[..., PreparedData]:
    """Prepare a recipe from its data section."""

    def call(
        method: str = "dpo",
        *,
        using: PreTrainedTokenizerFast = tokenizer,
        only_eval: bool = False,
        wants: Wants | None = None,
        **data: Any,
    ) -> PreparedData:
        recipe = make_recipe(method, **data)
        return prepare(recipe, using, cache_dir=tmp_path / "cache", only_eval=only_eval, wants=wants)

    return call

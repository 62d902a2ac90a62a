"""Paths of recipes: the folder they start from, checkpoints in place of models and runs, and lists written as text."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from good_recipe import GOOD

from dpoctl.cli.app import main

RULE = "relative paths start from the folder in which dpoctl is called"


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Call a command, and return what it prints."""

    def call(*arguments: str, code: int) -> str:
        monkeypatch.setattr(sys, "argv", ["dpoctl", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        assert ended.value.code == code, out + err
        return out + err

    return call


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The current folder, and that of a recipe."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    (there / "r.yaml").write_text(GOOD.replace("some/model", "model"))
    monkeypatch.chdir(here)
    return here, there


def test_data_that_are_not_there_are_told_with_both_folders(
    folders: tuple[Path, Path], refused: Callable[..., str]
) -> None:
    here, there = folders
    for command in ("dpo", "inspect"):
        said = refused(command, f"{there}/r.yaml", code=3)
        assert f"error: pairs.jsonl: cannot be read: No such file or directory in {here} or {there}; " in said
        assert RULE in said
    (there / "pairs.jsonl").touch()
    for command, code in (("dpo", 3), ("inspect", 3), ("check", 2)):
        assert f" in {here}, but in {there}, beside the recipe" in refused(command, f"{there}/r.yaml", code=code)


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("model.model_name_or_path", "model"),
        ("model.model_name_or_path", "runs/sft"),
        ("dpo.reference.path", "./ref"),
        ("model.chat_template", "own.jinja"),
    ],
)
def test_a_model_beside_the_recipe_alone_is_told(
    line: str, name: str, folders: tuple[Path, Path], refused: Callable[..., str]
) -> None:
    here, there = folders
    (here / "pairs.jsonl").touch()
    (there / name).mkdir(parents=True)
    said = refused("dpo", f"{there}/r.yaml", "--set", f"{line}={name}", code=2)
    assert f"error: {line}: {name} is not there in {here}, but in {there}, beside the recipe; {RULE}" in said


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("a.jsonl,b.jsonl", "several sources are a list: [a.jsonl, b.jsonl]"),
        ("a, b", "several sources are a list: [a, b]"),
        ('"~/a.jsonl"', "~ is not expanded in data paths; write the whole path"),
        ("/nowhere/a.jsonl", "correct data.train or data.eval"),
    ],
)
def test_a_path_that_looks_like_something_else_is_told(
    value: str, hint: str, folders: tuple[Path, Path], refused: Callable[..., str]
) -> None:
    assert refused("dpo", f"{folders[1]}/r.yaml", "--set", f"data.train={value}", code=3).endswith(f"; {hint}\n")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What is left of a run when only names count."""
    run = tmp_path / "runs" / "mine"
    (run / "checkpoints" / "step-000020").mkdir(parents=True)
    (run / "recipe.resolved.yaml").write_text(GOOD)
    return run


@pytest.mark.parametrize("inner", ["checkpoints/step-000020", "checkpoints"])
@pytest.mark.parametrize("command", ["eval", "merge", "chat", "report"])
def test_a_checkpoint_is_no_run(command: str, inner: str, run: Path, refused: Callable[..., str]) -> None:
    said = refused(command, str(run / inner), code=2)
    assert f"error: {run / inner} is a checkpoint, not a run; pass the run: {run}\n" in said


@pytest.mark.parametrize("key", ["model.model_name_or_path", "dpo.reference.path"])
def test_a_checkpoint_is_no_model(key: str, run: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "pairs.jsonl").touch()
    (tmp_path / "r.yaml").write_text(GOOD.replace("pairs.jsonl", f"{tmp_path}/pairs.jsonl"))
    step = run / "checkpoints" / "step-000020"
    for command in ("dpo", "check"):
        said = refused(command, f"{tmp_path}/r.yaml", "--set", f"{key}={step}", code=2)
        assert f"error: {key}: {step} is a checkpoint; only --resume can continue from it; use {run}: it holds" in said


def test_a_checkpoint_is_known_from_inside_and_away_from_its_run(
    run: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = run / "checkpoints" / "step-000020"
    (step / "manifest.json").touch()
    monkeypatch.chdir(step)
    assert f"error: . is a checkpoint, not a run; pass the run: {run}" in refused("report", ".", code=2)
    step.rename(tmp_path / "copied")
    said = refused("eval", str(tmp_path / "copied"), code=2)
    assert "copied is a checkpoint, not a run; pass the run: the folder of the run" in said


def test_a_checkpoint_writes_no_pairs(run: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "items.txt").write_text("a\n")
    sides = {side: f"Be {side} about {{item}}." for side in ("negative", "positive", "neutral")}
    model = {"model_name_or_path": str(run / "checkpoints" / "step-000020")}
    recipe = {"method": "contrastive", "items": f"{tmp_path}/items.txt", "model": model, "instructions": sides}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(recipe | {"chosen": "positive"}))
    said = refused("convert-data", f"{tmp_path}/c.yaml", "--format", "contrastive", "-o", f"{tmp_path}/o.jsonl", code=2)
    assert "is a checkpoint; only --resume can continue from it" in said


@pytest.mark.parametrize(
    "lines",
    [
        ["finetuning_type: lora"],
        ["stage: dpo", "pref_beta: 0.1"],
        ["trainning: {global_batch_size: 1}"],
    ],
)
def test_a_recipe_that_is_not_understood_gets_no_advice(
    lines: list[str], folders: tuple[Path, Path], refused: Callable[..., str]
) -> None:
    text = GOOD.replace("some/model", "x/Llama-3-8B").replace("5e-7", "1e-3") + "\n".join(lines) + "\n"
    Path("r.yaml").write_text(text)
    said = refused("check", "r.yaml", "--no-data", code=2)
    assert "warning" not in said
    assert "note" not in said
    assert said.count("error: ") == len(lines)

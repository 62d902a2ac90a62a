"""Recipes and keys for a user who has the package alone."""

import json
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import forked
import pytest

from dpoctl.cli.app import main
from dpoctl.cli.recipes import complete_name, table
from dpoctl.recipe import shipped
from dpoctl.recipe.loader import known_paths
from dpoctl.recipe.shipped import describe_recipe, shipped_recipes

ROOT = Path(__file__).parents[2]
Call = Callable[..., str]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """Call `dpoctl recipes` in an empty folder, and return what it prints."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["dpoctl", "recipes", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        return capsys.readouterr().out

    return run


def test_every_recipe_is_listed_with_what_it_is(call: Call) -> None:
    listed = json.loads(call("--json"))
    assert sorted(listed) == sorted(file.stem for file in (ROOT / "recipes").glob("*.yaml"))
    assert listed["zephyr-7b-dpo"] == {
        "summary": "DPO of Zephyr 7B, all weights, on UltraFeedback",
        "model": "alignment-handbook/zephyr-7b-sft-full",
        "method": "dpo",
        "trained": "full",
        "gpu": "8 x 80 GB",
        "memory": "107.9 GiB",
        "expected": {
            "eval_loss": [0.49, 0.515],
            "eval_rewards/accuracies": [0.74, 0.785],
            "eval_rewards/margins": [0.9, 1.15],
        },
    }
    assert all(20 < len(entry["summary"]) < 150 for entry in listed.values())
    assert [(e["gpu"], e["memory"]) for name, e in listed.items() if name.startswith("reviewer2-d")] == [("", "")]


def test_the_table_has_a_line_for_each_recipe_and_no_line_is_wider_than_the_terminal() -> None:
    found = {name: describe_recipe(file) for name, file in shipped_recipes().items()}
    whole, wide, narrow = (table(found, width) for width in (None, 150, 79))
    assert len(whole) == len(found) + 1
    (line,) = [line for line in whole if line.startswith("mistral7b-lora ")]
    assert line.split("  ")[-1] == "loss 0.47-0.54, accuracy 0.72-0.77, margin 0.8-1.3"
    assert max(map(len, wide)) <= 150
    assert max(map(len, narrow)) <= 79
    at = next(number for number, line in enumerate(narrow) if line.startswith("mistral7b-lora "))
    assert narrow[at + 1] == "  expected loss 0.47-0.54, accuracy 0.72-0.77, margin 0.8-1.3"


def test_names_of_recipes_complete_in_a_shell() -> None:
    assert complete_name("reviewer2-sf") == ["reviewer2-sft"]
    assert complete_name("co") == ["copy"]


def test_a_recipe_is_copied_as_it_is(call: Call) -> None:
    original = (ROOT / "recipes" / "reviewer2-dpo.yaml").read_text(encoding="utf-8")
    assert call("recipes/reviewer2-dpo.yaml") == original
    assert call("copy", "reviewer2-dpo", "mine.yaml") == "mine.yaml\n"
    assert call("copy", "reviewer2-dpo") == "reviewer2-dpo.yaml\n"
    Path("folder").mkdir()
    assert json.loads(call("copy", "reviewer2-dpo", "folder", "--json")) == {"output": "folder/reviewer2-dpo.yaml"}
    for copy in ("mine.yaml", "reviewer2-dpo.yaml", "folder/reviewer2-dpo.yaml"):
        assert Path(copy).read_text(encoding="utf-8") == original


def test_the_recipes_of_a_wheel_are_found(call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (source, target), *_ = settings["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"].items()
    assert (ROOT / source, target) == (ROOT / "recipes", "dpoctl/recipes")
    installed = tmp_path / "site-packages" / target
    installed.mkdir(parents=True)
    (installed / "one.yaml").write_text(
        "# A first thing. A second.\n# GPU: 8 GB\nmethod: dpo\nmodel: {model_name_or_path: me/some-model}\n"
    )
    monkeypatch.setattr(shipped, "PACKAGE", installed.parent)
    assert call().splitlines()[1].split() == ["one", "some-model", "dpo", "full", "8", "GB"]


def test_every_key_can_be_looked_up(call: Call) -> None:
    for path in known_paths():
        name = ".".join(map(str, path))
        found = json.loads(call("--key", name, "--json"))["keys"]
        assert all(key["name"].startswith(name) for key in found), name
    assert [key["name"] for key in json.loads(call("--key", "sync_alpha", "--json"))["keys"]] == [
        "dpo.reference.sync_alpha"
    ]
    assert call("--key", "data.train[0].weight").startswith(
        "data.train.weight: a number above 0 and at most 1000; default 1.0\n  "
    )
    assert {key["name"] for key in json.loads(call("--key", "ipo", "--json"))["keys"]} >= {"dpo.loss.beta (ipo)"}


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("rec", ["recipes"]),
        ("recipes reviewer2-sf", ["reviewer2-sft"]),
        ("recipes copy qwen3-8b", ["qwen3-8b-dpo-qlora", "qwen3-8b-sft-qlora"]),
        ("dpo --overw", ["--overwrite"]),
    ],
)
def test_a_shell_completes_commands_options_and_recipes(words: str, completed: list[str], tmp_path: Path) -> None:
    asked = {
        "_DPOCTL_COMPLETE": "complete_bash",
        "COMP_WORDS": f"dpoctl {words}",
        "COMP_CWORD": str(words.count(" ") + 1),
    }
    ended = forked.run(files=tmp_path / "said", env=asked)
    assert (ended.code, ended.out.split()) == (0, completed)


def test_the_completion_is_installed_into_the_users_shell(tmp_path: Path) -> None:
    alone = {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    ended = forked.run("--install-completion", "bash", files=tmp_path / "said", env=alone)
    assert ended.code == 0, ended.err
    (script,) = (tmp_path / ".bash_completions").iterdir()
    assert "_DPOCTL_COMPLETE=complete_bash" in script.read_text()
    assert str(script) in (tmp_path / ".bashrc").read_text()

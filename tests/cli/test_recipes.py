"""Recipes and keys for a user who has the package alone."""

import json
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from dpoctl.cli.app import main
from dpoctl.recipe import shipped
from dpoctl.recipe.loader import known_paths

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
    assert listed["pythia28-shp-dpo"] == "DPO of Pythia 2.8B on Stanford Human Preferences, after pythia28-hh-sft.yaml"
    assert all(len(text) > 20 for text in listed.values())


def test_a_recipe_is_copied_as_it_is(call: Call) -> None:
    original = (ROOT / "recipes" / "reviewer2-dpo.yaml").read_text(encoding="utf-8")
    assert call("recipes/reviewer2-dpo.yaml") == original
    call("reviewer2-dpo", "-o", "mine.yaml")
    assert Path("mine.yaml").read_text(encoding="utf-8") == original


def test_the_recipes_of_a_wheel_are_found(call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (source, target), *_ = settings["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"].items()
    assert (ROOT / source, target) == (ROOT / "recipes", "dpoctl/recipes")
    installed = tmp_path / "site-packages" / target
    installed.mkdir(parents=True)
    (installed / "one.yaml").write_text("# A first thing. A second.\nmethod: dpo\n")
    monkeypatch.setattr(shipped, "PACKAGE", installed.parent)
    assert call() == "one: A first thing\n"


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

"""`dpoctl compare`: runs that were measured on the same records, and what it says of others."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_runs import pair_rows, write_rows

from dpoctl.runs.record_values import read_record_values
from dpoctl.tasks.evaluate import run as evaluate

Run = Callable[..., dict[str, Any]]
Main = Callable[..., int]


def trained(recipe: dict[str, Any], train: Run, name: str, changes: dict[str, Any]) -> Path:
    folder = Path(recipe["training"]["output_dir"]).with_name(name)
    train(recipe, {"training.output_dir": str(folder)} | changes)
    evaluate(folder, json_output=True)
    return folder


def values_of(run: Path) -> Any:
    (file,) = (run / "evals").glob("*.records.npz")
    return read_record_values(file)["eval"]


@pytest.mark.parametrize(
    "changes",
    [{}, {"dpo.loss": {"type": "aot"}}, {"method": "sft", "sft.average": "responses"}],
    ids=["pairs", "whole steps", "sft"],
)
def test_the_values_of_records_add_up_to_the_metrics(changes: dict[str, Any], dpo_recipe: Any, train: Run) -> None:
    run = trained(dpo_recipe | {"method": changes.get("method", "dpo")}, train, "run", changes)
    (file,) = (run / "evals").glob("*.json")
    report, values = json.loads(file.read_text()), values_of(run)
    means = values.sums.sum(1) / values.counts.sum(1)
    assert dict(zip(values.names, means, strict=True)) == {
        name: pytest.approx(report[name], rel=1e-5, abs=1e-5) for name in values.names
    }
    assert values.sums.shape == (len(values.names), 7)
    assert len(np.unique(values.prompts)) == 7


def test_runs_are_compared_with_the_first_on_the_same_records(
    dpo_recipe: dict[str, Any], train: Run, main: Main, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    gates = {"eval.gates": [{"metric": "rewards/accuracies", "min": 0.0}], "eval.samples": {"num": 2}}
    one = trained(dpo_recipe, train, "one", gates)
    two = trained(dpo_recipe, train, "two", gates | {"dpo.loss": {"type": "sigmoid", "beta": 0.5}})
    capfd.readouterr()
    comment, page = tmp_path / "comment.md", tmp_path / "page.html"
    assert main("compare", one, two, "--json", "--markdown", comment, "--html", page) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["recipe"] == {"dpo.loss.beta": [0.1, 0.5]}
    assert found["passed"]
    first, second = (values_of(run) for run in (one, two))
    at = first.names.index("rewards/margins")
    paired = found["runs"][1]["paired"]["rewards/margins"]
    assert paired["difference"] == pytest.approx((second.sums - first.sums)[at].mean(), rel=1e-5)
    assert paired["interval"][0] < paired["difference"] < paired["interval"][1]
    assert found["runs"][0]["paired"] == {}
    accuracy = found["metrics"]["rewards/accuracies"]
    assert [one["value"] for one in accuracy] == [pytest.approx(v.sums[3].mean()) for v in (first, second)]
    (verdict,) = found["verdicts"]
    assert verdict.startswith(f"verdict: {two}: ")

    text = comment.read_text()
    for run in (one, two):
        assert hashlib.sha256((run / "recipe.resolved.yaml").read_bytes()).hexdigest() in text
    assert found["runs"][0]["data"]["eval"] in text
    assert "| dpo.loss.beta | 0.1 | 0.5 |" in text
    assert "gate passed: rewards/accuracies" in text
    html = page.read_text()
    assert "<script" not in html
    assert html.count('<article class="sample">') == 2
    assert html.count('<figure class="chart">') == 4

    resolved = two / "recipe.resolved.yaml"
    resolved.write_text(resolved.read_text().replace("min: 0.0", "min: 2.0"))
    assert main("compare", one, two) == 4
    assert f"{two}: gate failed: rewards/accuracies" in capfd.readouterr().err


def test_runs_of_other_records_are_not_compared_record_by_record(
    dpo_recipe: dict[str, Any], train: Run, main: Main, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    one = trained(dpo_recipe, train, "one", {})
    other = write_rows(tmp_path / "other.jsonl", pair_rows(6, seed=9))
    two = trained(dpo_recipe, train, "two", {"data.eval": [str(other)]})
    capfd.readouterr()
    assert main("compare", one, two, "--json") == 0
    found = json.loads(capfd.readouterr().out)
    assert found["runs"][1]["paired"] == {}
    assert "not comparable" in found["verdicts"][0]
    evaluate(two, data=dpo_recipe["data"]["eval"][0]["path"], json_output=True)
    capfd.readouterr()
    assert main("compare", one, two, "--json") == 0
    assert "rewards/accuracies" in json.loads(capfd.readouterr().out)["runs"][1]["paired"]


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [(("run",), "one run cannot be compared"), (("run", "run"), "run has no result of the model that it has now")],
)
def test_what_cannot_be_compared_is_said(
    arguments: tuple[str, ...], answer: str, main: Main, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("run/recipe.resolved.yaml").write_text("method: dpo\n")
    assert main("compare", *arguments) == 2
    assert answer in capfd.readouterr().err

"""The accuracy of rewards by source and by columns of `meta` adds up to that of the whole set."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import pair_rows, write_rows

from dpoctl.tasks.evaluate import run as evaluate

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def grouped(dpo_recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Two eval sources, whose rows have a subset, a number of their own, and text that is no group."""
    paths = []
    for name, seed in (("one", 3), ("two", 4)):
        rows = pair_rows(6, seed=seed)
        meta = [{"subset": "even" if index % 2 == 0 else "odd", "only": "x"} for index in range(6)]
        rows = [row | {"meta": facts} for row, facts in zip(rows, meta, strict=True)]
        paths.append(str(write_rows(tmp_path / f"{name}.jsonl", rows)))
    return dpo_recipe | {"data": dpo_recipe["data"] | {"eval": paths}}


@pytest.mark.parametrize("loss", ["sigmoid", "aot"])
def test_groups_add_up_to_the_whole_set(
    loss: str, grouped: dict[str, Any], train: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    run = Path(train(grouped, {"dpo.loss.type": loss, "training.max_steps": 3})["training"]["output_dir"])
    capfd.readouterr()
    evaluate(run, json_output=True)
    report = json.loads(capfd.readouterr().out)
    groups = report["groups"]
    assert groups.keys() == {"meta.subset", "source"}
    assert groups["meta.subset"].keys() == {"even", "odd"}
    assert sorted(groups["source"]) == sorted(grouped["data"]["eval"])
    for column in groups.values():
        assert [group["num_pairs"] for group in column.values()] == [6, 6]
        for name in ("rewards/accuracies", "rewards/margins"):
            values = [group[name] for group in column.values()]
            assert sum(values) / 2 == pytest.approx(report[name], abs=1e-6), name
            assert all(group[f"{name}_ci"][0] <= group[name] <= group[f"{name}_ci"][1] for group in column.values())


@pytest.mark.slow
def test_two_processes_evaluate_groups_texts_and_divergence_as_one_does(
    grouped: dict[str, Any], train: Run, tmp_path: Path, in_fork: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    changes = {"training.max_steps": 3, "eval.samples": {"num": 3, "max_new_tokens": 8, "temperature": 1.0}}
    run = Path(train(grouped, changes)["training"]["output_dir"])
    capfd.readouterr()
    evaluate(run, json_output=True)
    alone = json.loads(capfd.readouterr().out)
    together = json.loads(in_fork("eval", run, "--num-processes", "2", "--json").out.splitlines()[-1])
    assert together["groups"].keys() == alone["groups"].keys()
    assert together["samples"] == alone["samples"]
    assert together["kl"] == pytest.approx(alone["kl"], rel=1e-4)
    for name in ("loss", "rewards/margins"):
        assert together[name] == pytest.approx(alone[name], rel=1e-4)

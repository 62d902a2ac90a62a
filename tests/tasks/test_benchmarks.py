"""`eval.benchmarks`: lm-eval on policy and reference, with the figures that lm-eval gives by itself."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from key_cases import BENCHMARK_KEYS
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpoctl.errors import SetupError, UsageError
from dpoctl.model import packages
from dpoctl.recipe.eval_sections import BenchmarkSection
from dpoctl.tasks.benchmarks import check_benchmarks, run_benchmarks
from dpoctl.tasks.evaluate import run as evaluate

Run = Callable[..., dict[str, Any]]
SUITE = Path(__file__).parents[1] / "smoke_suite"
TASKS = ("smoke_answer", "smoke_choice", "smoke_continuation", "smoke_text")


def test_without_the_package_the_command_that_installs_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda _: None)
    with pytest.raises(SetupError) as refused:
        check_benchmarks([BenchmarkSection(task="arc_easy")])
    assert str(refused.value) == ("eval.benchmarks needs lm-eval, which is not installed; pip install 'dpoctl[bench]'")


def test_a_baseline_that_benchmarks_would_not_be_compared_with_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--against: eval.benchmarks compare a run with its own reference"):
        check_benchmarks([BenchmarkSection(task="arc_easy")], has_baseline=True)
    check_benchmarks([], has_baseline=True)


def by_hand(model: Path, task: str) -> dict[str, Any]:
    """What lm-eval says of a folder when it loads the model itself."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    loaded = AutoModelForCausalLM.from_pretrained(model)
    wrapped = HFLM(pretrained=loaded, tokenizer=AutoTokenizer.from_pretrained(model), batch_size=4)
    manager = TaskManager(include_path=str(SUITE), include_defaults=False)
    found: dict[str, Any] = simple_evaluate(wrapped, tasks=[task], task_manager=manager, bootstrap_iters=0)["results"][
        task
    ]
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_differences_are_those_of_lm_eval_by_hand(
    dpo_recipe: dict[str, Any], train: Run, capfd: pytest.CaptureFixture[str], tiny_llama_folder: Path, whole: bool
) -> None:
    pytest.importorskip("lm_eval")
    if not whole:
        pytest.skip("part of the whole suite")
    suite = [{"task": task, "include_path": str(SUITE)} for task in TASKS]
    gate = {"metric": "benchmarks.smoke_choice.acc.delta", "min": -1.0, "by": "lower"}
    recipe = train(dpo_recipe, {"eval.benchmarks": suite, "eval.gates": [gate], "training.learning_rate": 1e-2})
    run = Path(recipe["training"]["output_dir"])
    with pytest.raises(UsageError, match="lm-eval has no task 'smoke_choise'; did you mean 'smoke_choice'"):
        check_benchmarks([BenchmarkSection(task="smoke_choise", include_path=str(SUITE))])
    capfd.readouterr()
    evaluate(run, json_output=True)
    report = json.loads(capfd.readouterr().out)
    assert list(report["benchmarks"]) == list(TASKS)
    for task in TASKS:
        after, before = by_hand(run, task), by_hand(tiny_llama_folder, task)
        names = [key for key in after if key.endswith(",none") and "_stderr" not in key]
        assert {f"{name},none" for name in report["benchmarks"][task]} == set(names)
        for key in names:
            one = report["benchmarks"][task][key.removesuffix(",none")]
            assert one["policy"] == pytest.approx(after[key], rel=1e-5)
            assert one["delta"] == pytest.approx(after[key] - before[key], rel=1e-4, abs=1e-6)
    choice = report["benchmarks"]["smoke_choice"]["acc"]
    assert choice["num"] == 12
    assert choice["delta_ci"][0] <= choice["delta"] <= choice["delta_ci"][1]
    assert "delta_ci" not in report["benchmarks"]["smoke_text"]["word_perplexity"]
    assert math.isfinite(choice["delta_se"])
    assert [one["passed"] for one in report["gates"]] == [True]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_changed_key_of_a_benchmark_changes_its_figures(
    tiny_llama_folder: Path,
    whole: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("lm_eval")
    if not whole:
        pytest.skip("part of the whole suite")
    model, tokenizer = (kind.from_pretrained(tiny_llama_folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
    monkeypatch.chdir(tmp_path)
    given = {"task": "smoke_continuation", "limit": 2, "include_path": str(SUITE)}
    other = shutil.copytree(SUITE, tmp_path / "suite")
    (other / "reviews.jsonl").write_text("".join(reversed((SUITE / "reviews.jsonl").read_text().splitlines(True))))

    def figures(change: dict[str, Any]) -> dict[str, dict[str, Any]]:
        section = BenchmarkSection.model_validate(given | change)
        return run_benchmarks([section], tokenizer, model, None)

    seen = [json.dumps(figures({}))]
    for key in BENCHMARK_KEYS:
        seen.append(json.dumps(figures({key: {"include_path": str(other)}.get(key, BENCHMARK_KEYS[key])})))
    assert len(set(seen)) == len(BENCHMARK_KEYS) + 1
    assert seen[0] == json.dumps(figures({}))
    assert "git" not in capfd.readouterr().err, "the folder is no repository, which git would say"

"""The statistics of a comparison: by hand, against known quantiles, and in simulated evaluations."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpoctl.errors import UsageError
from dpoctl.runs.comparison import (
    MeasuredRun,
    Paired,
    RunComparison,
    paired_difference,
    sign_flip_p_value,
    verdict,
)
from dpoctl.runs.record_values import RecordValues, read_record_values, write_record_values


def of(values: list[float]) -> tuple[Any, Any]:
    return np.array(values), np.ones(len(values))


def test_a_difference_of_single_records_is_that_of_a_paired_t_interval() -> None:
    first, second = [0.0, 1.0, 0.0, 0.0, 1.0, 0.0], [1.0, 1.0, 0.0, 1.0, 1.0, 1.0]
    found = paired_difference(of(first), of(second), np.arange(6))
    assert found is not None
    # The differences are 1, 0, 0, 1, 0, 1: mean 1/2, variance 0.3; t of 5 degrees of freedom is 2.5706.
    spread = 2.5706 * math.sqrt(0.3 / 6)
    assert found.difference == pytest.approx(0.5)
    assert found.interval == pytest.approx((0.5 - spread, 0.5 + spread), abs=1e-4)
    # Of the 8 combinations of three signs, +++ and --- give a sum as large.
    assert found.p_value == 0.25
    assert not found.is_shown


def test_records_of_one_prompt_count_as_one() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=20), rng.normal(0.3, size=20)
    once = paired_difference(of(list(first)), of(list(second)), np.arange(20))
    each = np.repeat(np.arange(20), 9)
    often = paired_difference(of(list(first[each])), of(list(second[each])), each)
    assert once is not None
    assert often is not None
    assert often.difference == pytest.approx(once.difference)
    assert often.interval == pytest.approx(once.interval)
    assert often.p_value == pytest.approx(once.p_value)


def test_a_ratio_is_that_of_the_sums_and_fewer_than_five_prompts_have_no_interval() -> None:
    counts = np.array([1.0, 3.0, 0.0])
    found = paired_difference((np.array([2.0, 6.0, 0.0]), counts), (np.array([3.0, 9.0, 0.0]), counts), np.arange(3))
    assert found == Paired(1.0, None, 0.5)
    assert paired_difference((counts, counts * 0), (counts, counts), np.arange(3)) is None


def test_the_p_value_is_exact_for_few_and_drawn_for_many() -> None:
    assert sign_flip_p_value(np.zeros(9)) == 1.0
    assert sign_flip_p_value(np.ones(10)) == 2 / 1024
    assert sign_flip_p_value(np.ones(100)) == pytest.approx(1e-4)
    # Of fair coins, 59 heads of 100 or further off: 0.0886.
    assert sign_flip_p_value(np.array([1.0] * 59 + [-1.0] * 41)) == pytest.approx(0.0886, abs=0.01)


def test_in_simulated_evaluations_the_interval_covers_the_truth_and_the_p_value_is_uniform() -> None:
    rng, covered, small, trials = np.random.default_rng(1), 0, 0, 400
    for _ in range(trials):
        prompts = np.repeat(np.arange(30), rng.integers(1, 6, 30))
        skill = rng.normal(size=30)[prompts]
        first = (skill + rng.normal(size=len(prompts)) > 0).astype(float)
        second = (skill + rng.normal(size=30)[prompts] > 0).astype(float)
        found = paired_difference((first, np.ones(len(prompts))), (second, np.ones(len(prompts))), prompts)
        assert found is not None
        assert found.interval is not None
        covered += found.interval[0] <= 0 <= found.interval[1]
        small += found.p_value <= 0.1
    assert 0.9 <= covered / trials <= 0.99
    assert 0.05 <= small / trials <= 0.15


def test_values_come_back_and_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "official.records.npz"
    values = RecordValues(("a/b", "c"), np.array([1, -2]), np.array([[0.5, 1.0], [2.0, 3.0]]), np.ones((2, 2)))
    write_record_values(path, {"eval": values, "a.b": values})
    back = read_record_values(path)
    assert list(back) == ["eval", "a.b"]
    assert back["a.b"].names == ("a/b", "c")
    assert all(np.array_equal(getattr(back["eval"], name), getattr(values, name)) for name in ("prompts", "sums"))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UsageError, match="is damaged"):
        read_record_values(path)
    assert read_record_values(tmp_path / "none.npz") == {}


@pytest.mark.parametrize(
    ("metric", "paired", "words"),
    [
        ("rewards/accuracies", Paired(0.1, (0.05, 0.15), 0.001), "better than a: rewards/accuracies 0.6 -> 0.7"),
        ("rewards/accuracies", Paired(-0.1, (-0.15, -0.05), 0.001), "worse than a"),
        ("rewards/accuracies", Paired(0.1, (-0.05, 0.15), 0.2), "no difference shown from a"),
        (
            "rewards/accuracies",
            Paired(0.0, (0.0, 0.0), 1.0),
            "no difference shown from a: rewards/accuracies 0.6",
        ),
        ("rewards/accuracies", Paired(0.1, None, 0.2), "no difference shown from a"),
        ("rewards/accuracies", None, "not comparable with a record by record"),
        ("loss", Paired(0.1, (0.05, 0.15), 0.001), "worse than a: loss 0.6 -> 0.7"),
        ("other", None, "no metric that a has too"),
    ],
)
def test_a_verdict_needs_an_interval_without_zero(metric: str, paired: Paired | None, words: str) -> None:
    metrics = {metric: [(0.6, None), (0.7, None)]}
    line = verdict("b", "a", metrics, 1, {} if paired is None else {metric: paired})
    assert line.startswith(f"verdict: b: {words}")


def judged_run(folder: Path, wins: list[float | None], prompts: str) -> MeasuredRun:
    file = folder / "evals" / "official.json"
    file.parent.mkdir(parents=True)
    rows = [{"prompt": prompt, "judge": {"win": win}} for prompt, win in zip(prompts, wins, strict=True)]
    file.with_suffix(".samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rate = float(np.mean([win for win in wins if win is not None]))
    report = {"data": {"eval": {"key": "k"}}, "model": "m", "judge": {"win_rate": rate}}
    return MeasuredRun(folder, "method: dpo", file, report)


def test_votes_on_the_same_prompts_are_compared_prompt_by_prompt(tmp_path: Path) -> None:
    one = judged_run(tmp_path / "one", [0, 0, 1, 0.5, 0, None, 0], "aabcdef")
    two = judged_run(tmp_path / "two", [1, 1, 1, 0.5, 1, 1, 1], "aabcdef")
    comparison = RunComparison([one, two])
    found = comparison.paired[1]["judge.win_rate"]
    # Of the six votes that both have, the differences are 1, 1, 0, 0, 1, 1; those of the first two share a prompt.
    assert found.difference == pytest.approx(4 / 6)
    assert found.p_value == 0.25
    assert comparison.verdicts()[0].startswith(f"verdict: {tmp_path / 'two'}: better than")
    other = judged_run(tmp_path / "other", [1, 1], "ax")
    assert "judge.win_rate" not in RunComparison([one, other]).paired[1]

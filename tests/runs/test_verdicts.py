"""The verdict of a result, and its breakdown by length."""

from typing import Any

import numpy as np
import pytest

from dpoctl.runs.record_values import RecordValues
from dpoctl.runs.statistics import wilson_interval
from dpoctl.runs.verdicts import accuracy_by_length, share_difference, verdict_of, vote_words, wins_by_length


def counted(share: float, count: int = 100) -> dict[str, Any]:
    return {"share": share, "ci": list(wilson_interval(share, count))}


def judged(before: float, after: float) -> dict[str, Any]:
    return {"judge": {"target": "kind", "reference": {"kind": counted(before)}, "policy": {"kind": counted(after)}}}


ACCURATE = {"rewards/accuracies": 0.7, "rewards/accuracies_ci": [0.6, 0.8], "rewards/margins": 0.1}


@pytest.mark.parametrize(
    ("report", "words"),
    [
        (ACCURATE, "better: the chosen answer has the higher reward in 70\xa0% (60\xa0% to 80\xa0%) of the pairs"),
        (ACCURATE | {"rewards/accuracies_ci": [0.4, 0.8]}, "no difference shown: the chosen answer"),
        (ACCURATE | {"rewards/accuracies": 0.1, "rewards/accuracies_ci": [0.05, 0.2]}, "worse: the chosen answer"),
        (
            {"rewards/accuracies": 0, "rewards/accuracies_ci": [0, 0.03], "rewards/margins": 0.0},
            "no difference shown: no reward differs from another",
        ),
        (ACCURATE | judged(0.5, 0.8), "better: kind answers 50\xa0% -> 80\xa0% (+30 points, +16.9 to +41.7)"),
        (ACCURATE | judged(0.5, 0.52), "no difference shown: kind answers"),
        (ACCURATE | judged(0.8, 0.5), "worse: kind answers"),
        (
            judged(0.5, 0.8) | {"judge": {"win_rate": 0.4, "win_rate_ci": [0.3, 0.49]}},
            "worse: the judge prefers the policy in 40\xa0% (30\xa0% to 49\xa0%) of the pairs",
        ),
    ],
)
def test_the_first_number_that_there_is_decides(report: dict[str, Any], words: str) -> None:
    assert str(verdict_of(report)).startswith(f"verdict: {words}")


def test_a_result_of_demonstrations_has_no_verdict() -> None:
    assert verdict_of({"loss": 1.0, "loss_ci": [0.9, 1.1]}) is None


def test_the_interval_of_a_difference_is_that_of_newcombe() -> None:
    # His example: 56 of 70 and 48 of 80; the score interval of the difference 0.2 is 0.0524 to 0.3339.
    low, high = share_difference(counted(48 / 80, 80), counted(56 / 70, 70))
    assert (low, high) == (pytest.approx(0.0524, abs=1e-4), pytest.approx(0.3339, abs=1e-4))


def test_accuracy_is_broken_down_by_the_length_of_the_chosen_answer() -> None:
    names = ("rewards/accuracies", "lengths/chosen", "lengths/rejected")
    sums = np.array([[1.0, 0, 2, 1, 0], [5, 10, 42, 30, 0], [10, 10, 40, 10, 0]])
    values = RecordValues(names, np.arange(5), sums, np.array([[1.0, 1, 2, 1, 0]] * 3))
    parts = accuracy_by_length(values)
    assert [(part.name, part.value, part.count) for part in parts] == [
        ("shorter", 1.0, 1),
        ("about as long", 0.5, 2),
        ("longer", 1.0, 1),
    ]
    assert accuracy_by_length(RecordValues(("nll_loss",), np.arange(1), sums[:1, :1], sums[:1, :1])) == []


def test_votes_are_said_and_broken_down_by_the_length_of_the_answer() -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "policy": "one", "reference": "one two", "judge": {"win": 0, "verdicts": ["second", "first"]}},
        {"prompt": "b", "policy": "one two", "reference": "one", "judge": {"win": 1, "ratings": [4, 2]}},
        {"prompt": "c", "policy": "one two", "reference": "one", "judge": {"win": 0.5, "verdicts": ["first", "first"]}},
        {"prompt": "d", "policy": "one", "reference": "one", "judge": {"win": None, "verdicts": [None, "tie"]}},
        {"prompt": "e", "policy": "one", "reference": "one"},
    ]
    assert [vote_words(row) for row in rows] == [
        "judge: prefers the reference; second, first",
        "judge: prefers the policy; 4, 2",
        "judge: tie; first, first",
        "judge: cannot be read; None, tie",
        "",
    ]
    assert [(part.name, part.value, part.count) for part in wins_by_length(rows)] == [
        ("shorter", 0.0, 1),
        ("longer", 0.75, 2),
    ]
    assert wins_by_length([]) == []

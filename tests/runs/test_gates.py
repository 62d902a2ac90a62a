"""Gates: each is decided by a number of the result, or fails and says why."""

from typing import Any

import pytest

from dpoctl.recipe.eval_sections import GateSection
from dpoctl.runs.gates import check_gates, find_metric, metric_paths

REPORT: dict[str, Any] = {
    "run": "runs/x",
    "official": True,
    "rewards/accuracies": 0.7,
    "rewards/accuracies_ci": [0.6, 0.8],
    "kl": 9.0,
    "loss": float("nan"),
    "judge": {"win_rate": 0.6, "win_rate_ci": [0.5, 0.7], "policy": {"kind": {"share": 0.25, "ci": [0.1, 0.4]}}},
    "benchmarks": {"a.b": {"acc": {"delta": -0.01, "delta_ci": [-0.03, 0.01]}}},
}


@pytest.mark.parametrize(
    ("gate", "passed", "line"),
    [
        (
            {"metric": "rewards/accuracies", "min": 0.65},
            True,
            "gate passed: rewards/accuracies 0.7 (0.6 to 0.8), must be at least 0.65",
        ),
        (
            {"metric": "rewards/accuracies", "min": 0.65, "by": "lower"},
            False,
            "gate failed: rewards/accuracies 0.7 (0.6 to 0.8), by its lower end, must be at least 0.65",
        ),
        ({"metric": "judge.win_rate", "min": 0.5, "by": "lower"}, True, None),
        ({"metric": "judge.win_rate", "max": 0.69, "by": "upper"}, False, None),
        ({"metric": "judge.policy.kind.share", "max": 0.3, "by": "upper"}, False, None),
        ({"metric": "benchmarks.a.b.acc.delta", "min": -0.02}, True, None),
        ({"metric": "kl", "min": 1, "max": 8}, False, "gate failed: kl 9, must be at least 1 and at most 8"),
        (
            {"metric": "kl", "max": 10, "by": "upper"},
            False,
            "gate failed: kl: it has no interval, so it has no upper end",
        ),
        ({"metric": "judge.winrate", "min": 0}, False, "gate failed: judge.winrate: it is not in the result"),
        ({"metric": "judge", "min": 0}, False, "gate failed: judge: it is not in the result"),
        ({"metric": "official", "min": 0}, False, "gate failed: official: it is not in the result"),
        ({"metric": "run", "min": 0}, False, None),
        ({"metric": "loss", "max": 1}, False, "gate failed: loss: it is nan"),
    ],
)
def test_a_gate_says_what_it_compared(gate: dict[str, Any], passed: bool, line: str | None) -> None:
    (result,) = check_gates(REPORT, [GateSection(**gate)])
    assert result.passed == passed
    assert line in (None, str(result))
    assert result.to_dict()["passed"] == passed


def test_all_numbers_are_found_by_their_paths() -> None:
    paths = metric_paths(REPORT)
    assert paths == [
        *("rewards/accuracies", "kl", "loss", "judge.win_rate", "judge.policy.kind.share"),
        "benchmarks.a.b.acc.delta",
    ]
    assert all(find_metric(REPORT, path) is not None for path in paths)
    assert find_metric(REPORT, "judge.policy.kind.share") == (0.25, (0.1, 0.4))
    assert find_metric(REPORT, "kl") == (9.0, None)

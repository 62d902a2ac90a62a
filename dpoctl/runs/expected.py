"""The metrics that a recipe expects a run to end with, compared with those that it has."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

NAME = "expected.json"
"""The file of the comparison, in the run directory."""


@dataclass(frozen=True)
class ExpectedMetric:
    """A metric of a run beside what its recipe expects.

    Attributes:
        metric: its name in `metrics.jsonl`.
        low: the lowest expected value.
        high: the highest expected value.
        value: the last value of the run; None if the run has not measured it, or it is not finite.
        is_met: whether it is between the two.
    """

    metric: str
    low: float
    high: float
    value: float | None
    is_met: bool

    def __str__(self) -> str:
        """Say the value, the range, and whether one is in the other."""
        measured = "not measured" if self.value is None else f"{self.value:.4g}"
        return f"{self.metric} {measured}, expected {self.low:g} to {self.high:g}: {'yes' if self.is_met else 'NO'}"


def compare(expected: Mapping[str, Sequence[float]], rows: Iterable[Mapping[str, Any]]) -> list[ExpectedMetric]:
    """Compare the last values of metrics with what is expected.

    Args:
        expected: The lowest and the highest value of each metric.
        rows: The rows of `metrics.jsonl`, in order.
    """
    last: dict[str, Any] = {}
    for row in rows:
        last |= row
    found = []
    for metric, (low, high) in expected.items():
        value = last.get(metric)
        number = float(value) if isinstance(value, int | float) and math.isfinite(value) else None
        found.append(ExpectedMetric(metric, low, high, number, number is not None and low <= number <= high))
    return found


def to_dicts(comparisons: Iterable[ExpectedMetric]) -> list[dict[str, Any]]:
    """Return comparisons as they are written to a file."""
    return [asdict(one) for one in comparisons]


def read_comparisons(run: Path) -> list[ExpectedMetric]:
    """Return the comparisons that a run has written; none if its recipe expects nothing, or it has not ended."""
    try:
        return [ExpectedMetric(**one) for one in json.loads((run / NAME).read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return []

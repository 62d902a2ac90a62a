"""Gates: bounds on the metrics of a result, which `dpoctl eval` and `dpoctl compare` check for a script."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dpoctl.recipe.eval_sections import GateSection
from dpoctl.runs.charts import number

INTERVAL = "_ci"
ENDS = {"lower": 0, "upper": 1}


@dataclass(frozen=True)
class GateResult:
    """A gate and what became of it.

    Attributes:
        metric: the path of the metric in the result.
        value: the value there; None if there is none.
        interval: its 95 % interval; None if there is none.
        by: the number that was compared: the value, or the lower or upper end of the interval.
        min: the lower bound; None if there is none.
        max: the upper bound; None if there is none.
        passed: whether the gate is open.
        reason: why it could not be decided, and so failed; empty otherwise.
    """

    metric: str
    value: float | None
    interval: tuple[float, float] | None
    by: str
    min: float | None
    max: float | None
    passed: bool
    reason: str = ""

    def __str__(self) -> str:
        verdict = "passed" if self.passed else "failed"
        if self.reason:
            return f"gate {verdict}: {self.metric}: {self.reason}"
        assert self.value is not None
        spread = f" ({number(self.interval[0])} to {number(self.interval[1])})" if self.interval else ""
        by = "" if self.by == "value" else f", by its {self.by} end"
        bounds = {"at least": self.min, "at most": self.max}
        wanted = " and ".join(f"{words} {number(bound)}" for words, bound in bounds.items() if bound is not None)
        return f"gate {verdict}: {self.metric} {number(self.value)}{spread}{by}, must be {wanted}"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, for JSON."""
        return asdict(self)


def check_gates(report: Mapping[str, Any], gates: Sequence[GateSection]) -> list[GateResult]:
    """Check each gate against a result; a metric that is not in it fails.

    Args:
        report: the result of `dpoctl eval`.
        gates: those of the recipe.
    """
    return [_check(report, gate) for gate in gates]


def find_metric(report: Mapping[str, Any], path: str) -> tuple[float, tuple[float, float] | None] | None:
    """Return a number of a result and its interval, by its dotted path; None if there is no such number.

    Names may contain dots themselves. The interval of `a.b` is at `a.b_ci`; that of a share is beside it, at `ci`.
    """
    table, name = _table_of(report, path)
    if table is None:
        return None
    value = table[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    interval = table.get(f"{name}{INTERVAL}", table.get("ci") if name == "share" else None)
    is_interval = isinstance(interval, list | tuple) and len(interval) == 2 and all(map(_is_finite, interval))
    return float(value), (float(interval[0]), float(interval[1])) if is_interval else None


def metric_paths(report: Mapping[str, Any], above: str = "") -> list[str]:
    """Return the paths of all numbers in a result that `find_metric` finds, without intervals and their parts."""
    paths = []
    for key, value in report.items():
        path = f"{above}{key}"
        if isinstance(value, Mapping):
            paths += metric_paths(value, f"{path}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            paths.append(path)
    return paths


def _check(report: Mapping[str, Any], gate: GateSection) -> GateResult:
    found = find_metric(report, gate.metric)
    value, interval = (None, None) if found is None else found
    reason, passed = "", False
    if value is None:
        reason = "it is not in the result"
    elif gate.by in ENDS and interval is None:
        reason = f"it has no interval, so it has no {gate.by} end"
    else:
        compared = value if interval is None or gate.by == "value" else interval[ENDS[gate.by]]
        if not math.isfinite(compared):
            reason = f"it is {compared}"
        else:
            passed = (gate.min is None or compared >= gate.min) and (gate.max is None or compared <= gate.max)
    return GateResult(gate.metric, value, interval, gate.by, gate.min, gate.max, passed, reason)


def _table_of(table: Mapping[str, Any], path: str) -> tuple[Mapping[str, Any] | None, str]:
    """Return the innermost table of a path, and the name in it; None if the path leads nowhere."""
    if path in table:
        return table, path
    for at, letter in enumerate(path):
        inner = table.get(path[:at]) if letter == "." else None
        if isinstance(inner, Mapping):
            found, name = _table_of(inner, path[at + 1 :])
            if found is not None:
                return found, name
    return None, path


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)

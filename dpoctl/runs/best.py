"""The best evaluation of a run: which step it was, and whether later ones still improve."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from dpoctl.errors import RunError
from dpoctl.files import to_json, write_atomically
from dpoctl.runs.metrics import MetricsFile

NAME = "best.json"


@dataclass
class BestEvaluation:
    """The best value of a metric so far. Only a strictly better one replaces it.

    The evaluation before the first step counts as none: there is no checkpoint of it.

    Attributes:
        metric: the metric that is watched.
        mode: `max` if high values are good, `min` if low ones are.
        step: the step of the best evaluation; None before the first one.
        value: the value of the metric there.
        last_step: the step of the last evaluation.
        last_value: the value there; None if it was not finite.
        mark: the value that the next improvement is counted from.
        waited: the number of evaluations since that improvement.
    """

    metric: str
    mode: Literal["max", "min"]
    step: int | None = None
    value: float | None = None
    last_step: int | None = None
    last_value: float | None = None
    mark: float | None = None
    waited: int = 0

    def watch(self, step: int, metrics: Mapping[str, float], min_delta: float = 0.0) -> None:
        """Take the metrics of an evaluation.

        Args:
            step: the step after which they were computed.
            metrics: of all eval sets.
            min_delta: a change of at most this much does not end the waiting for an improvement.

        Raises:
            RunError: The metric is not among them.
        """
        if step == 0:
            return
        if self.metric not in metrics:
            raise RunError(
                f"training.keep_best.metric: the evaluation at step {step} has no {self.metric!r}",
                hint=f"use one of {', '.join(name for name in metrics if not name.endswith('_se'))}",
            )
        value = metrics[self.metric]
        is_finite = math.isfinite(value)
        self.last_step, self.last_value = step, value if is_finite else None
        self.waited += 1
        if is_finite and (self.mark is None or self._gain(value, self.mark) > min_delta):
            self.mark, self.waited = value, 0
        if is_finite and (self.value is None or self._gain(value, self.value) > 0):
            self.step, self.value = step, value

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold."""
        return asdict(self)

    def load_state(self, state: Mapping[str, Any] | None) -> None:
        """Continue from the state of a checkpoint; one of another metric says nothing about this one."""
        if state is None or any(state[name] != getattr(self, name) for name in ("metric", "mode")):
            return
        for field in fields(self):
            setattr(self, field.name, state[field.name])

    def _gain(self, value: float, before: float) -> float:
        return value - before if self.mode == "max" else before - value


def write_best(run: Path, best: BestEvaluation | None) -> None:
    """Write into a run which step its model is of, if that is not the last one."""
    if best is None or best.step is None:
        (run / NAME).unlink(missing_ok=True)
        return
    names = ("metric", "mode", "step", "value", "last_step", "last_value")
    write_atomically(run / NAME, to_json({name: getattr(best, name) for name in names}))


def read_best(run: Path) -> dict[str, Any] | None:
    """Return what a run says of its best evaluation, whose model it has; None if its model is of the last step."""
    path = run / NAME
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def model_step(run: Path) -> int | None:
    """Return the step of the model of a run; None if it is not known."""
    if (best := read_best(run)) is not None:
        return int(best["step"])
    return max((int(row["step"]) for row in MetricsFile(run / "metrics.jsonl").rows()), default=None)

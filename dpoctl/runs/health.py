"""Health checks of a running run: rules over its metrics that report symptoms while there is time to stop it.

Each rule looks at the rows of metrics so far and returns a symptom with its likely cause and what to do. A symptom is
reported once. Rules know no model and no loss: the values that they expect are in `Expectation`. A rule that sees a
change compares it with its standard error: a change that chance explains is no symptom.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from statistics import fmean, variance
from typing import Any

MetricsRow = Mapping[str, Any]

STUCK = 1e-3
"""A loss that differs from its first value by less than this share has not changed."""
EARLY = 0.1
"""A perfect accuracy before this share of the run is suspicious."""
FALL = 10.0
"""Chosen answers may lose this many nats before it is reported."""
GROWTH = 1.5
"""Sampled texts may grow by this factor after the first evaluation."""
TREND_ROWS = 3
"""Number of consecutive rows that must agree on a trend."""
STUCK_STEPS = 20
"""Fewer steps after the warm-up may leave a loss where it is."""
GROUP_ROWS = 5
"""Number of rows at each end of a series whose rows are of different data."""
ENOUGH_PAIRS = 100
"""A perfect accuracy on fewer pairs may be chance."""
Z99 = 2.576
"""Half the width of a 99 % interval, in standard errors."""
MOVED = 0.01
"""A policy whose rewards are larger than this has changed."""


@dataclass(frozen=True)
class Expectation:
    """The values of a healthy run.

    Attributes:
        num_steps: number of steps of the run.
        warmup_steps: number of steps of the warm-up, in which the loss may stay the same.
        at_init: the loss while policy and reference are equal; None if it depends on the data.
        rows_per_step: number of training rows of a step.
    """

    num_steps: int
    warmup_steps: int = 0
    at_init: float | None = None
    rows_per_step: int = 1


@dataclass(frozen=True)
class Symptom:
    """Something in the metrics that looks wrong.

    Attributes:
        code: a short name for programs; does not change.
        step: the step whose metrics show it.
        message: the observation and its likely cause.
        hint: what to do.
    """

    code: str
    step: int
    message: str
    hint: str

    def __str__(self) -> str:
        return f"step {self.step:,}: {self.message}"


class Health:
    """Applies the rules to the rows of metrics of one run.

    Args:
        expected: the values of a healthy run.
    """

    def __init__(self, expected: Expectation) -> None:
        self.symptoms: list[Symptom] = []
        self._expected = expected
        self._train: list[MetricsRow] = []
        self._eval: list[MetricsRow] = []

    def watch(self, row: MetricsRow) -> list[Symptom]:
        """Add a row of metrics, with its `step`, and return the new symptoms."""
        rows = self._eval if any(name.startswith("eval_") for name in row) else self._train
        rows.append(row)
        known = {symptom.code for symptom in self.symptoms}
        found = [symptom for rule in RULES for symptom in rule(self._expected, self._train, self._eval)]
        fresh = [symptom for symptom in found if symptom.code not in known]
        self.symptoms += fresh
        return fresh


HealthRule = Callable[[Expectation, Sequence[MetricsRow], Sequence[MetricsRow]], Iterable[Symptom]]


def not_finite(expected: Expectation, train: Sequence[MetricsRow], evals: Sequence[MetricsRow]) -> Iterable[Symptom]:
    """Report a metric that is infinite or NaN."""
    for rows in (train, evals):
        odd = [name for name, value in (rows[-1].items() if rows else ()) if not _is_finite(value)]
        if odd:
            yield Symptom(
                "not_finite",
                rows[-1]["step"],
                f"{odd[0]} is not finite: the run has diverged, or one row has very unusual data",
                "lower training.learning_rate, or look at the rows with `dpoctl inspect`",
            )


def wrong_start(expected: Expectation, train: Sequence[MetricsRow], evals: Sequence[MetricsRow]) -> Iterable[Symptom]:
    """Report a first loss that differs from the loss of equal policy and reference."""
    first = evals[0] if evals else None
    if expected.at_init is None or first is None or first["step"] != 0 or "eval_loss" not in first:
        return
    loss = first["eval_loss"]
    if _is_finite(loss) and abs(loss - expected.at_init) > 0.01 * abs(expected.at_init):
        yield Symptom(
            "wrong_start",
            0,
            f"eval_loss before the first step is {loss:.4f}, but must be {expected.at_init:.4f}: "
            "the reference is not the model that training starts from",
            "check dpo.reference and lora.start, and that dropout is off",
        )


def stuck(expected: Expectation, train: Sequence[MetricsRow], evals: Sequence[MetricsRow]) -> Iterable[Symptom]:
    """Report a loss that stays at its first value."""
    recent = train[-TREND_ROWS:]
    warm = expected.warmup_steps + 0.1 * expected.num_steps
    if expected.at_init is None or len(recent) < TREND_ROWS or recent[0]["step"] <= warm:
        return
    if any(abs(_number(row, "loss") - expected.at_init) >= STUCK * abs(expected.at_init) for row in recent):
        return
    # A policy may have changed without a change of the mean loss; then its steps are not too small.
    if any(abs(_number(row, f"rewards/{side}", 0.0)) > MOVED for row in recent for side in ("chosen", "rejected")):
        return
    if all(_number(row, "grad_norm", 1.0) == 0.0 for row in recent):
        cause, hint = (
            "the gradient is zero: no token of the answers is trained on, or no parameter is trained",
            "check the masks with `dpoctl inspect`, and the number of trained parameters at the start of the run",
        )
    elif recent[-1]["step"] - expected.warmup_steps < STUCK_STEPS:
        return
    else:
        cause, hint = (
            "the updates are too small",
            "raise training.learning_rate, or check that its schedule has not reached 0",
        )
    yield Symptom(
        "stuck", recent[-1]["step"], f"the loss is still at its first value, {expected.at_init:.4f}: {cause}", hint
    )


def chosen_falling(
    expected: Expectation, train: Sequence[MetricsRow], evals: Sequence[MetricsRow]
) -> Iterable[Symptom]:
    """Report chosen answers that become less likely (likelihood displacement)."""
    # An eval set has the same answers every time; those of the training steps differ.
    series = [(row["step"], _number(row, "eval_logps/chosen")) for row in evals if "eval_logps/chosen" in row]
    is_paired = bool(series)
    series = series or [(row["step"], _number(row, "logps/chosen")) for row in train]
    count = 1 if series and series[0][0] == 0 else TREND_ROWS if is_paired else max(GROUP_ROWS, len(series) // 3)
    if len(series) < 2 * count:
        return
    first, last = ([logps for _, logps in part] for part in (series[:count], series[-count:]))
    before = fmean(first)
    fall = before - fmean(last)
    error = 0.0 if is_paired else _error_of_change(first, last)
    if fall > max(FALL, 0.1 * abs(before), error):
        spread = f" (99.9 % interval {fall - error:.1f} to {fall + error:.1f})" if error else ""
        yield Symptom(
            "chosen_falling",
            series[-1][0],
            f"chosen answers have become less likely: {fall:.1f} nats on average since the start{spread}",
            "add dpo.loss.sft_weight, lower training.learning_rate, or raise dpo.loss.beta",
        )


def perfect_early(expected: Expectation, train: Sequence[MetricsRow], evals: Sequence[MetricsRow]) -> Iterable[Symptom]:
    """Report a perfect accuracy, on many pairs, after very few steps."""
    perfect = list(takewhile(lambda row: _number(row, "rewards/accuracies") >= 0.999, reversed(train)))
    if len(perfect) < TREND_ROWS or train[-1]["step"] > EARLY * expected.num_steps:
        return
    before = train[-len(perfect) - 1]["step"] if len(train) > len(perfect) else 0
    pairs = (train[-1]["step"] - before) * expected.rows_per_step
    if pairs >= ENOUGH_PAIRS:
        yield Symptom(
            "perfect_early",
            train[-1]["step"],
            f"in all of the last {pairs:,} pairs the chosen answer has the higher reward: the answers may differ in "
            "something superficial, such as length, a leading space, or the model that wrote them",
            "compare some rows with `dpoctl inspect`, and compare the lengths in data_report.json",
        )


def growing_texts(expected: Expectation, train: Sequence[MetricsRow], evals: Sequence[MetricsRow]) -> Iterable[Symptom]:
    """Report sampled texts that become longer and longer."""
    name = "eval_samples/median_length"
    rows = [row for row in evals if name in row and f"{name}_se" in row]
    if len(rows) < 2:
        return
    (first, last), step = (_number(row, name) for row in (rows[0], rows[-1])), rows[-1]["step"]
    error = Z99 * math.hypot(*(_number(row, f"{name}_se") for row in (rows[0], rows[-1])))
    is_longest = last >= max(_number(row, name) for row in rows)
    if 0 < GROWTH * first < last and last - first > error and is_longest:
        yield Symptom(
            "growing_texts",
            step,
            f"sampled texts have grown from {first:g} to {last:g} words (99 % interval of the change "
            f"{last - first - error:.1f} to {last - first + error:.1f}): "
            "the model may be learning to write longer text, not better text",
            "compare the lengths of chosen and rejected answers in data_report.json; "
            "the losses sigmoid_norm, simpo, r_dpo and ld_dpo correct for length",
        )


RULES: tuple[HealthRule, ...] = (
    not_finite,
    wrong_start,
    stuck,
    chosen_falling,
    perfect_early,
    growing_texts,
)


def _error_of_change(before: Sequence[float], after: Sequence[float]) -> float:
    """Return the half width of the 99.9 % interval of the change between two groups of rows.

    Rules look at every new row, so the usual 95 % would often be exceeded by chance.
    """
    freedom = len(before) + len(after) - 2
    # The quantile of Student's t, to 2 % from eight degrees of freedom on.
    quantile = 3.29 + 8 / freedom + 45 / freedom**2
    return quantile * math.sqrt(variance(before) / len(before) + variance(after) / len(after))


def _is_finite(value: Any) -> bool:
    # The metrics file has the string "nan": JSON has no such number.
    return not isinstance(value, str) and math.isfinite(value)


def _number(row: MetricsRow, name: str, default: float = math.nan) -> float:
    value = row.get(name, default)
    return value if _is_finite(value) else math.nan

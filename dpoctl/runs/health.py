"""What the metrics say of a run's health, in plain words, while there is time to stop it.

Each rule looks at the rows of metrics so far and names a symptom, its likely cause and a remedy. A symptom is told
once. Rules know nothing of a model or a loss: what they need to expect stands in `Expectation`.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

Row = Mapping[str, Any]

STUCK = 1e-3
"""A loss that differs from its first value by less than this share of it has not moved."""
EARLY = 0.1
"""The share of a run before which a perfect accuracy is suspicious."""
FALL = 10.0
"""Nats that chosen answers may lose before it is worth a word."""
GROWTH = 1.5
"""How many times as long as at the first evaluation sampled texts may become."""
PATIENCE = 3
"""Rows in a row that must agree before a trend is called one."""


@dataclass(frozen=True)
class Expectation:
    """What a healthy run of this recipe looks like.

    Attributes:
        num_steps: steps of the run.
        warmup_steps: steps before which nothing can have moved.
        at_init: the loss while policy and reference are equal; None where it depends on the data.
    """

    num_steps: int
    warmup_steps: int = 0
    at_init: float | None = None


@dataclass(frozen=True)
class Symptom:
    """Something that looks wrong.

    Attributes:
        code: a short name that stays the same while words change.
        step: the step whose metrics showed it.
        message: what is seen, and what it likely comes from.
        hint: what to do.
    """

    code: str
    step: int
    message: str
    hint: str

    def __str__(self) -> str:
        return f"step {self.step:,}: {self.message}"


class Health:
    """Watches the rows of metrics of one run.

    Args:
        expected: what would be healthy.
        earlier: rows written before a resume; what they showed has been told already.
    """

    def __init__(self, expected: Expectation, earlier: Iterable[Row] = ()) -> None:
        self.symptoms: list[Symptom] = []
        self._expected = expected
        self._train: list[Row] = []
        self._eval: list[Row] = []
        for row in earlier:
            self.watch(row)

    def watch(self, row: Row) -> list[Symptom]:
        """Take a row of metrics, with its `step`, and return the symptoms that were not seen before."""
        rows = self._eval if any(name.startswith("eval_") for name in row) else self._train
        rows.append(row)
        known = {symptom.code for symptom in self.symptoms}
        found = [symptom for rule in RULES for symptom in rule(self._expected, self._train, self._eval)]
        fresh = [symptom for symptom in found if symptom.code not in known]
        self.symptoms += fresh
        return fresh


Rule = Callable[[Expectation, Sequence[Row], Sequence[Row]], Iterable[Symptom]]


def not_finite(expected: Expectation, train: Sequence[Row], evals: Sequence[Row]) -> Iterable[Symptom]:
    """A metric is infinite or no number."""
    for rows in (train, evals):
        odd = [name for name, value in (rows[-1].items() if rows else ()) if not _is_finite(value)]
        if odd:
            yield Symptom(
                "not_finite",
                rows[-1]["step"],
                f"{odd[0]} is not finite: the run has diverged, or a row of the data is extreme",
                "lower training.learning_rate, or look for the row with `dpoctl inspect`",
            )


def wrong_start(expected: Expectation, train: Sequence[Row], evals: Sequence[Row]) -> Iterable[Symptom]:
    """The loss before the first step is not what equal policy and reference must give."""
    first = evals[0] if evals else None
    if expected.at_init is None or first is None or first["step"] != 0 or "eval_loss" not in first:
        return
    loss = first["eval_loss"]
    if _is_finite(loss) and abs(loss - expected.at_init) > 0.01 * abs(expected.at_init):
        yield Symptom(
            "wrong_start",
            0,
            f"eval_loss is {loss:.4f} before the first step and should be {expected.at_init:.4f}: "
            "the reference is not the policy that training starts from",
            "check dpo.reference, lora.start, and that dropout is off",
        )


def stuck(expected: Expectation, train: Sequence[Row], evals: Sequence[Row]) -> Iterable[Symptom]:
    """The loss stays where it began."""
    recent = train[-PATIENCE:]
    warm = expected.warmup_steps + 0.1 * expected.num_steps
    if expected.at_init is None or len(recent) < PATIENCE or recent[0]["step"] <= warm:
        return
    if any(abs(_number(row, "loss") - expected.at_init) >= STUCK * abs(expected.at_init) for row in recent):
        return
    if all(_number(row, "grad_norm", 1.0) == 0.0 for row in recent):
        cause, hint = (
            "the gradient is zero: nothing of the answers is trained on, or nothing of the model is",
            "look at the masks with `dpoctl inspect`, and at how many parameters train",
        )
    else:
        cause, hint = (
            "the updates are too small to matter",
            "raise training.learning_rate, or check that it is not near its end",
        )
    yield Symptom(
        "stuck", recent[-1]["step"], f"the loss is still at its first value, {expected.at_init:.4f}: {cause}", hint
    )


def chosen_falling(expected: Expectation, train: Sequence[Row], evals: Sequence[Row]) -> Iterable[Symptom]:
    """Preferred answers become less likely, only less so than the others (likelihood displacement)."""
    # The same answers every time, where there are some; else those of the steps, which differ.
    series = [(row["step"], _number(row, "eval_logps/chosen")) for row in evals if "eval_logps/chosen" in row]
    series = series or [(row["step"], _number(row, "logps/chosen")) for row in train]
    count = PATIENCE if series and series[0][0] else 1
    if len(series) < 2 * count:
        return
    before = fmean(logps for _, logps in series[:count])
    fall = before - fmean(logps for _, logps in series[-count:])
    if fall > max(FALL, 0.1 * abs(before)):
        yield Symptom(
            "chosen_falling",
            series[-1][0],
            f"chosen answers have become less likely, by {fall:.1f} nats on average since the start",
            "add dpo.loss.sft_weight, lower training.learning_rate, or raise dpo.loss.beta",
        )


def perfect_early(expected: Expectation, train: Sequence[Row], evals: Sequence[Row]) -> Iterable[Symptom]:
    """Every pair is told apart after next to no training."""
    recent = train[-PATIENCE:]
    if len(recent) < PATIENCE or recent[-1]["step"] > EARLY * expected.num_steps:
        return
    if all(_number(row, "rewards/accuracies") >= 0.999 for row in recent):
        yield Symptom(
            "perfect_early",
            recent[-1]["step"],
            "every chosen answer already beats its rejected one: something superficial may tell them apart, "
            "such as length, a leading blank or the model that wrote them",
            "compare some rows with `dpoctl inspect`, and the lengths in data_report.json",
        )


def growing_texts(expected: Expectation, train: Sequence[Row], evals: Sequence[Row]) -> Iterable[Symptom]:
    """Sampled texts become longer and longer."""
    name = "eval_samples/median_length"
    lengths = [(row["step"], _number(row, name)) for row in evals if name in row]
    if len(lengths) < 2 or lengths[0][1] <= 0:
        return
    (_, first), (step, last) = lengths[0], lengths[-1]
    if last > GROWTH * first and last >= max(length for _, length in lengths):
        yield Symptom(
            "growing_texts",
            step,
            f"sampled texts have grown from {first:g} to {last:g} tokens: length may be what is learned",
            "compare the lengths of chosen and rejected in data_report.json; "
            "sigmoid_norm, simpo, r_dpo and ld_dpo take length into account",
        )


def length_decides(expected: Expectation, train: Sequence[Row], evals: Sequence[Row]) -> Iterable[Symptom]:
    """Chosen answers are much longer than rejected ones."""
    if not train:
        return
    longer, shorter = _number(train[0], "lengths/chosen"), _number(train[0], "lengths/rejected")
    if shorter > 0 and longer > GROWTH * shorter:
        yield Symptom(
            "length_decides",
            train[0]["step"],
            f"chosen answers are {longer / shorter:.1f} times as long as rejected ones ({longer:.0f} and "
            f"{shorter:.0f} tokens): the policy will learn to write longer",
            "sigmoid_norm, simpo, r_dpo and ld_dpo take length into account",
        )


RULES: tuple[Rule, ...] = (
    not_finite,
    wrong_start,
    stuck,
    chosen_falling,
    perfect_early,
    growing_texts,
    length_decides,
)


def _is_finite(value: Any) -> bool:
    # The metrics file has "nan" where JSON has no word for it.
    return not isinstance(value, str) and math.isfinite(value)


def _number(row: Row, name: str, default: float = math.nan) -> float:
    value = row.get(name, default)
    return value if _is_finite(value) else math.nan

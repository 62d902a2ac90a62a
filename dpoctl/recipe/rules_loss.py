"""The rules of advice about the losses of preferences: their scale, what they compare, how they weigh labels."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from dpoctl.recipe.expect import Path
from dpoctl.recipe.facts import Grade, Remark, Situation

Rule = Callable[[Situation], Iterator[Remark]]


class Scale(NamedTuple):
    """The beta that is usual of a loss, and why it is on that scale."""

    low: float
    high: float
    why: str


TOKENS = "rewards are sums over an answer's tokens, not means"
SUMS = Scale(0.01, 0.5, f"{TOKENS}, and a higher beta keeps the policy closer to the reference")
MEANS = Scale(1.0, 10.0, "rewards are means over an answer's tokens, not sums")
SCALES = {
    "cpo": Scale(0.01, 0.5, TOKENS),
    "simpo": MEANS,
    "sigmoid_norm": MEANS,
    "orpo": Scale(0.05, 1.0, "it is the weight of the odds ratio beside the likelihood"),
    "sppo_hard": Scale(5e-4, 5e-3, "the log-ratio that is aimed at is 1 / (2 beta)"),
    "ipo": Scale(0.01, 0.5, "the margin that is aimed at is 1 / (2 beta)"),
}
"""Of the losses whose rewards are not DPO's."""
OFF_SCALE = 2
"""How many times more, or less, than usual is worth a word."""

SMALL_STATISTICS, SMALL_QUANTILES = 16, 32
QUANTILES = ("aot", "aot_unpaired")
"""Losses that compare two distributions, for which more rows are needed than for a mean."""
BALANCE = (1.0, 4 / 3)
TOLERANCE = 0.01


def beta(now: Situation) -> Iterator[Remark]:
    """A beta that belongs to another loss."""
    for path, spec in _losses(now):
        kind, value = _judging(spec), spec.get("beta")
        if not isinstance(value, float):
            continue
        low, high, why = SCALES.get(kind, SUMS)
        is_high = value > OFF_SCALE * high
        if is_high or value < low / OFF_SCALE:
            yield Remark(
                "warning",
                "beta-high" if is_high else "beta-low",
                (*path, "beta"),
                f"beta {value:g} is {'high' if is_high else 'low'} for the loss {kind!r}: {why}; "
                f"{low:g} to {high:g} is usual",
            )


def statistics(now: Situation) -> Iterator[Remark]:
    """Statistics over few rows."""
    size = now.recipe.training.global_batch_size
    for kind in now.facts.coupling:
        grade: Grade = "warning" if size < (SMALL_QUANTILES if kind in QUANTILES else SMALL_STATISTICS) else "note"
        yield Remark(
            grade,
            "statistics-batch",
            ("training", "global_batch_size"),
            f"the loss {kind!r} compares the rows of a step with one another: its statistics are those of "
            f"{size:,} rows, however they are spread over micro-batches and processes",
        )


def balance(now: Situation) -> Iterator[Remark]:
    """Labels of one kind that outweigh the others."""
    if now.facts.labels is None:
        return
    desirable, undesirable = now.facts.labels
    for path, spec in _losses(now):
        if spec["type"] != "kto":
            continue
        if not (desirable and undesirable):
            only = "desirable" if desirable else "undesirable"
            said = f"every training row is {only}: there is nothing that it could be told from"
            yield Remark("warning", "one-label", ("data", "train"), said)
            continue
        good, bad = spec["desirable_weight"] * desirable, spec["undesirable_weight"] * undesirable
        low, high = BALANCE
        if low * bad * (1 - TOLERANCE) <= good <= high * bad * (1 + TOLERANCE):
            continue
        key = "desirable_weight" if good < low * bad else "undesirable_weight"
        needed = low * bad / desirable if good < low * bad else good / high / undesirable
        yield Remark(
            "note",
            "kto-balance",
            (*path, key),
            f"{desirable:,} desirable and {undesirable:,} undesirable rows weigh {good:,.4g} to {bad:,.4g}; "
            f"its authors keep the first between 1 and 4/3 of the second, e.g. by {key}: {needed:.3g}",
        )


def _losses(now: Situation) -> list[tuple[Path, dict[str, Any]]]:
    return now.recipe.dpo.losses if now.recipe.method == "dpo" else []


def _judging(spec: dict[str, Any]) -> str:
    """The loss whose beta it is: of one around another, that one."""
    base = spec.get("base", spec["type"])
    return str(base["type"] if isinstance(base, dict) else base)


RULES: tuple[Rule, ...] = (beta, statistics, balance)

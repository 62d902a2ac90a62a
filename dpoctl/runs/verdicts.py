"""The verdict of a result: whether the policy is better than its reference, and where it is."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpoctl.runs.charts import percent
from dpoctl.runs.gates import find_metric
from dpoctl.runs.record_values import RecordValues
from dpoctl.runs.statistics import share

BETTER, SAME, WORSE = "better", "no difference shown", "worse"
LENGTHS = ("shorter", "about as long", "longer")
ALIKE = 0.1
"""Two lengths are about the same if they differ by at most this share of their mean."""


@dataclass(frozen=True)
class Verdict:
    """A verdict, and the numbers that it rests on.

    Attributes:
        word: `better`, `worse` or `no difference shown`.
        reason: the numbers, in words.
    """

    word: str
    reason: str

    def __str__(self) -> str:
        return f"verdict: {self.word}: {self.reason}"


@dataclass(frozen=True)
class Part:
    """A share among some of the records or samples.

    Attributes:
        name: which ones.
        value: the share.
        interval: its 95 % interval.
        count: their number.
    """

    name: str
    value: float
    interval: tuple[float, float]
    count: int


def verdict_of(report: Mapping[str, Any]) -> Verdict | None:
    """Judge a result by the first of these that it has; None if it has none of them.

    The win rate of a judge, against one half; the share of the answers in a keyword judge's target category, against
    the reference's; the reward accuracy, against one half. The policy is better or worse if a 95 % interval leaves the
    other value out.
    """
    if (found := find_metric(report, "judge.win_rate")) is not None and found[1] is not None:
        return Verdict(_word(found[1], 0.5), f"the judge prefers the policy in {_share(*found)} of the pairs")
    judge = report.get("judge") or {}
    if (target := judge.get("target")) is not None and all(
        target in judge.get(side, {}) for side in ("reference", "policy")
    ):
        before, after = (judge[side][target] for side in ("reference", "policy"))
        low, high = share_difference(before, after)
        change = f"{100 * (after['share'] - before['share']):+.3g} points, {100 * low:+.3g} to {100 * high:+.3g}"
        numbers = f"{percent(before['share'])} -> {percent(after['share'])} ({change})"
        return Verdict(_word((low, high), 0.0), f"{target} answers {numbers}")
    found = find_metric(report, "rewards/accuracies")
    if found is None or found[1] is None:
        return None
    if found[0] == 0 and find_metric(report, "rewards/margins") == (0.0, None):
        return Verdict(SAME, "no reward differs from another: the policy is its reference")
    return Verdict(
        _word(found[1], 0.5),
        f"the chosen answer has the higher reward in {_share(*found)} of the pairs, 50 % is chance",
    )


def share_difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[float, float]:
    """Return the 95 % interval of the difference of two shares, from the interval of each (Newcombe, 1998)."""
    change = after["share"] - before["share"]
    (low0, high0), (low1, high1) = before["ci"], after["ci"]
    down = math.hypot(after["share"] - low1, high0 - before["share"])
    up = math.hypot(high1 - after["share"], before["share"] - low0)
    return change - down, change + up


def accuracy_by_length(values: RecordValues) -> list[Part]:
    """Return the reward accuracy by the length of the chosen answer, compared with that of the rejected one."""
    if not {"rewards/accuracies", "lengths/chosen", "lengths/rejected"} <= set(values.names):
        return []
    pairs = values.counts[values.names.index("rewards/accuracies")]
    has_pairs = pairs > 0
    means = {name: row[has_pairs] / pairs[has_pairs] for name, row in zip(values.names, values.sums, strict=True)}
    return _by_length(
        means["rewards/accuracies"],
        means["lengths/chosen"],
        means["lengths/rejected"],
        [str(prompt) for prompt in values.prompts[has_pairs]],
    )


def wins_by_length(samples: Sequence[Mapping[str, Any]]) -> list[Part]:
    """Return the win rate of the policy by the length in words of its answer, compared with the reference's."""
    rows = [row for row in samples if isinstance((row.get("judge") or {}).get("win"), int | float)]
    words = {side: [float(len(str(row.get(side, "")).split())) for row in rows] for side in ("policy", "reference")}
    return _by_length(
        np.array([float(row["judge"]["win"]) for row in rows]),
        np.array(words["policy"]),
        np.array(words["reference"]),
        [json.dumps(row.get("prompt")) for row in rows],
    )


def vote_words(row: Mapping[str, Any]) -> str:
    """Say how a judge voted on a sample; empty if none did."""
    vote = row.get("judge")
    if not isinstance(vote, Mapping):
        return ""
    wins = {1: "prefers the policy", 0: "prefers the reference", 0.5: "tie", None: "cannot be read"}
    words = f"judge: {wins.get(vote.get('win'), 'cannot be read')}"
    details = [", ".join(map(str, vote.get(name) or ())) for name in ("verdicts", "ratings")]
    return "; ".join([words, *filter(None, details)])


def _by_length(
    values: "np.ndarray[Any, Any]", own: "np.ndarray[Any, Any]", other: "np.ndarray[Any, Any]", prompts: Sequence[str]
) -> list[Part]:
    if not len(values):
        return []
    change = (own - other) / np.maximum((own + other) / 2, 1e-9)
    groups = np.where(change < -ALIKE, 0, np.where(change > ALIKE, 2, 1))
    parts = []
    for number, name in enumerate(LENGTHS):
        at = np.flatnonzero(groups == number)
        if len(at):
            found = share(values[at], [prompts[int(index)] for index in at])
            parts.append(Part(name, found.value, found.interval or (0.0, 1.0), len(at)))
    return parts


def _word(interval: Sequence[float], value: float) -> str:
    low, high = interval
    return SAME if low <= value <= high else BETTER if low > value else WORSE


def _share(value: float, interval: Sequence[float] | None) -> str:
    spread = "" if interval is None else f" ({percent(interval[0])} to {percent(interval[1])})"
    return f"{percent(value)}{spread}"

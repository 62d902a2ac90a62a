"""The judge of a recipe: made from its section, asked about samples, and its votes as numbers with intervals."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from dpoctl.data.records import Text
from dpoctl.errors import UsageError
from dpoctl.recipe.judge_section import JudgeSection, JudgingSection
from dpoctl.runs.statistics import (
    Calibration,
    Estimate,
    corrected,
    length_controlled,
    mean,
    minimum_detectable,
    share,
    summary,
)
from dpoctl.tasks.judges import FIRST, SECOND, CommandJudge, Judge, PairwiseJudge, RubricJudge, Template, Vote
from dpoctl.tasks.samples import Sample
from dpoctl.tasks.served import Client, Endpoint

FOLLOWS_ORDER = 0.5
"""A judge follows the order if it prefers the same place in both orders in a larger share of the pairs than this."""
LABELS = {"a": 1.0, "b": 0.0}


def build_judge(section: JudgeSection) -> Judge:
    """Make the judge of a section, of any type but `keywords`.

    Raises:
        UsageError: its template or its file of calibration cannot be used.
        SetupError: the client or the command is missing.
    """
    if section.calibration is not None:
        read_calibration(section.calibration)
    if section.type == "command":
        return CommandJudge(section.command or ())
    return build_served_judge(section)


def build_served_judge(section: JudgingSection) -> PairwiseJudge | RubricJudge:
    """Make the judge of a section whose type is `pairwise` or `rubric`; see `build_judge`."""
    endpoint = Endpoint(
        section.url or "", section.model or "", section.api_key_env, section.concurrency, section.timeout
    )
    fields = {"max_tokens": section.max_new_tokens, "temperature": section.temperature} | section.request
    sampling = {name: value for name, value in fields.items() if value is not None}
    client = Client(endpoint, section.max_requests)
    template = Template.read(section.type, section.template)
    if section.type == "pairwise":
        return PairwiseJudge(client, template, sampling)
    return RubricJudge(client, template, sampling, section.lowest, section.highest)


def judge_samples(
    section: JudgeSection, judge: Judge, samples: Sequence[Sample]
) -> tuple[dict[str, Any], list[Sample]]:
    """Ask a judge about samples of policy and reference.

    Args:
        section: the section of the judge.
        judge: the judge made of it.
        samples: each with both texts.

    Returns:
        The numbers of the result, under `judge`, and the samples with their votes.
    """
    votes: dict[int, Vote] = {}
    for repeat in sorted({one.repeat for one in samples}):
        at = [index for index, one in enumerate(samples) if one.repeat == repeat]
        asked = [samples[index] for index in at]
        a, b = [one.policy.text for one in asked], [one.reference.text for one in asked if one.reference is not None]
        votes.update(zip(at, judge([one.prompt for one in asked], a, b, repeat=repeat), strict=True))
    voted = [replace(one, vote=votes[index]) for index, one in enumerate(samples)]
    calibration = None if section.calibration is None else calibrate(judge, section.calibration)
    usage = judge.usage
    spent = {"requests": usage.requests, "tokens": usage.tokens, "completion_tokens": usage.completion_tokens}
    named = (
        {"model": section.model, "url": section.url} if section.url else {"command": " ".join(section.command or ())}
    )
    template = {"template": judge.template.digest} if isinstance(judge, PairwiseJudge | RubricJudge) else {}
    return {"type": section.type, **named, **template, **describe_votes(voted, calibration), **spent}, voted


def describe_votes(samples: Sequence[Sample], calibration: Calibration | None = None) -> dict[str, Any]:
    """Return what votes say about the policy, with intervals whose errors are clustered by prompt.

    Args:
        samples: each with its vote.
        calibration: the judge's agreement with people, for a correction of the win rate.
    """
    votes = [one.vote for one in samples if one.vote is not None]
    read = [one for one in samples if one.vote is not None and one.vote.win is not None]
    report: dict[str, Any] = {"num": len(votes), "unparsable": len(votes) - len(read)}
    if not read:
        return {**report, "num_prompts": 0, **_habits(samples)}
    wins = [_win(one) for one in read]
    clusters = [prompt_key(one.prompt) for one in read]
    found = share(wins, clusters)
    estimates: dict[str, Estimate] = {
        "win_rate": found,
        "length_controlled_win_rate": length_controlled(wins, [_longer(one) for one in read], clusters),
    }
    prompts = len(set(clusters))
    if calibration is not None:
        report["calibration"] = {
            "sensitivity": calibration.sensitivity,
            "specificity": calibration.specificity,
            "num": calibration.positives + calibration.negatives,
        }
        if calibration.is_informative:
            estimates["corrected_win_rate"] = corrected(found, prompts, calibration)
    return {
        **report,
        "num_prompts": prompts,
        **summary(estimates),
        "ties": fmean(win == 0.5 for win in wins),
        "minimum_detectable": minimum_detectable(found, wins, clusters),
        **_habits(samples),
        **_noise(read),
    }


def judge_verdicts(judge: Mapping[str, Any]) -> Iterator[str]:
    """Say in words what the votes of a judge allow, and what they suffer from."""
    asked, unread = judge["num"], judge["unparsable"]
    if unread:
        yield f"judge: {unread:,} of {asked:,} votes cannot be read, and do not count"
    if "win_rate" not in judge:
        yield "verdict: no vote of the judge can be read: it says nothing"
        return
    if judge.get("follows_order"):
        yield (
            "judge: it follows the order of the answers: in "
            f"{judge['order_ties']:.1%} of the pairs it prefers the same place in both orders, which is a tie; "
            f"{judge['first_share']:.1%} of its verdicts are for the first answer"
        )
    calibration = judge.get("calibration")
    if calibration and "corrected_win_rate" not in judge:
        yield "judge: it agrees with people no more often than chance does: its win rate cannot be corrected"
    best = "corrected_win_rate" if "corrected_win_rate" in judge else "win_rate"
    low, high = judge[f"{best}_ci"]
    verdict = "better" if low > 0.5 else "worse" if high < 0.5 else "no difference is shown"
    controlled = judge["length_controlled_win_rate"]
    yield (
        f"verdict: {verdict}: the policy wins {judge[best]:.1%} ({low:.1%} to {high:.1%}) of {judge['num_prompts']:,} "
        f"prompts, {controlled:.1%} at equal length; {judge['minimum_detectable']:.1%} could have been detected"
    )


def prompt_key(prompt: Text) -> str:
    """Return the key by which samples of the same prompt belong together."""
    return json.dumps(prompt, sort_keys=True, ensure_ascii=False)


def read_calibration(path: str | Path) -> list[dict[str, Any]]:
    """Read pairs that people have judged: lines with `prompt`, `a`, `b`, and `human`, which is `a` or `b`.

    Raises:
        UsageError: the file cannot be read, or a line is wrong.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UsageError(f"{path}: this file of calibration cannot be read: {reason}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            is_right = row["human"] in LABELS and isinstance(row["a"], str) and isinstance(row["b"], str)
            is_right &= isinstance(row["prompt"], str | list)
        except (ValueError, LookupError, TypeError):
            is_right = False
        if not is_right:
            raise UsageError(
                f"{path}:{number}: expected prompt, a, b, and human, which is a or b",
                hint='for example {"prompt": "Hi", "a": "Hello!", "b": "No.", "human": "a"}',
            )
        rows.append(row)
    if {row["human"] for row in rows} != set(LABELS):
        raise UsageError(f"{path}: people must prefer a in some pairs, and b in others", hint="add more pairs")
    return rows


def calibrate(judge: Judge, path: str | Path) -> Calibration:
    """Ask a judge about pairs that people have judged; a tie is half right, and what cannot be read is left out."""
    rows = read_calibration(path)
    votes = judge([row["prompt"] for row in rows], [row["a"] for row in rows], [row["b"] for row in rows])
    sides: dict[str, list[float]] = {"a": [], "b": []}
    for row, vote in zip(rows, votes, strict=True):
        if vote.win is not None:
            sides[row["human"]].append(vote.win)
    for_a, for_b = sides["a"], [1 - win for win in sides["b"]]
    sensitivity, specificity = (fmean(side) if side else 0.5 for side in (for_a, for_b))
    return Calibration(sensitivity, specificity, len(for_a), len(for_b))


def _habits(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return how often a judge prefers a place, or how it rates."""
    votes = [(prompt_key(one.prompt), one.vote) for one in samples if one.vote is not None]
    places = [(key, place == FIRST) for key, vote in votes for place in vote.verdicts if place in (FIRST, SECOND)]
    found: dict[str, Any] = {}
    if places:
        keys, firsts = zip(*places, strict=True)
        both = [vote.verdicts for _, vote in votes if vote.verdicts and None not in vote.verdicts]
        same = fmean(pair in ((FIRST, FIRST), (SECOND, SECOND)) for pair in both) if both else 0.0
        found = {**share(firsts, keys).named("first_share"), "order_ties": same, "follows_order": same > FOLLOWS_ORDER}
    rated = [(key, vote.ratings) for key, vote in votes if vote.ratings and None not in vote.ratings]
    if rated:
        keys = tuple(key for key, _ in rated)
        a, b = ([float(ratings[side] or 0) for _, ratings in rated] for side in (0, 1))
        pairs = {
            "rating_policy": a,
            "rating_reference": b,
            "rating_difference": [x - y for x, y in zip(a, b, strict=True)],
        }
        found |= summary({name: mean(values, keys) for name, values in pairs.items()})
    return found


def _noise(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return the spread of the win rate over repeated evaluations, which differ in nothing but chance."""
    repeats = sorted({one.repeat for one in samples})
    if len(repeats) < 2:
        return {}
    rates = [fmean(_win(one) for one in samples if one.repeat == repeat) for repeat in repeats]
    return {"repeats": len(repeats), "win_rates": rates, "noise_floor": stdev(rates)}


def _win(sample: Sample) -> float:
    return math.nan if sample.vote is None or sample.vote.win is None else sample.vote.win


def _longer(sample: Sample) -> int:
    """Return how many words longer the policy's text is."""
    other = "" if sample.reference is None else sample.reference.text
    return len(sample.policy.text.split()) - len(other.split())

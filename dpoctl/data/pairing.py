"""Ratings to pairs: which answers of a prompt are compared, and which comparisons say too little to learn from.

Differences of scores are margins. A pair of equal scores is a tie, and so is one of answers that differ in
nothing but white space, whatever they were rated.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from typing import Literal

from dpoctl.data.records import Record, Reject, squeeze
from dpoctl.data.selection import prompt_digest

Mode = Literal["best-worst", "best-rest", "best-random", "adjacent", "all"]
Pairs = tuple[tuple[int, int], ...]

TIE, TOO_CLOSE, DISAGREE = "tie", "margin_too_small", "scores_disagree"


@dataclass(frozen=True)
class Pairing:
    """How rated answers become pairs.

    `mode` chooses from answers sorted by score, and has no say where a row names its pairs: the best with the worst,
    with every other, or with one other drawn at random from those it beats; each with the next; or all with all.
    `all` makes n (n - 1) / 2 pairs of n answers, `best-rest` and `adjacent` n - 1, the others one.
    """

    mode: Mode = "best-worst"
    min_margin: float = 0.0
    """The smallest difference of scores that counts, in the units of the scores."""
    max_pairs: int | None = None
    """How many pairs a prompt may have; those of the largest margin stay, the seed decides among equals."""
    ties: Literal["drop", "keep"] = "drop"
    """`keep` keeps pairs of equal score, in the order of the row, and sets `meta["tie"]` of records that have one."""
    seed: int = 0


def pair_up(record: Record, pairing: Pairing) -> tuple[Record, int]:
    """Choose pairs by score; pairs that a row names stay, unless its scores speak against them.

    A record that there is nothing to choose from, or nothing to choose by, is returned as it is. Chance depends on
    the seed and the prompt alone, so the order of the rows does not matter.

    Returns:
        The record with its pairs and without the answers that are in none (the target stays), and the number of
        tied pairs that were dropped.

    Raises:
        Reject: No pair is left: `tie`, `margin_too_small`, or `scores_disagree` where the loser has the higher score.
    """
    if len(record.scores) < 2 and (not record.pairs or pairing.max_pairs is None):
        return record, 0
    candidates = record.pairs or _candidates(record, pairing.mode)
    texts = [squeeze(response) for response in record.responses]
    verdicts = {pair: _objection(record, pair, pairing, same=texts[pair[0]] == texts[pair[1]]) for pair in candidates}
    kept = tuple(pair for pair in candidates if not verdicts[pair])
    if not kept:
        raise _explain(record, verdicts)
    if pairing.mode == "best-random" and not record.pairs:
        kept = (_chance(record, pairing).choice(kept),)
    if pairing.max_pairs is not None:
        kept = _widest(record, kept, pairing.max_pairs, _chance(record, pairing))
    if record.scores and any(_margin(record, pair) == 0 for pair in kept):
        record = replace(record, meta=record.meta | {"tie": True})
    return with_pairs(record, kept), sum(verdict == TIE for verdict in verdicts.values())


def with_pairs(record: Record, pairs: Iterable[tuple[int, int]]) -> Record:
    """Give a record these pairs, and drop the answers that are in none, the target excepted."""
    pairs = tuple(pairs)
    used = {index for pair in pairs for index in pair} | ({record.target} - {None})
    kept = [index for index in range(len(record.responses)) if index in used]
    place = {index: number for number, index in enumerate(kept)}
    return replace(
        record,
        responses=tuple(record.responses[index] for index in kept),
        scores=tuple(record.scores[index] for index in kept) if record.scores else (),
        pairs=tuple((place[winner], place[loser]) for winner, loser in pairs),
        target=None if record.target is None else place[record.target],
    )


def _chance(record: Record, pairing: Pairing) -> random.Random:
    return random.Random(f"{pairing.seed} {prompt_digest(record.prompt).hex()}")


def _candidates(record: Record, mode: Mode) -> Pairs:
    # Among equals the target comes first, so that what is imitated is also what wins.
    order = sorted(range(len(record.scores)), key=lambda index: (-record.scores[index], index != record.target))
    if mode == "best-worst":
        return ((order[0], order[-1]),)
    if mode == "adjacent":
        return tuple(pairwise(order))
    if mode == "all":
        return tuple(combinations(order, 2))
    return tuple((order[0], other) for other in order[1:])


def _objection(record: Record, pair: tuple[int, int], pairing: Pairing, *, same: bool) -> str:
    """Say why a pair cannot be used, or nothing."""
    if same:
        return TIE
    if not record.scores:
        return ""
    margin = _margin(record, pair)
    if margin < 0:
        return DISAGREE
    if margin == 0:
        return "" if pairing.ties == "keep" else TIE
    return TOO_CLOSE if margin < pairing.min_margin else ""


def _margin(record: Record, pair: tuple[int, int]) -> float:
    return record.scores[pair[0]] - record.scores[pair[1]]


def _widest(record: Record, pairs: Pairs, number: int, draw: random.Random) -> Pairs:
    margins = [_margin(record, pair) if record.scores else 0.0 for pair in pairs]
    best = sorted(range(len(pairs)), key=lambda index: (-margins[index], draw.random()))[:number]
    return tuple(pairs[index] for index in sorted(best))


def _explain(record: Record, verdicts: dict[tuple[int, int], str]) -> Reject:
    reason = next(reason for reason in (DISAGREE, TOO_CLOSE, TIE) if reason in verdicts.values())
    scores = ", ".join(f"{score:g}" for score in record.scores)
    return Reject(reason, f"scores {scores}" if scores else "the answers differ in white space only")

"""Pairs from rated answers, and records in the shape that a loss needs: a demonstration, pairs, a ranking or a label.

A margin is the difference of two scores. A pair with equal scores is a tie, and so is a pair of answers that differ in
white space only, whatever their scores.
"""

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from typing import TYPE_CHECKING, Literal

from dpoctl.data.records import Record, Reject, squeeze
from dpoctl.data.sampling import prompt_digest
from dpoctl.errors import DataError

if TYPE_CHECKING:
    from dpoctl.recipe.data_section import Source

Mode = Literal["best-worst", "best-rest", "best-random", "adjacent", "all"]
Pairs = tuple[tuple[int, int], ...]
TIE, TOO_CLOSE, DISAGREE = "tie", "margin_too_small", "scores_disagree"
Wants = Literal["demonstrations", "pairs", "rankings", "labels"]
"""The kinds of record that a loss can learn from."""


@dataclass(frozen=True)
class Pairing:
    """The way in which rated answers become pairs.

    `mode` chooses from answers sorted by score, unless a row names its pairs: the best with the worst, with every
    other, or with a random one of those that it beats; each with the next; or all with all. Of n answers `all` makes
    n (n - 1) / 2 pairs, `best-rest` and `adjacent` n - 1, and the others one.
    """

    mode: Mode = "best-worst"
    min_margin: float = 0.0
    """The smallest difference of scores that counts, in the units of the scores."""
    max_pairs: int | None = None
    """The number of pairs that a prompt may have; the largest margins stay, and the seed decides among equal ones."""
    ties: Literal["drop", "keep"] = "drop"
    """`keep` keeps pairs of equal score, in the order of the row, and sets `meta["tie"]` of records that have one."""
    seed: int = 0


def pair_up(record: Record, pairing: Pairing) -> tuple[Record, int]:
    """Choose pairs by score; pairs that a row names stay, unless its scores contradict them.

    A record with fewer than two scores is returned unchanged. Random choices depend on the seed and the prompt alone,
    so the order of rows does not matter.

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
    problems = {pair: _problem(record, pair, pairing, same=texts[pair[0]] == texts[pair[1]]) for pair in candidates}
    kept = tuple(pair for pair in candidates if not problems[pair])
    if not kept:
        raise _no_pair_left(record, set(problems.values()))
    if pairing.mode == "best-random" and not record.pairs:
        kept = (_random(record, pairing).choice(kept),)
    if pairing.max_pairs is not None:
        kept = _largest_margins(record, kept, pairing.max_pairs, _random(record, pairing))
    if record.scores and any(_margin(record, pair) == 0 for pair in kept):
        record = replace(record, meta=record.meta | {"tie": True})
    return with_pairs(record, kept), sum(problem == TIE for problem in problems.values())


def with_pairs(record: Record, pairs: Iterable[tuple[int, int]]) -> Record:
    """Set the pairs of a record, and drop the answers that are in none, except for the target."""
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


def pairing_of(source: "Source", wants: Wants | None, seed: int) -> Pairing | None:
    """Return the way in which a source's rated answers become pairs; None where nothing is compared."""
    if wants in ("demonstrations", "labels"):
        return None
    return Pairing(
        mode=source.pairs or ("all" if wants == "rankings" else "best-worst"),
        min_margin=source.min_margin or 0.0,
        max_pairs=source.max_pairs_per_prompt,
        ties=source.ties or "drop",
        seed=seed,
    )


class Shaper:
    """Gives the records of a source the shape that is wanted, and notices which of its keys have an effect.

    Args:
        source: The source.
        wants: The kind of record; None takes every record as it is, once pairs are chosen.
        pairing: The way to choose pairs; None leaves rated answers without.
        keep_labels: Leave labelled records as they are.
    """

    def __init__(
        self, source: "Source", wants: Wants | None, pairing: Pairing | None, *, keep_labels: bool = False
    ) -> None:
        self._source = source
        self._wants = wants
        self._pairing = pairing
        self._keep_labels = keep_labels
        self._pairs_of: Counter[bytes] = Counter()
        self._records = 0
        self._scored = 0
        self._rated_several = 0

    def shape(self, outcome: Record | Reject) -> tuple[Record | Reject, int]:
        """Give a record the wanted shape, or reject it; also count its pairs that are dropped as ties."""
        if isinstance(outcome, Reject) or (self._keep_labels and outcome.label is not None):
            return outcome, 0
        self._records += 1
        try:
            return self._shape(outcome)
        except Reject as reject:
            return reject, 0

    def refuse_unused_keys(self, format_name: str) -> None:
        """Make sure, after the last row, that each key about pairs had an effect.

        Raises:
            DataError: A key had none.
        """
        key = self._unused_key()
        if key is not None:
            why = "rates more than two answers without naming pairs" if key == "pairs" else "rates its answers"
            raise DataError(
                f"{self._source.path}: {key} would do nothing: no row of format {format_name} {why}",
                hint=f"leave {key} out",
            )

    def _unused_key(self) -> str | None:
        if not self._records:
            return None
        if self._source.pairs is not None and not self._rated_several:
            return "pairs"
        given = (key for key in ("min_margin", "ties") if getattr(self._source, key) is not None)
        return None if self._scored else next(given, None)

    def _shape(self, record: Record) -> tuple[Record, int]:
        if self._wants == "demonstrations":
            return record.preferred(), 0
        if self._wants == "labels":
            if record.label is None:
                raise Reject("no_label", "the row does not say whether its answer is good")
            return record, 0
        if self._pairing is None:
            return record, 0
        self._scored += bool(record.scores)
        self._rated_several += len(record.scores) > 2 and not record.pairs
        record, tied_pairs = pair_up(record, self._pairing)
        if not record.pairs and (self._wants is not None or record.scores):
            raise Reject("no_pair", "the row holds one answer, and a preference needs two")
        if self._wants == "rankings":
            check_ranking(record)
        self._check_limit(record)
        return record, tied_pairs

    def _check_limit(self, record: Record) -> None:
        """Count the pairs of the record's prompt over all rows, and reject it if they would be too many."""
        limit = self._source.max_pairs_per_prompt
        if limit is None:
            return
        prompt = prompt_digest(record.prompt)
        if self._pairs_of[prompt] + len(record.pairs) > limit:
            raise Reject("enough_pairs", f"the prompt would have more than {limit} pairs")
        self._pairs_of[prompt] += len(record.pairs)


def check_ranking(record: Record) -> None:
    """Make sure that the pairs put all responses in one order.

    Raises:
        Reject: The pairs leave the order open, or contradict each other.
    """
    count = len(record.responses)
    beaten = [{loser for winner, loser in record.pairs if winner == one} for one in range(count)]
    for through in range(count):
        for one in range(count):
            if through in beaten[one]:
                beaten[one] |= beaten[through]
    if sorted(map(len, beaten)) != list(range(count)):
        raise Reject("not_a_ranking", f"the pairs do not put {count} answers in one order")


def _random(record: Record, pairing: Pairing) -> random.Random:
    return random.Random(f"{pairing.seed} {prompt_digest(record.prompt).hex()}")


def _candidates(record: Record, mode: Mode) -> Pairs:
    # Among equal scores the target comes first, so that the answer to imitate also wins.
    order = sorted(range(len(record.scores)), key=lambda index: (-record.scores[index], index != record.target))
    if mode == "best-worst":
        return ((order[0], order[-1]),)
    if mode == "adjacent":
        return tuple(pairwise(order))
    if mode == "all":
        return tuple(combinations(order, 2))
    return tuple((order[0], other) for other in order[1:])


def _problem(record: Record, pair: tuple[int, int], pairing: Pairing, *, same: bool) -> str:
    """Return the reason why a pair cannot be used; empty where there is none."""
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


def _largest_margins(record: Record, pairs: Pairs, number: int, draw: random.Random) -> Pairs:
    margins = [_margin(record, pair) if record.scores else 0.0 for pair in pairs]
    best = sorted(range(len(pairs)), key=lambda index: (-margins[index], draw.random()))[:number]
    return tuple(pairs[index] for index in sorted(best))


def _no_pair_left(record: Record, reasons: set[str]) -> Reject:
    reason = next(reason for reason in (DISAGREE, TOO_CLOSE, TIE) if reason in reasons)
    scores = ", ".join(f"{score:g}" for score in record.scores)
    return Reject(reason, f"scores {scores}" if scores else "the answers differ in white space only")

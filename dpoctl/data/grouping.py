"""What rows mean only together: answers to one prompt that stand in several rows, and votes on one pair.

The helpers here see records one by one and hold no more of them than they must. `Grouper` and `Labels` hold the
answers of a source, since those to one prompt need not stand side by side; `Votes` holds digests and wants its
records twice.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Generic, TypeVar

from dpoctl.data.pairing import with_pairs
from dpoctl.data.records import Record, Reject, squeeze
from dpoctl.data.selection import digest_of

GROUPED = frozenset({"helpsteer2"})
"""Formats of one rated answer a row."""

At = TypeVar("At")
"""Where a row stands, in whatever way the caller says so."""


class Grouper(Generic[At]):
    """Rated answers to rankings: one record a prompt, in the order in which the prompts appeared.

    Use it where pairs or rankings are wanted of a format in `GROUPED`: `add` every record of the source, and take
    `rankings` in their place, before pairs are chosen. Rows that are rejected pass it by. A prompt with one answer
    comes back as it was.
    """

    def __init__(self) -> None:
        self._groups: dict[bytes, list[tuple[At, Record]]] = {}

    def add(self, record: Record, at: At) -> None:
        """Take a record of one response, and where it stands."""
        self._groups.setdefault(_digest(record), []).append((at, record))

    def rankings(self) -> Iterator[tuple[tuple[At, ...], Record]]:
        """Yield a record a prompt with all its responses and scores, and where each of them stood."""
        for members in self._groups.values():
            _, first = members[0]
            responses = tuple(response for _, record in members for response in record.responses)
            scores = tuple(score for _, record in members for score in record.scores)
            yield tuple(at for at, _ in members), replace(first, responses=responses, scores=scores)


class Labels(Generic[At]):
    """Labelled answers to pairs: one record a prompt, every good answer above every bad one.

    Use it where pairs are wanted of records that have a `label`: `add` all of them, and take `comparisons` in their
    place. An answer counts once however often it stands there, and not at all if it was called both good and bad.
    """

    def __init__(self) -> None:
        self._grouper = Grouper[At]()
        self.contradicted = 0
        """Answers that were called both good and bad, once `comparisons` is read."""

    def add(self, record: Record, at: At) -> None:
        """Take a record of one response and its label, and where it stands."""
        self._grouper.add(replace(record, label=None, scores=(float(record.label is True),)), at)

    def comparisons(self) -> Iterator[tuple[tuple[At, ...], Record | Reject]]:
        """Yield a record a prompt and where its answers stood.

        A prompt that has no good and bad answer to compare gives the rejection `one_sided`.
        """
        for places, group in self._grouper.rankings():
            yield places, self._compare(group)

    def _compare(self, group: Record) -> Record | Reject:
        labels: dict[str, set[float]] = {}
        answers: dict[str, int] = {}
        for index, (response, score) in enumerate(zip(group.responses, group.scores, strict=True)):
            labels.setdefault(squeeze(response), set()).add(score)
            answers.setdefault(squeeze(response), index)
        self.contradicted += sum(len(given) == 2 for given in labels.values())
        good, bad = ([answers[text] for text in answers if labels[text] == {score}] for score in (1.0, 0.0))
        if not good or not bad:
            return Reject("one_sided", f"{len(good)} good and {len(bad)} bad answers to the prompt")
        return with_pairs(replace(group, scores=()), [(winner, loser) for winner in good for loser in bad])


def unpaired(record: Record) -> tuple[list[Record], int]:
    """Take a record with pairs apart: its winners are good answers, its losers bad ones.

    Returns:
        A labelled record for each response, in order, and how many responses were left out for having both won
        and lost.
    """
    winners, losers = ({pair[side] for pair in record.pairs} for side in (0, 1))
    bare = replace(record, pairs=(), scores=(), target=None)
    labelled = [
        replace(bare, responses=(response,), label=index in winners)
        for index, response in enumerate(record.responses)
        if (index in winners) != (index in losers)
    ]
    return labelled, len(winners & losers)


class Votes:
    """Several verdicts on one pair: those of the majority stay.

    Use it in two passes over the same records, after pairs are chosen: `add` all of them, then `settle` each. A pair
    is known by its prompt, and by its answers up to white space. Memory holds a digest and a count a pair.
    """

    def __init__(self) -> None:
        self._votes: Counter[bytes] = Counter()

    @property
    def repeated(self) -> int:
        """Pairs that say again what one said before; they stay."""
        return self._votes.total() - len(self._votes)

    @property
    def contradicted(self) -> bool:
        """Whether any pair was also seen the other way round: only then is there anything to settle."""
        return any(_turned(vote) in self._votes for vote in self._votes)

    def add(self, record: Record) -> None:
        """Count the pairs of a record."""
        for pair in record.pairs:
            self._votes[_vote(record, pair)] += 1

    def settle(self, record: Record) -> Record:
        """Drop the pairs of a record that the majority of votes speaks against.

        Raises:
            Reject: None is left: `outvoted`, or `tie` where the votes are equal.
        """
        objections = {pair: self._objection(record, pair) for pair in record.pairs}
        kept = [pair for pair, objection in objections.items() if objection is None]
        if len(kept) == len(record.pairs):
            return record
        if not kept:
            raise next(objection for objection in objections.values() if objection)
        return with_pairs(record, kept)

    def _objection(self, record: Record, pair: tuple[int, int]) -> Reject | None:
        vote = _vote(record, pair)
        votes, against = self._votes[vote], self._votes[_turned(vote)]
        if votes > against:
            return None
        return Reject("tie" if votes == against else "outvoted", f"{against} of {votes + against} votes against it")


def _vote(record: Record, pair: tuple[int, int]) -> bytes:
    """Hash a pair whichever way round; a last byte says which way."""
    answers = [squeeze(record.responses[index]) for index in pair]
    return _digest(record, *sorted(answers)) + bytes([answers[0] > answers[1]])


def _turned(vote: bytes) -> bytes:
    return vote[:-1] + bytes([1 - vote[-1]])


def _digest(record: Record, *answers: str) -> bytes:
    """Hash what a prompt means to a model, and answers to it."""
    return digest_of((record.prompt, *answers), [record.tools, record.template_kwargs])

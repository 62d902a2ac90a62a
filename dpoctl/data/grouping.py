"""Rows that mean something only together: answers to one prompt in several rows, and several rows about one pair.

`Grouper` and `Labels` hold the answers of a source in memory, since those to one prompt may be far apart; `Majority`
holds hashes, and reads its records twice.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from dpoctl.data.pairing import with_pairs
from dpoctl.data.records import Record, Reject, RowPlace, squeeze
from dpoctl.data.sampling import digest_of

GROUPED = frozenset({"helpsteer2"})
"""Formats with one rated answer a row."""


class Grouper:
    """Collects rated answers, and makes one record a prompt, in the order in which the prompts appeared.

    A prompt with one answer gives that record unchanged.
    """

    def __init__(self) -> None:
        self._groups: dict[bytes, list[tuple[RowPlace, Record]]] = {}

    def add(self, record: Record, place: RowPlace) -> None:
        """Add a record of one response, and the place of its row."""
        self._groups.setdefault(_digest(record), []).append((place, record))

    def records(self) -> Iterator[tuple[tuple[RowPlace, ...], Record | Reject]]:
        """Yield a record a prompt with all its responses and scores, and the place of each."""
        for members in self._groups.values():
            yield tuple(place for place, _ in members), self._join([record for _, record in members])

    def _join(self, records: list[Record]) -> Record | Reject:
        responses = tuple(response for record in records for response in record.responses)
        scores = tuple(score for record in records for score in record.scores)
        return replace(records[0], responses=responses, scores=scores)


class Labels(Grouper):
    """Collects labelled answers, and makes one record a prompt, in which every good answer beats every bad one.

    Repeated answers count once, and answers that are labelled both good and bad not at all. A prompt without a good
    and a bad answer gives the rejection `one_sided`.
    """

    def _join(self, records: list[Record]) -> Record | Reject:
        responses = tuple(record.responses[0] for record in records)
        labels: dict[str, set[bool]] = {}
        answers: dict[str, int] = {}
        for index, record in enumerate(records):
            text = squeeze(responses[index])
            labels.setdefault(text, set()).add(record.label is True)
            answers.setdefault(text, index)
        good, bad = ([answers[text] for text in answers if labels[text] == {label}] for label in (True, False))
        if not good or not bad:
            return Reject("one_sided", f"{len(good)} good and {len(bad)} bad answers to the prompt")
        joined = replace(records[0], responses=responses, label=None, scores=())
        return with_pairs(joined, [(winner, loser) for winner in good for loser in bad])


class Majority:
    """The majority of all rows that hold the same pair, by its prompt and its answers up to white space.

    The first of two passes over the same records adds them. If it finds conflicts, `close` the majority, and `filter`
    each record in the second. Memory holds a hash and a count a pair.
    """

    def __init__(self) -> None:
        self._counts: Counter[bytes] = Counter()
        self.is_closed = False
        """Whether all records are added, so that the majority is known."""

    @property
    def has_conflicts(self) -> bool:
        """Whether some rows prefer one answer of a pair and some the other."""
        return any(_reverse(key) in self._counts for key in self._counts)

    def add(self, record: Record) -> None:
        """Count the pairs of a record."""
        for pair in record.pairs:
            self._counts[_pair_key(record, pair)] += 1

    def close(self) -> None:
        """End the first pass."""
        self.is_closed = True

    def filter(self, record: Record) -> Record:
        """Drop the pairs of a record that the majority contradicts.

        Raises:
            Reject: No pair is left: `outvoted`, or `tie` where as many rows say one thing as the other.
        """
        rejects = {pair: self._rejection(record, pair) for pair in record.pairs}
        kept = [pair for pair, reject in rejects.items() if reject is None]
        if len(kept) == len(record.pairs):
            return record
        if not kept:
            raise next(reject for reject in rejects.values() if reject)
        return with_pairs(record, kept)

    def _rejection(self, record: Record, pair: tuple[int, int]) -> Reject | None:
        key = _pair_key(record, pair)
        votes, against = self._counts[key], self._counts[_reverse(key)]
        if votes > against:
            return None
        return Reject("tie" if votes == against else "outvoted", f"{against} of {votes + against} votes against it")


def unpaired(record: Record) -> list[Record]:
    """Split a record with pairs into labelled records: winners are good answers, losers bad ones.

    Returns:
        A labelled record for each response, in order, except for those that have both won and lost.
    """
    winners, losers = ({pair[side] for pair in record.pairs} for side in (0, 1))
    bare = replace(record, pairs=(), scores=(), target=None)
    return [
        replace(bare, responses=(response,), label=index in winners)
        for index, response in enumerate(record.responses)
        if (index in winners) != (index in losers)
    ]


def _pair_key(record: Record, pair: tuple[int, int]) -> bytes:
    """Hash a pair regardless of its order; a last byte holds the order."""
    answers = [squeeze(record.responses[index]) for index in pair]
    return _digest(record, *sorted(answers)) + bytes([answers[0] > answers[1]])


def _reverse(key: bytes) -> bytes:
    return key[:-1] + bytes([1 - key[-1]])


def _digest(record: Record, *answers: str) -> bytes:
    """Hash everything of a prompt that a model sees, and answers to it."""
    return digest_of((record.prompt, *answers), [record.tools, record.template_kwargs])

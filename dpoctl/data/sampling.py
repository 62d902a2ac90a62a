"""Sampling of rows and the held-out split, both seeded and the same on every machine; hashes of records."""

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from dpoctl.data.records import Record, Text, squeeze

if TYPE_CHECKING:
    from dpoctl.recipe.data_section import Source

_canonical = json.JSONEncoder(sort_keys=True).encode


class Tries(NamedTuple):
    """The rows that are tried of a source with `max_samples`: a part of all its rows in their random order."""

    rows: int
    """The number of all rows."""
    stop: int
    start: int = 0


@dataclass(frozen=True)
class RowSampling:
    """The number of times that an epoch uses each row of a source; rows are counted from 0."""

    whole: int
    """The number of times for every row."""
    once_more: frozenset[int]
    """Rows that are used once more than that."""
    ranks: Mapping[int, int] | None = None
    """The only rows that are used, where set, and their places in the random order."""

    def copies(self, row: int) -> int:
        """Return the number of times that a row is used."""
        if self.ranks is not None and row not in self.ranks:
            return 0
        return self.whole + (row in self.once_more)

    def rank(self, row: int) -> int:
        """Return a row's place in the random order; 0 where there is none."""
        return self.ranks.get(row, 0) if self.ranks is not None else 0


def is_random(source: "Source") -> bool:
    """Return whether the choice of the source's rows needs the seed."""
    return source.max_samples is not None or source.weight % 1 != 0


def sample_size(source: "Source", rows: int) -> int:
    """Return the number of rows that a source with `max_samples` wants; a `weight` below 1 takes a part of them."""
    assert source.max_samples is not None
    return round(min(source.max_samples, rows) * min(source.weight, 1.0))


def sample(
    source: "Source", count_rows: Callable[[], int], seed: int, number: int, tries: Tries | None = None
) -> RowSampling:
    """Choose the rows of a source.

    Args:
        source: The source; its `max_samples` applies first, then its `weight`.
        count_rows: Reads the source to its end; called only where the choice is random, and without `tries`.
        seed: The recipe's seed.
        number: The number of the source in the recipe, so that two sources choose differently.
        tries: The rows to try where the source has `max_samples`; None tries as many as it wants.
    """
    whole, part = int(source.weight), source.weight % 1
    if not is_random(source):
        return RowSampling(whole, frozenset())
    draw = random.Random(f"{seed} {number}")
    if source.max_samples is None:
        rows = count_rows()
        return RowSampling(whole, frozenset(draw.sample(range(rows), round(part * rows))))
    if tries is None:
        rows = count_rows()
        tries = Tries(rows, sample_size(source, rows))
    order = islice(_random_order(draw, tries.rows), tries.start, tries.stop)
    ranks = {row: rank for rank, row in enumerate(order, start=tries.start)}
    if not whole:
        return RowSampling(1, frozenset(), ranks)
    return RowSampling(whole, frozenset(draw.sample(sorted(ranks), round(part * len(ranks)))), ranks)


def _random_order(draw: random.Random, size: int) -> Iterator[int]:
    """Shuffle the numbers below `size`, in memory for as many as are taken."""
    moved: dict[int, int] = {}
    for place in range(size):
        chosen = draw.randrange(place, size)
        yield moved.get(chosen, chosen)
        moved[chosen] = moved.pop(place, place)


@dataclass(frozen=True)
class HeldOut:
    """The records of the training data that form the eval set, by seed and topic alone, so that no topic is split.

    A record is held out if the hash of its topic, a number in [0, 1), is below `threshold`.
    """

    seed: int
    threshold: float

    def __contains__(self, record: Record) -> bool:
        return topic_number(self.seed, record.topic) < self.threshold

    @classmethod
    def of_size(cls, size: int, seed: int, topics: Iterable[Text]) -> "HeldOut":
        """Hold out the topics with the smallest hashes, until there are `size` records or a few more."""
        numbers = sorted(topic_number(seed, topic) for topic in topics)
        if size >= len(numbers):
            return cls(seed, 1.0)
        last = numbers[size - 1]
        beyond = next((number for number in numbers[size:] if number > last), 1.0)
        return cls(seed, beyond)


def topic_number(seed: int, topic: Text) -> float:
    """Hash a topic and a seed to a number in [0, 1)."""
    digest = hashlib.sha256(f"{seed} {_canonical(topic)}".encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48


def prompt_digest(prompt: Text) -> bytes:
    """Hash a prompt up to white space: `(16,)` bytes."""
    return hashlib.sha256(squeeze(prompt).encode()).digest()[:16]


def record_digest(record: Record) -> bytes:
    """Hash everything of a record but its place: `(16,)` bytes."""
    others = record.to_fields() | {"prompt": None, "responses": None}
    return digest_of((record.prompt, *record.responses), others)


def digest_of(texts: Sequence[Text], others: Any) -> bytes:
    """Hash texts, and other JSON values: `(16,)` bytes."""
    parts = [text if isinstance(text, str) else _canonical(text) for text in texts]
    kinds = [(isinstance(text, str), len(part)) for text, part in zip(texts, parts, strict=True)]
    return hashlib.sha256("".join((_canonical([kinds, others]), *parts)).encode()).digest()[:16]

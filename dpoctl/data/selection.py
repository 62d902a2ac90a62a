"""Which rows of a source are used, how often, and which are held out: seeded, and the same on every machine."""

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dpoctl.data.records import Record, Text, squeeze

if TYPE_CHECKING:
    from dpoctl.recipe.schema_data import Source

_canonical = json.JSONEncoder(sort_keys=True).encode


@dataclass(frozen=True)
class Sampling:
    """How often each row of a source is used in an epoch."""

    whole: int
    """Every row, this often."""
    once_more: frozenset[int]
    """Rows, counted from 0, that are used once more than that."""
    limited_to: frozenset[int] | None
    """No row but these, where set."""

    def copies(self, row: int) -> int:
        """Say how often a row is used, by its number counted from 0."""
        if self.limited_to is not None and row not in self.limited_to:
            return 0
        return self.whole + (row in self.once_more)


def is_random(source: "Source") -> bool:
    """Whether the choice of the source's rows needs the seed."""
    return source.max_samples is not None or source.weight % 1 != 0


def sample(source: "Source", count_rows: Callable[[], int], seed: int, number: int) -> Sampling:
    """Choose the rows of a source.

    Args:
        source: Its `max_samples` and `weight` are used: first the one, then the other of what is left.
        count_rows: Reads the source to its end; called only where the choice is random.
        seed: The recipe's seed.
        number: Which of the recipe's sources this is, so that two of them do not choose alike.
    """
    whole = int(source.weight)
    if not is_random(source):
        return Sampling(whole, frozenset(), None)
    draw = random.Random(f"{seed} {number}")
    rows = list(range(count_rows()))
    limited = None
    if source.max_samples is not None and source.max_samples < len(rows):
        rows = sorted(draw.sample(rows, source.max_samples))
        limited = frozenset(rows)
    once_more = draw.sample(rows, round(source.weight % 1 * len(rows)))
    return Sampling(whole, frozenset(once_more), limited)


@dataclass(frozen=True)
class HeldOut:
    """Which records of the training data form the eval set: by seed and topic alone, so a topic is never split.

    A record is held out when the number that its topic hashes to is below `threshold`, a share of all numbers.
    """

    seed: int
    threshold: float

    def __contains__(self, record: Record) -> bool:
        return topic_number(self.seed, record.topic) < self.threshold

    @classmethod
    def of_size(cls, size: int, seed: int, topics: Iterable[Text]) -> "HeldOut":
        """Hold out the topics with the smallest numbers, until there are `size` records or a few more."""
        numbers = sorted(topic_number(seed, topic) for topic in topics)
        if size >= len(numbers):
            return cls(seed, 1.0)
        last = numbers[size - 1]
        beyond = next((number for number in numbers[size:] if number > last), 1.0)
        return cls(seed, beyond)


def topic_number(seed: int, topic: Text) -> float:
    """Map a topic to a number in [0, 1) that depends on nothing but the seed and its content."""
    digest = hashlib.sha256(f"{seed} ".encode() + _content(topic)).digest()
    return int.from_bytes(digest[:6]) / 2**48


def prompt_digest(prompt: Text) -> bytes:
    """Hash what a prompt says, white space aside, to see where it stands again: `(16,)` bytes."""
    return hashlib.sha256(squeeze(prompt).encode()).digest()[:16]


def record_digest(record: Record) -> bytes:
    """Hash what a record means, to find it again: `(16,)` bytes."""
    others = record.to_fields() | {"prompt": None, "responses": None}
    return digest_of((record.prompt, *record.responses), others)


def digest_of(texts: Sequence[Text], others: Any) -> bytes:
    """Hash texts, and other JSON values: `(16,)` bytes."""
    parts = [text if isinstance(text, str) else _canonical(text) for text in texts]
    kinds = [(isinstance(text, str), len(part)) for text, part in zip(texts, parts, strict=True)]
    return hashlib.sha256("".join((_canonical([kinds, others]), *parts)).encode()).digest()[:16]


def _content(prompt: Text) -> bytes:
    return _canonical(prompt).encode()

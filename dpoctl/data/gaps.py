"""What of a record's text the tokenizer has no tokens for: lost as an unknown token, or spelt out in bytes."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from dpoctl.data.records import Record
from dpoctl.data.tokenize import Encoder, Example

BYTES = [f"<0x{byte:02X}>" for byte in range(128, 256)]
"""Bytes beyond ASCII: a line feed that is spelt as a byte is that tokenizer's token for it."""
MOST = 20
"""Characters that a report names, the most frequent ones."""


@dataclass(slots=True)
class Gaps:
    """Tokens for what the tokenizer cannot say."""

    unknown: int = 0
    """Tokens that stand for a loss."""
    in_bytes: int = 0
    """Tokens that are a byte of a character that has no token."""
    characters: Counter[str] = field(default_factory=Counter)
    """What was lost, with how often it stands in the texts."""

    def __bool__(self) -> bool:
        return self.unknown > 0 or self.in_bytes > 0


NO_GAPS = Gaps()


@dataclass(slots=True)
class GapTally:
    """The gaps of all records of a store."""

    rows_unknown: int = 0
    rows_in_bytes: int = 0
    total: Gaps = field(default_factory=Gaps)

    def count(self, gaps: Gaps) -> None:
        """Count those of a record."""
        if not gaps:
            return
        self.rows_unknown += gaps.unknown > 0
        self.rows_in_bytes += gaps.in_bytes > 0
        self.total.unknown += gaps.unknown
        self.total.in_bytes += gaps.in_bytes
        self.total.characters += gaps.characters

    def report(self) -> dict[str, Any]:
        """Write the counts as JSON values."""
        return {
            "rows_unknown": self.rows_unknown,
            "unknown": self.total.unknown,
            "characters": dict(self.total.characters.most_common(MOST)),
            "rows_in_bytes": self.rows_in_bytes,
            "in_bytes": self.total.in_bytes,
        }


class GapFinder:
    """Looks for gaps.

    Args:
        encoder: What the tokens were made with.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._has_token: dict[str, bool] = {}

    def find(self, example: Example, record: Record) -> Gaps:
        """Count the gaps of a record; each response's share of them once."""
        marks = self._marks
        if marks is None:
            return NO_GAPS
        marked = marks[np.concatenate((example.shared, *example.suffixes))]
        if not marked.any():
            return NO_GAPS
        found = np.bincount(marked, minlength=3)
        gaps = Gaps(unknown=int(found[1]), in_bytes=int(found[2]))
        if gaps.unknown:
            texts = "".join(_texts(record))
            gaps.characters = Counter(character for character in texts if not self._knows(character))
        return gaps

    @cached_property
    def _marks(self) -> npt.NDArray[np.uint8] | None:
        """One value a token: 1 is unknown, 2 is a byte, 0 is any other. None where the tokenizer has neither."""
        vocabulary = self._encoder.vocabulary
        in_bytes = [vocabulary[token] for token in BYTES if token in vocabulary]
        if self._encoder.unk is None and not in_bytes:
            return None
        marks = np.zeros(max(vocabulary.values()) + 1, dtype=np.uint8)
        marks[in_bytes] = 2
        if self._encoder.unk is not None:
            marks[self._encoder.unk] = 1
        return marks

    def _knows(self, character: str) -> bool:
        if character not in self._has_token:
            self._has_token[character] = self._encoder.unk not in self._encoder.plain(character)
        return self._has_token[character]


def _texts(record: Record) -> Iterator[str]:
    for text in (record.prompt, *record.responses):
        if isinstance(text, str):
            yield text
        else:
            yield from (message["content"] for message in text)

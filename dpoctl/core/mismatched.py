"""Mismatched completions: beside each answer, the answer to another prompt, as an estimate of a KL divergence needs.

The other answer hangs on the same prompt as a second response, so that it costs its own tokens and no prompt.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dpoctl.data.records import Record
from dpoctl.data.store import Column, TokenStore
from dpoctl.data.tokenize import Example
from dpoctl.errors import DataError

# Part of the key: raise it when the same records would be matched otherwise.
VERSION = 1
SEED = 20


class Mismatched(TokenStore):
    """A view of a store of one-response records in which each has two: its own, and one that belongs elsewhere.

    A record's prompt ends at its first scored token; what follows is its answer. The second response is the answer of a
    record with another prompt, cut where prompt and answer would exceed the limit. Every answer is used once, unless
    more than half of all records have the same prompt. Who is matched with whom depends on the store alone.

    Args:
        store: the records.
        max_length: tokens of a prompt and an answer.

    Raises:
        DataError: a record has several responses, or all have the same prompt.
    """

    def __init__(self, store: TokenStore, max_length: int) -> None:
        count = len(store)
        if np.any(np.diff(store.response_start) != 1):
            raise DataError("mismatched completions are for records of one response, and some have several")
        self._store = store
        self.key = f"{store.key}-mismatched-{VERSION}-{max_length}"
        self.label, self.target, self.source = store.label, store.target, store.source
        self.shared_len, groups = _prompts(store)
        self._partner = _derange(groups)
        self.response_start = np.arange(0, 2 * count + 1, 2)
        self.pair_start, self.pairs = np.zeros(count + 1, dtype=np.int64), np.zeros((0, 2), dtype=np.int64)
        own = store.shared_len + store.suffix_len - self.shared_len
        other = np.minimum(own[self._partner], max_length - self.shared_len)
        self.suffix_len = np.stack([own, other], axis=1).ravel()
        scored = store.num_tokens[self._partner].copy()
        for record in np.flatnonzero(other < own[self._partner]):
            scored[record] = self._answer(self._partner[record])[1][: other[record]].sum()
        self.num_tokens = np.stack([store.num_tokens, scored], axis=1).ravel()

    def example(self, index: int) -> Example:
        """Get the tokens of a record: its prompt, its answer, and the other one."""
        ids, flags = _row(self._store.example(index))
        prompt, length = self.shared_len[index], self.suffix_len[2 * index + 1]
        other, other_flags = self._answer(self._partner[index])
        return Example(
            shared=ids[:prompt],
            shared_scored=flags[:prompt],
            suffixes=(ids[prompt:], other[:length]),
            suffixes_scored=(flags[prompt:], other_flags[:length]),
            pairs=self.pairs,
            label=int(self.label[index]),
            target=int(self.target[index]),
            source=int(self.source[index]),
        )

    def texts(self, index: int) -> Record:
        """Get a record as it was, with its own response alone."""
        return self._store.texts(index)

    def rejects(self, paths: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Read the rows that are not in the store."""
        return self._store.rejects(paths)

    def _answer(self, index: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
        ids, flags = _row(self._store.example(index))
        return ids[self.shared_len[index] :], flags[self.shared_len[index] :]


def _row(example: Example) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """A record's tokens from the first to the last; those that a store calls shared may hold most of the answer."""
    ids = np.concatenate([example.shared, example.suffixes[0]])
    return ids, np.concatenate([example.shared_scored, example.suffixes_scored[0]])


def _prompts(store: TokenStore) -> tuple[Column, Column]:
    """How long each record's prompt is, and a number that only records with the same prompt share."""
    lengths, groups = np.zeros((2, len(store)), dtype=np.int64)
    known: dict[bytes, int] = {}
    for index in range(len(store)):
        ids, flags = _row(store.example(index))
        lengths[index] = flags.argmax()
        digest = hashlib.sha256(ids[: lengths[index]].tobytes()).digest()[:8]
        groups[index] = known.setdefault(digest, len(known))
    return lengths, groups


def _derange(groups: Column) -> Column:
    """For each record another one of a different group; each is used once where that is possible."""
    rng, sizes = np.random.default_rng(SEED), np.bincount(groups)
    count, largest = len(groups), int(sizes.max())
    if largest == count:
        raise DataError(
            "all records have the same prompt, so that no answer is a mismatched one",
            hint="the loss compares answers to different prompts; give data with several",
        )
    # Groups in a row, the largest first, each in any order: as many places further on another group has begun.
    place = rng.permutation(len(sizes))
    place[sizes.argmax()] = -1
    row = np.lexsort((rng.random(count), place[groups]))
    at = np.arange(count)
    rest = count - largest
    partner_at = (
        (at + largest) % count if largest <= rest else np.where(at < largest, largest + at % rest, at - largest)
    )
    partner = np.empty(count, dtype=np.int64)
    partner[row] = row[partner_at]
    return partner

"""Mismatched completions: each record also gets the answer to another prompt, for estimates of a KL divergence.

The other answer is a second response to the same prompt, so that it costs only its own tokens.
"""

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from dpoctl.data.records import Record
from dpoctl.data.store import Column, TokenStore
from dpoctl.data.tokenize import Example
from dpoctl.errors import DataError

VERSION = 1
"""Part of the key: raise it with any change that matches the same records differently."""
SEED = 20


class Mismatched(TokenStore):
    """A view of a store of one-response records that gives each a second response, the answer of another record.

    A record's prompt ends at its first scored token; its answer is the rest. The second response is the answer of a
    record with another prompt, cut where prompt and answer would exceed the limit. Every answer is used once, unless
    more than half of all records have the same prompt. The matching depends on the store alone.

    Args:
        store: The records.
        max_length: The greatest number of tokens of a prompt and an answer.

    Raises:
        DataError: A record has several responses, or all have the same prompt.
    """

    def __init__(self, store: TokenStore, max_length: int) -> None:
        count = len(store)
        if np.any(np.diff(store.response_start) != 1):
            raise DataError("mismatched completions need records of one response, and some records have several")
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
        """Return the tokens of a record: its prompt, its answer, and the other one."""
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
        """Return a record as it was, with its own response alone."""
        return self._store.texts(index)

    def _answer(self, index: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
        ids, flags = _row(self._store.example(index))
        return ids[self.shared_len[index] :], flags[self.shared_len[index] :]


def _row(example: Example) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Return all tokens of a record, since those that a store calls shared may hold most of the answer."""
    ids = np.concatenate([example.shared, example.suffixes[0]])
    return ids, np.concatenate([example.shared_scored, example.suffixes_scored[0]])


def _prompts(store: TokenStore) -> tuple[Column, Column]:
    """Return the length of each record's prompt, and a number that records with the same prompt share."""
    lengths, groups = np.zeros((2, len(store)), dtype=np.int64)
    known: dict[bytes, int] = {}
    for index in range(len(store)):
        ids, flags = _row(store.example(index))
        lengths[index] = flags.argmax()
        digest = hashlib.sha256(ids[: lengths[index]].tobytes()).digest()[:8]
        groups[index] = known.setdefault(digest, len(known))
    return lengths, groups


def _derange(groups: Column) -> Column:
    """Choose for each record one of a different group, each once where that is possible."""
    rng, sizes = np.random.default_rng(SEED), np.bincount(groups)
    count, largest = len(groups), int(sizes.max())
    if largest == count:
        raise DataError(
            "all records have the same prompt, and the loss compares answers to different prompts",
            hint="use data with several prompts, or another loss",
        )
    # Groups follow each other, the largest first: a shift by its size leads from every group into another.
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

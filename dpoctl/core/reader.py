"""From record numbers to batches on a device: the token store, seen by the loop."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from dpoctl.core.batch import Batch
from dpoctl.core.collator import Collate, collate
from dpoctl.data.store import TokenStore
from dpoctl.model.probe import Layout

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Reader:
    """Reads micro-batches of one token store.

    Attributes:
        store: the records.
        layout: how a batch is laid out.
        device: where it goes.
        pad_token_id: fills padded rows.
        ref_logps: `[R]`, log-probabilities of all responses of the store under the reference, if known.
        collate: puts examples into a batch.
    """

    store: TokenStore
    layout: Layout
    device: torch.device
    pad_token_id: int = 0
    ref_logps: NDArray[np.float32] | None = None
    collate: Collate = collate

    def batch(self, records: Sequence[int]) -> Batch:
        """Return the batch of some records; of none, a filler."""
        chosen = records or (self._shortest,)
        batch = self.collate(
            [self.store.example(record) for record in chosen],
            self.layout,
            pad_token_id=self.pad_token_id,
            ref_logps=None if self.ref_logps is None else self.ref_logps[self._responses(chosen)],
            is_filler=not records,
        )
        return batch.to(self.device)

    def rows(self, records: Sequence[int]) -> Ints:
        """Return how many responses each record has."""
        at = np.asarray(records)
        counts: Ints = self.store.response_start[at + 1] - self.store.response_start[at]
        return counts

    def outline(self, records: Sequence[int]) -> tuple[Ints, Ints]:
        """Return the number of scored tokens `[R]` of the records' responses, and the pairs `[M, 2]` among those."""
        rows = self.rows(records)
        pairs = [
            self.store.pairs[self.store.pair_start[record] : self.store.pair_start[record + 1]] + first
            for record, first in zip(records, np.cumsum(rows) - rows, strict=True)
        ]
        return self.store.num_tokens[self._responses(records)].astype(np.int64), np.concatenate(pairs).reshape(-1, 2)

    def _responses(self, records: Sequence[int]) -> Ints:
        starts = self.store.response_start
        return np.concatenate([np.arange(starts[record], starts[record + 1]) for record in records])

    @cached_property
    def _shortest(self) -> int:
        """The cheapest record: what a rank without records runs."""
        suffixes = np.add.reduceat(self.store.suffix_len, self.store.response_start[:-1])
        return int((self.store.shared_len + suffixes).argmin())

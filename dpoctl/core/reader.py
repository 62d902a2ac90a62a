"""From record numbers to batches on a device: the token store, seen by the loop."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpoctl.core.batch import Batch
from dpoctl.core.collator import Collate, collate
from dpoctl.data.store import TokenStore
from dpoctl.model.layouts import Layout

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
        ref_head_logps: `[R]`, the same over the first tokens, as `Scores` has it; if known.
        collate: puts examples into a batch.
        names: of the sources, by number, that have metrics of their own.
    """

    store: TokenStore
    layout: Layout
    device: torch.device
    pad_token_id: int = 0
    ref_logps: NDArray[np.float32] | None = None
    ref_head_logps: NDArray[np.float32] | None = None
    collate: Collate = collate
    names: Mapping[int, str] = field(default_factory=dict)

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
        if self.ref_head_logps is not None:
            batch = replace(batch, ref_head_logps=torch.from_numpy(self.ref_head_logps[self._responses(chosen)]))
        return batch.to(self.device)

    def batches(self, schedule: Sequence[Sequence[int]]) -> list[Batch]:
        """Return the micro-batches of a rank's share of a step."""
        return [self.batch(records) for records in schedule]

    def rows(self, records: Sequence[int]) -> Ints:
        """Return how many responses each record has."""
        at = np.asarray(records)
        counts: Ints = self.store.response_start[at + 1] - self.store.response_start[at]
        return counts

    def outline(self, records: Sequence[int]) -> dict[str, Tensor]:
        """Return what `Scores` says of the records' responses that no model is needed for, by its names."""
        store, at, rows = self.store, np.asarray(records), self.rows(records)
        starts = np.concatenate([[0], np.cumsum(rows)])
        first, pair_start = starts[:-1], store.pair_start
        pairs = [
            store.pairs[pair_start[r] : pair_start[r + 1]] + start for r, start in zip(records, first, strict=True)
        ]
        known = {
            "num_tokens": store.num_tokens[self._responses(records)],
            "pairs": np.concatenate(pairs).reshape(-1, 2),
            "starts": starts,
            "labels": store.label[at],
            "targets": np.where(store.target[at] < 0, -1, first + store.target[at]),
            "sources": store.source[at],
        }
        return {name: torch.from_numpy(values.astype(np.int64)).to(self.device) for name, values in known.items()}

    def _responses(self, records: Sequence[int]) -> Ints:
        starts = self.store.response_start
        return np.concatenate([np.arange(starts[record], starts[record + 1]) for record in records])

    @cached_property
    def _shortest(self) -> int:
        """The cheapest record: what a rank without records runs."""
        suffixes = np.add.reduceat(self.store.suffix_len, self.store.response_start[:-1])
        return int((self.store.shared_len + suffixes).argmin())

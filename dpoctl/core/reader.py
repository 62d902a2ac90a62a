"""Reading batches: from record numbers to tensors on a device, with the next step prefetched by a thread."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dpoctl.core.batch import Batch, outline_of
from dpoctl.core.collator import Collate, collate
from dpoctl.core.planner import Plan, Step
from dpoctl.data.store import TokenStore
from dpoctl.losses import Outline
from dpoctl.model.attention import Layout
from dpoctl.model.memory import to_device

Ints = NDArray[np.int64]
Prepared = tuple[Step, list[Batch]]


@dataclass(frozen=True)
class Reader:
    """Reads micro-batches of one token store.

    Attributes:
        store: the records.
        layout: the layout of a batch.
        device: the device that batches go to.
        pad_token_id: fills padded rows.
        ref_logps: `[R]`, log-probabilities of all responses of the store under the reference, if known.
        ref_head_logps: `[R]`, the same over the first tokens, as in `Scores`; if known.
        collate: puts examples into a batch.
        names: names of the sources that have metrics of their own, by number.
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
        """Return the batch of some records, or a filler if there are none."""
        chosen = records or (self._shortest,)
        batch = self.collate(
            [self.store.example(record) for record in chosen],
            self.layout,
            pad_token_id=self.pad_token_id,
            ref_logps=None if self.ref_logps is None else self.ref_logps[self.responses(chosen)],
            is_filler=not records,
        )
        if self.ref_head_logps is not None:
            batch = replace(batch, ref_head_logps=torch.from_numpy(self.ref_head_logps[self.responses(chosen)]))
        return batch.to(self.device)

    def batches(self, schedule: Sequence[Sequence[int]]) -> list[Batch]:
        """Return the micro-batches of a rank's share of a step."""
        return [self.batch(records) for records in schedule]

    def num_responses(self, records: Sequence[int] | NDArray[np.integer[Any]]) -> Ints:
        """Return the number of responses of each record."""
        at = np.asarray(records)
        counts: Ints = self.store.response_start[at + 1] - self.store.response_start[at]
        return counts

    def outline(self, records: Sequence[int]) -> Outline:
        """Return the outline of some records, which is that of their batch."""
        store, at = self.store, np.asarray(records)
        outline = outline_of(
            num_tokens=store.num_tokens[self.responses(records)],
            sizes=self.num_responses(records),
            pairs=[store.pairs[store.pair_start[r] : store.pair_start[r + 1]] for r in records],
            labels=store.label[at],
            targets=store.target[at],
            sources=store.source[at],
        )
        return outline.map(lambda column: to_device(column, self.device))

    def responses(self, records: Sequence[int] | NDArray[np.integer[Any]]) -> Ints:
        """Return the numbers of all responses of some records, in their order."""
        starts = self.store.response_start
        return np.concatenate([np.arange(starts[record], starts[record + 1]) for record in records])

    @cached_property
    def _shortest(self) -> int:
        """The cheapest record, for ranks without records."""
        suffixes = np.add.reduceat(self.store.suffix_len, self.store.response_start[:-1])
        return int((self.store.shared_len + suffixes).argmin())


class Prefetcher:
    """A thread that builds the micro-batches of the next step while the current one is computed."""

    def __init__(self, reader: Reader, rank: int) -> None:
        """Begin with nothing prepared.

        Args:
            reader: builds the batches.
            rank: the rank that they are for.
        """
        self._reader, self._rank = reader, rank
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next: tuple[Plan, int, Future[Prepared]] | None = None

    def __enter__(self) -> "Prefetcher":
        """Start."""
        return self

    def __exit__(self, *exception: object) -> None:
        """End the thread."""
        self._worker.shutdown(cancel_futures=True)

    def take(self, plan: Plan, number: int) -> Prepared:
        """Return a step of a plan with its batches, and begin to prepare the step after it.

        Batches that were prepared for another plan are dropped.
        """
        prepared, self._next = self._next, None
        if prepared is not None and prepared[0] is plan and prepared[1] == number:
            ready = prepared[2].result()
        else:
            ready = self._prepare(plan, number)
        if number + 1 < plan.num_steps:
            self._next = plan, number + 1, self._worker.submit(self._prepare, plan, number + 1)
        return ready

    def _prepare(self, plan: Plan, number: int) -> Prepared:
        step = plan.step(number)
        return step, self._reader.batches(step.schedule[self._rank])

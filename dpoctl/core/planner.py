"""The plan: which records form step t, and how they lie over ranks and micro-batches.

A pure function of (lengths, seed, epoch, global batch size, world size, token budget). The records of a step depend on
the first four alone: cutting them up is a schedule, and changes no maths. The position in the data is the step number,
which is the whole of what resuming needs.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from dpoctl.core.losses import Item
from dpoctl.data.store import TokenStore
from dpoctl.errors import DataError
from dpoctl.model.probe import Layout

Ints = NDArray[np.int64]
# Attention work of one (query, key) pair next to the linear work of one token, for models of usual proportions.
ATTENTION_COST = 1 / 8192


@dataclass(frozen=True)
class Lengths:
    """What the plan knows of the records.

    Attributes:
        tokens: `[n]`, tokens a record occupies in the flat layout.
        rows: `[n]`, its responses.
        longest: `[n]`, tokens of prompt and longest answer.
        cost: `[n]`, work of a forward, in tokens.
        items: for each item its number in each record, `[n]`.
    """

    tokens: Ints
    rows: Ints
    longest: Ints
    cost: NDArray[np.float64]
    items: dict[Item, Ints]

    @classmethod
    def of(cls, store: TokenStore) -> "Lengths":
        """Read the lengths of a token store."""
        if len(store) == 0:
            raise DataError("no records to plan with")
        starts = store.response_start[:-1]
        suffixes = np.add.reduceat(store.suffix_len, starts)
        longest = store.shared_len + np.maximum.reduceat(store.suffix_len, starts)
        rows = np.diff(store.response_start)
        seen = np.repeat(store.shared_len, rows) + store.suffix_len / 2
        area = store.shared_len**2 / 2 + np.add.reduceat(store.suffix_len * seen, starts)
        tokens = store.shared_len + suffixes
        return cls(
            tokens=tokens,
            rows=rows,
            longest=longest,
            cost=tokens + area * ATTENTION_COST,
            items={
                "pairs": np.diff(store.pair_start),
                "responses": rows,
                "records": np.ones_like(rows),
                "tokens": np.add.reduceat(store.num_tokens, starts),
                "target_tokens": np.where(store.target < 0, 0, store.num_tokens[starts + store.target.clip(0)]),
            },
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def first(self, count: int | None) -> "Lengths":
        """Return those of the first records; of all for `None`."""
        items = {item: numbers[:count] for item, numbers in self.items.items()}
        return Lengths(self.tokens[:count], self.rows[:count], self.longest[:count], self.cost[:count], items)


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        number: counted from 0 over the whole run.
        records: in the order of the seeded permutation.
        schedule: for each rank its micro-batches, the same number on every rank; an empty one is a filler.
        counts: how many of each item the step has, over all ranks and micro-batches.
    """

    number: int
    records: tuple[int, ...]
    schedule: tuple[tuple[tuple[int, ...], ...], ...]
    counts: dict[Item, int]


@dataclass(frozen=True)
class Plan:
    """The steps of a run, or of one pass over an evaluation set.

    Attributes:
        lengths: of the records.
        global_batch_size: records in a step; the last step of an epoch may be smaller.
        world_size: ranks.
        max_tokens: budget of a micro-batch; a record above it gets a micro-batch of its own.
        layout: decides what a token budget counts.
        seed: of the order; `None` keeps the order of the store.
        num_epochs: passes over the data; a fraction ends within one.
        max_steps: ends the run earlier or later than `num_epochs` does.
    """

    lengths: Lengths
    global_batch_size: int
    world_size: int = 1
    max_tokens: int = 1 << 62
    layout: Layout = "shared"
    seed: int | None = None
    num_epochs: float = 1.0
    max_steps: int | None = None

    @cached_property
    def steps_per_epoch(self) -> int:
        """Steps in a whole pass."""
        return math.ceil(len(self.lengths) / self.global_batch_size)

    @cached_property
    def num_steps(self) -> int:
        """Steps in all."""
        return (
            self.max_steps
            if self.max_steps is not None
            else math.ceil(round(self.num_epochs * self.steps_per_epoch, 6))
        )

    def __iter__(self) -> Iterator[Step]:
        return (self.step(number) for number in range(self.num_steps))

    def step(self, number: int) -> Step:
        """Return a step; the same one for the same arguments, always."""
        epoch, position = divmod(number, self.steps_per_epoch)
        first = position * self.global_batch_size
        records = self._order(epoch)[first : first + self.global_batch_size]
        counts = {item: int(numbers[records].sum()) for item, numbers in self.lengths.items.items()}
        return Step(number, tuple(records.tolist()), self._schedule(records), counts)

    def one_pass(self, lengths: Lengths) -> "Plan":
        """Return the plan of one pass over other records, in their order, on the same machine."""
        return Plan(lengths, self.global_batch_size, self.world_size, self.max_tokens, self.layout)

    def _order(self, epoch: int) -> Ints:
        return np.arange(len(self.lengths)) if self.seed is None else _permutation(len(self.lengths), self.seed, epoch)

    def _schedule(self, records: Ints) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Lay records over `world_size * m` bins of about equal cost, with the smallest m that fits the budget."""
        total = int(self.lengths.tokens[records].sum())
        most = math.ceil(len(records) / self.world_size)
        m = min(most, max(1, total // (self.world_size * self.max_tokens)))
        while True:
            bins = self._fill(records, self.world_size * m)
            if m >= most or all(self._fits(b) for b in bins):
                return tuple(tuple(bins[rank :: self.world_size]) for rank in range(self.world_size))
            m += 1

    def _fill(self, records: Ints, num_bins: int) -> list[tuple[int, ...]]:
        """Longest first, each into the bin with the least cost so far."""
        bins: list[list[int]] = [[] for _ in range(num_bins)]
        load = np.zeros(num_bins)
        cost = self.lengths.cost[records]
        for at in np.argsort(-cost, kind="stable"):
            lightest = int(load.argmin())
            bins[lightest].append(int(records[at]))
            load[lightest] += cost[at]
        return [tuple(b) for b in bins]

    def _fits(self, records: tuple[int, ...]) -> bool:
        return len(records) <= 1 or self.tokens_of(records) <= self.max_tokens

    def tokens_of(self, records: tuple[int, ...]) -> int:
        """Tokens that a micro-batch of these records occupies, padding included."""
        at = np.array(records, dtype=np.int64)
        if self.layout == "shared":
            return int(self.lengths.tokens[at].sum())
        return int(self.lengths.rows[at].sum() * self.lengths.longest[at].max())


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> Ints:
    """The order of an epoch; kept for its many steps."""
    return np.random.default_rng([seed, epoch]).permutation(count)

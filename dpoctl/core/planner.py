"""The plan: which records form step t, and how they lie over ranks and micro-batches.

A pure function of (lengths, seed, epoch, global batch size, world size, token budget). The records of a step depend on
the first four alone: cutting them up is a schedule, and changes no maths. The position in the data is the step number,
which is the whole of what resuming needs.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpoctl.core.balance import fill_bins
from dpoctl.core.losses import Item
from dpoctl.data.store import TokenStore
from dpoctl.errors import DataError
from dpoctl.model.layouts import Layout

Ints = NDArray[np.integer[Any]]
# Lengths are worked out for so many records at a time, which bounds what that needs besides.
PART = 1 << 20
# Attention work of one (query, key) pair next to the linear work of one token, for models of usual proportions.
ATTENTION_COST = 1 / 8192


@dataclass(frozen=True)
class Lengths:
    """What the plan knows of the records, in a few bytes each.

    Attributes:
        tokens: `[n]`, tokens a record occupies where its responses share their prompt.
        separate: `[n]`, tokens it occupies where each response has a prompt of its own.
        rows: `[n]`, its responses.
        longest: `[n]`, tokens of prompt and longest answer.
        cost: `[n]`, work of a forward, in tokens.
        items: for each item its number in each record, `[n]`.
    """

    tokens: Ints
    separate: Ints
    rows: Ints
    longest: Ints
    cost: NDArray[np.float32]
    items: dict[Item, Ints]

    @classmethod
    def of(cls, store: TokenStore) -> "Lengths":
        """Read the lengths of a token store."""
        if len(store) == 0:
            raise DataError("no records to plan with")
        parts = [cls._of_part(store, start, min(start + PART, len(store))) for start in range(0, len(store), PART)]

        def join(columns: Sequence[NDArray[Any]]) -> NDArray[Any]:
            return _small(np.concatenate(columns))

        return cls(
            tokens=join([part.tokens for part in parts]),
            separate=join([part.separate for part in parts]),
            rows=join([part.rows for part in parts]),
            longest=join([part.longest for part in parts]),
            cost=np.concatenate([part.cost for part in parts]),
            items={item: join([part.items[item] for part in parts]) for item in parts[0].items},
        )

    @classmethod
    def _of_part(cls, store: TokenStore, first: int, end: int) -> "Lengths":
        bounds, shared = store.response_start[first : end + 1], store.shared_len[first:end]
        starts, responses = bounds[:-1] - bounds[0], slice(bounds[0], bounds[-1])
        own, scored, rows = store.suffix_len[responses], store.num_tokens[responses], np.diff(bounds)
        seen = np.repeat(shared, rows) + own / 2
        area = shared**2 / 2 + np.add.reduceat(own * seen, starts)
        tokens, target = shared + np.add.reduceat(own, starts), store.target[first:end]
        return cls(
            tokens=_small(tokens),
            separate=_small(tokens + shared * (rows - 1)),
            rows=_small(rows),
            longest=_small(shared + np.maximum.reduceat(own, starts)),
            cost=(tokens + area * ATTENTION_COST).astype(np.float32),
            items={
                "pairs": _small(np.diff(store.pair_start[first : end + 1])),
                "responses": _small(rows),
                "records": _small(np.ones_like(rows)),
                "tokens": _small(np.add.reduceat(scored, starts)),
                "target_tokens": _small(np.where(target < 0, 0, scored[starts + target.clip(0)])),
            },
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def first(self, count: int | None) -> "Lengths":
        """Return those of the first records; of all for `None`."""
        items = {item: numbers[:count] for item, numbers in self.items.items()}
        sizes = (self.tokens[:count], self.separate[:count], self.rows[:count], self.longest[:count])
        return Lengths(*sizes, self.cost[:count], items)


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        number: counted from 0 over the whole run.
        records: in the order of the seeded permutation.
        tokens: that they occupy where responses share their prompt.
        schedule: for each rank its micro-batches, the same number on every rank; an empty one is a filler.
        counts: how many of each item the step has, over all ranks and micro-batches.
    """

    number: int
    records: tuple[int, ...]
    tokens: int
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
        counts = {item: _total(numbers, records) for item, numbers in self.lengths.items.items()}
        tokens = _total(self.lengths.tokens, records)
        return Step(number, tuple(records.tolist()), tokens, self._schedule(records, tokens), counts)

    def one_pass(self, lengths: Lengths) -> "Plan":
        """Return the plan of one pass over other records, in their order, on the same machine."""
        return Plan(lengths, self.global_batch_size, self.world_size, self.max_tokens, self.layout)

    def _order(self, epoch: int) -> Ints:
        return np.arange(len(self.lengths)) if self.seed is None else _permutation(len(self.lengths), self.seed, epoch)

    def _schedule(self, records: Ints, tokens: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Lay records over `world_size * m` bins of about equal cost, with the smallest m that fits the budget."""
        most = math.ceil(len(records) / self.world_size)
        m = min(most, max(1, tokens // (self.world_size * self.max_tokens)))
        cost, (size, rows) = self.lengths.cost[records], self._sizes
        size, rows = size[records], None if rows is None else rows[records]
        while True:
            order, bins = fill_bins(cost, self.world_size * m)
            if m >= most or self._fit(size[order], None if rows is None else rows[order], bins):
                return self._by_rank(records[order], bins, m)
            m += 1

    def _by_rank(self, records: Ints, bins: Ints, m: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Records bin by bin, in the order that they have, and every `world_size`-th bin to the same rank."""
        count = self.world_size * m
        ends = np.cumsum(np.bincount(bins, minlength=count))
        # Numbers of two bytes are sorted in a few passes.
        sorted_records = records[np.argsort(_small(bins), kind="stable")].tolist()
        filled = [tuple(sorted_records[start:end]) for start, end in itertools.pairwise([0, *ends.tolist()])]
        return tuple(tuple(filled[rank :: self.world_size]) for rank in range(self.world_size))

    def _fit(self, size: Ints, rows: Ints | None, bins: Ints) -> bool:
        """Whether every bin is within the budget, or holds one record only."""
        held = np.bincount(bins)
        used: NDArray[Any]
        if rows is None:
            used = np.bincount(bins, weights=size)
        else:
            widest = np.zeros(len(held))
            np.maximum.at(widest, bins, size)
            used = widest * np.bincount(bins, weights=rows)
        return bool(np.all((held <= 1) | (used <= self.max_tokens)))

    def tokens_of(self, records: tuple[int, ...]) -> int:
        """Tokens that a micro-batch of these records occupies, padding included."""
        size, rows = self._sizes
        at = np.array(records, dtype=np.int64)
        return int(size[at].sum()) if rows is None else int(rows[at].sum()) * int(size[at].max())

    @cached_property
    def _sizes(self) -> tuple[Ints, Ints | None]:
        """What a record occupies of a layout of one row; its longest row and their number, where rows are padded."""
        lengths = self.lengths
        sizes: dict[Layout, tuple[Ints, Ints | None]] = {
            "shared": (lengths.tokens, None),
            "masked": (lengths.tokens, lengths.items["records"]),
            "packed": (lengths.separate, None),
            "padded": (lengths.longest, lengths.rows),
        }
        return sizes[self.layout]


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> Ints:
    """The order of an epoch; kept for its many steps."""
    return _small(np.random.default_rng([seed, epoch]).permutation(count))


def _total(numbers: Ints, records: Ints) -> int:
    """The sum over some records."""
    return int(numbers[0]) * len(records) if numbers.strides == (0,) else int(numbers[records].sum())


def _small(values: Ints) -> Ints:
    """Whole numbers of at least zero in as few bytes as they need; in none where all are the same."""
    if values.min() == (largest := values.max()):
        return np.broadcast_to(largest, values.shape)
    return values.astype(np.min_scalar_type(largest), copy=False)

"""The plan: the records of every step, and their schedule over ranks and micro-batches.

A pure function of (lengths, seed, epoch, global batch size, world size, token budget). The records of a step depend on
the first four alone; the schedule changes no maths. The position in the data is the step number, which is all that
resuming needs. Micro-batches are filled longest first, each record into the one with the least cost so far.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpoctl.data.store import TokenStore
from dpoctl.errors import DataError
from dpoctl.losses import Item
from dpoctl.model.attention import Layout

Ints = NDArray[np.integer[Any]]
# Records whose lengths are computed at a time, which bounds temporary memory.
PART = 1 << 20
# Attention work of one (query, key) pair over the linear work of one token, for models of usual proportions.
ATTENTION_COST = 1 / 8192


@dataclass(frozen=True)
class Lengths:
    """The lengths of n records, in a few bytes each.

    Attributes:
        tokens: `[n]`, tokens of a record whose responses share their prompt.
        separate: `[n]`, tokens of a record whose responses each have a copy of the prompt.
        longest: `[n]`, tokens of the prompt and the longest answer.
        cost: `[n]`, work of a forward, in tokens.
        items: `[n]` for each item, its number in each record.
    """

    tokens: Ints
    separate: Ints
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
        """Return the lengths of the first `count` records, or of all for `None`."""
        items = {item: numbers[:count] for item, numbers in self.items.items()}
        return Lengths(self.tokens[:count], self.separate[:count], self.longest[:count], self.cost[:count], items)


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        number: counted from 0 over the whole run.
        records: in the order of the seeded permutation.
        tokens: their tokens, each prompt counted once.
        schedule: the micro-batches of each rank, the same number on every rank; an empty one is a filler.
        counts: the number of each item in the step, over all ranks and micro-batches.
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
        lengths: the lengths of the records.
        global_batch_size: records in a step; the last step of an epoch may be smaller.
        world_size: the number of ranks.
        max_tokens: token budget of a micro-batch; a record above it gets a micro-batch of its own.
        layout: decides how the tokens of a micro-batch are counted.
        seed: of the order; `None` keeps the order of the store.
        num_epochs: passes over the data; may be a fraction.
        max_steps: the number of steps, in place of `num_epochs`.
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
        """Return a step, always the same for the same plan."""
        epoch, position = divmod(number, self.steps_per_epoch)
        first = position * self.global_batch_size
        records = self._order(epoch)[first : first + self.global_batch_size]
        counts = {item: _total(numbers, records) for item, numbers in self.lengths.items.items()}
        tokens = _total(self.lengths.tokens, records)
        return Step(number, tuple(records.tolist()), tokens, self._schedule(records, tokens), counts)

    @property
    def num_rows(self) -> int:
        """The number of records that all steps take, each as often as it is taken."""
        epochs, steps = divmod(self.num_steps, max(1, self.steps_per_epoch))
        return epochs * len(self.lengths) + min(steps * self.global_batch_size, len(self.lengths))

    def records(self) -> Ints:
        """Return the records that the steps use, in the order of their first use."""
        return self._order(0)[: self.num_steps * self.global_batch_size]

    def groups(self, records: Ints) -> Iterator[Ints]:
        """Split records, in order, into groups of about one micro-batch a rank, and of at most `global_batch_size`."""
        size, rows = self._sizes
        ends = np.cumsum((size if rows is None else size * rows)[records], dtype=np.int64)
        start = 0
        while start < len(records):
            full = int(ends[start - 1] if start else 0) + self.world_size * self.max_tokens
            end = max(start + 1, int(np.searchsorted(ends, full, side="right")))
            end = min(end, start + self.global_batch_size)
            yield records[start:end]
            start = end

    def schedule(self, records: Ints) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Return the micro-batches of each rank, as in a `Step`, for any records."""
        return self._schedule(records, _total(self.lengths.tokens, records))

    def one_pass(self, lengths: Lengths) -> "Plan":
        """Return the plan of one pass over other records, in their order, on the same machine."""
        return Plan(lengths, self.global_batch_size, self.world_size, self.max_tokens, self.layout)

    def with_half_budget(self, number: int) -> "Plan":
        """Return the plan with half the token budget, or half of what the largest micro-batch of a step needed."""
        schedule = self.step(number).schedule
        largest = max(self.tokens_of(records) for batches in schedule for records in batches if records)
        return replace(self, max_tokens=max(1, min(self.max_tokens, largest) // 2))

    def _order(self, epoch: int) -> Ints:
        return np.arange(len(self.lengths)) if self.seed is None else _permutation(len(self.lengths), self.seed, epoch)

    def _schedule(self, records: Ints, tokens: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Fill `world_size * m` micro-batches of about equal cost, with the smallest m that fits the budget."""
        most = math.ceil(len(records) / self.world_size)
        m = min(most, max(1, tokens // (self.world_size * self.max_tokens)))
        cost, (size, rows) = self.lengths.cost[records], self._sizes
        size, rows = size[records], None if rows is None else rows[records]
        while True:
            order, bins = fill_bins(cost, self.world_size * m)
            if m >= most or self._fits(size[order], None if rows is None else rows[order], bins):
                return self._by_rank(records[order], bins, m)
            m += 1

    def _by_rank(self, records: Ints, bins: Ints, m: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Collect the records of each bin in order, and give every `world_size`-th bin to the same rank."""
        count = self.world_size * m
        ends = np.cumsum(np.bincount(bins, minlength=count))
        # Numbers of two bytes are radix-sorted, in a few passes.
        sorted_records = records[np.argsort(_small(bins), kind="stable")].tolist()
        filled = [tuple(sorted_records[start:end]) for start, end in itertools.pairwise([0, *ends.tolist()])]
        return tuple(tuple(filled[rank :: self.world_size]) for rank in range(self.world_size))

    def _fits(self, size: Ints, rows: Ints | None, bins: Ints) -> bool:
        """Whether every bin is within the budget, or holds a single record."""
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
        """Return the tokens of a micro-batch of these records, padding included."""
        size, rows = self._sizes
        at = np.array(records, dtype=np.int64)
        return int(size[at].sum()) if rows is None else int(rows[at].sum()) * int(size[at].max())

    @cached_property
    def _sizes(self) -> tuple[Ints, Ints | None]:
        """Tokens of each record and `None` in a flat layout; length and number of its rows in a padded one."""
        lengths = self.lengths
        sizes: dict[Layout, tuple[Ints, Ints | None]] = {
            "shared": (lengths.tokens, None),
            "masked": (lengths.tokens, lengths.items["records"]),
            "packed": (lengths.separate, None),
            "padded": (lengths.longest, lengths.items["responses"]),
        }
        return sizes[self.layout]


def fill_bins(cost: NDArray[np.float32], count: int) -> tuple[Ints, Ints]:
    """Put items into bins, the largest cost first, each into the bin with the least cost, of equal ones the first.

    A heap would place them one by one. Here many are placed at once: the next items go into the lightest bins in turn,
    up to the first bin that is no longer lighter than one that was just filled.

    Args:
        cost: `[n]`, above zero.
        count: the number of bins.

    Returns:
        `[n]`, the items in order of falling cost, and `[n]`, the bin of each.
    """
    order = _descending(cost)
    descending, load = cost[order].astype(np.float64), np.zeros(count)
    chosen = np.empty(len(cost), dtype=np.int64)
    done = 0
    while done < len(cost):
        lightest = np.argsort(load, kind="stable")[: len(cost) - done]
        filled = load[lightest] + descending[done : done + len(lightest)]
        late = load[lightest[1:]] >= np.minimum.accumulate(filled[:-1])
        taken = int(late.argmax()) + 1 if late.any() else len(lightest)
        load[lightest[:taken]] = filled[:taken]
        chosen[done : done + taken] = lightest[:taken]
        done += taken
    return order, chosen


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> Ints:
    """The order of an epoch, cached for its steps."""
    return _small(np.random.default_rng([seed, epoch]).permutation(count))


def _total(numbers: Ints, records: Ints) -> int:
    """The sum of some records' numbers."""
    return int(numbers[0]) * len(records) if numbers.strides == (0,) else int(numbers[records].sum())


def _small(values: Ints) -> Ints:
    """Store whole numbers of at least zero in the smallest dtype; equal ones share one element."""
    if values.min() == (largest := values.max()):
        return np.broadcast_to(largest, values.shape)
    return values.astype(np.min_scalar_type(largest), copy=False)


def _descending(cost: NDArray[np.float32]) -> Ints:
    """Stable order of falling costs above zero."""
    # The bits of positive floats sort like the floats. With the index in the lower half all keys differ, so that the
    # fastest sort, which is not stable, gives a stable order on every machine.
    bits = np.asarray(cost, dtype=np.float32).view(np.uint32)
    keys = np.sort(((~bits).astype(np.uint64) << np.uint64(32)) | np.arange(len(cost), dtype=np.uint64))
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)

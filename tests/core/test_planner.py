"""The plan: every record once an epoch, budgets kept, ranks in step, and nothing that depends on the machine."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from memory_store import MemoryStore, random_pairs

from dpoctl.core import planner
from dpoctl.core.planner import Lengths, Plan, fill_bins

LENGTHS = Lengths.of(MemoryStore(random_pairs(37)))


def trained(plan: Plan) -> list[int]:
    return [r for step in plan for rank in step.schedule for micro in rank for r in micro]


def test_lengths_count_shared_tokens_once() -> None:
    store = MemoryStore(random_pairs(3))
    lengths = Lengths.of(store)
    for record, example in enumerate(store.examples):
        a, b = example.suffixes
        assert lengths.tokens[record] == len(example.shared) + len(a) + len(b)
        assert lengths.longest[record] == len(example.shared) + max(len(a), len(b))
        scored = 2 * example.shared_scored.sum() + len(a) + len(b)
        assert lengths.items["tokens"][record] == scored
    assert lengths.items["pairs"].tolist() == [1, 1, 1]
    assert lengths.items["responses"].tolist() == [2, 2, 2]
    assert lengths.items["records"].tolist() == [1, 1, 1]


def test_tokens_to_imitate_are_those_of_each_record_s_target() -> None:
    examples = [replace(e, target=target) for e, target in zip(random_pairs(3), (1, -1, 0), strict=True)]
    store = MemoryStore(examples)
    expected = [store.num_tokens[1], 0, store.num_tokens[4]]
    assert Lengths.of(store).items["target_tokens"].tolist() == expected
    assert Plan(Lengths.of(store), 2).step(0).counts["target_tokens"] == store.num_tokens[1]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("max_tokens", [1, 90, 300, 1 << 62])
@pytest.mark.parametrize("layout", ["shared", "masked", "packed", "padded"])
def test_every_record_is_used_once_an_epoch_within_the_budget(world_size: int, max_tokens: int, layout: str) -> None:
    plan = Plan(LENGTHS, 8, world_size, max_tokens, layout, seed=3, num_epochs=2)
    used = trained(plan)
    assert sorted(used[:37]) == sorted(used[37:]) == list(range(37))
    for step in plan:
        assert len({len(rank) for rank in step.schedule}) == 1
        for micro in itertools.chain.from_iterable(step.schedule):
            assert len(micro) <= 1 or plan.tokens_of(micro) <= max_tokens


def test_records_and_counts_of_a_step_do_not_depend_on_the_schedule() -> None:
    plans = [Plan(LENGTHS, 8, w, b, seed=1, num_epochs=3) for w in (1, 2, 5) for b in (50, 1 << 62)]
    for steps in zip(*plans, strict=True):
        assert len({(step.records, tuple(step.counts.items())) for step in steps}) == 1


def test_the_last_step_of_an_epoch_is_smaller_and_counted_so() -> None:
    plan = Plan(LENGTHS, 8, seed=0)
    assert [step.counts["pairs"] for step in plan] == [8, 8, 8, 8, 5]


def test_a_rank_without_records_gets_a_filler() -> None:
    plan = Plan(LENGTHS, 1, world_size=3, seed=0)
    assert [[bool(m) for m in rank] for rank in plan.step(0).schedule] == [[True], [False], [False]]


def test_epochs_are_shuffled_differently_and_seeds_too() -> None:
    plan = Plan(LENGTHS, 37, seed=0, num_epochs=2)
    assert plan.step(0).records != plan.step(1).records
    assert plan.step(0).records != Plan(LENGTHS, 37, seed=1).step(0).records
    assert plan.step(0).records == Plan(LENGTHS, 37, seed=0).step(0).records


def test_without_a_seed_the_order_is_the_store_s() -> None:
    assert Plan(LENGTHS, 10).step(0).records == tuple(range(10))


@pytest.mark.parametrize(("epochs", "max_steps", "steps"), [(1, None, 5), (0.5, None, 3), (2, None, 10), (1, 7, 7)])
def test_number_of_steps(epochs: float, max_steps: int | None, steps: int) -> None:
    assert Plan(LENGTHS, 8, num_epochs=epochs, max_steps=max_steps).num_steps == steps


@pytest.mark.parametrize(
    ("batch", "changes"),
    [(8, {"num_epochs": 2.5}), (64, {}), (8, {"max_steps": 3}), (8, {"max_steps": 0}), (5, {"max_steps": 17})],
)
def test_the_number_of_rows_is_that_of_all_steps(batch: int, changes: dict[str, Any]) -> None:
    plan = Plan(LENGTHS, batch, **changes)
    assert plan.num_rows == sum(len(step.records) for step in plan)


def test_ranks_are_balanced_by_cost() -> None:
    plan = Plan(LENGTHS, 32, world_size=4, seed=0)
    loads = [sum(LENGTHS.cost[list(micro)].sum() for micro in rank) for rank in plan.step(0).schedule]
    assert max(loads) < 1.1 * np.mean(loads)


def one_by_one(cost: np.ndarray, count: int) -> list[int]:
    """Longest first, each into the lightest bin, spelled out."""
    load, chosen = np.zeros(count), [0] * len(cost)
    for at in np.argsort(-cost, kind="stable"):
        chosen[at] = int(load.argmin())
        load[chosen[at]] += cost[at]
    return chosen


@pytest.mark.parametrize("count", [1, 2, 7, 64, 300])
@pytest.mark.parametrize("spread", ["even", "heavy-tailed", "equal", "few"])
def test_placing_many_items_at_once_is_placing_one_by_one(count: int, spread: str) -> None:
    rng = np.random.default_rng(count)
    cost = {
        "even": rng.integers(100, 200, 257),
        "heavy-tailed": np.ceil(rng.pareto(0.7, 257)) + 1,
        "equal": np.full(129, 5),
        "few": rng.integers(1, 9, 3),
    }[spread].astype(np.float32)
    order, bins = fill_bins(cost, count)
    assert order.tolist() == np.argsort(-cost, kind="stable").tolist()
    assert bins.tolist() == [one_by_one(cost, count)[item] for item in order]


def test_numbers_that_are_all_the_same_take_no_memory() -> None:
    assert LENGTHS.items["responses"].strides == LENGTHS.items["pairs"].strides == (0,)
    assert LENGTHS.tokens.dtype.itemsize <= 2


def test_lengths_do_not_depend_on_how_many_are_worked_out_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore(random_pairs(37))
    monkeypatch.setattr(planner, "PART", 5)
    parts = Lengths.of(store)  # type: ignore[arg-type]
    for name in ("tokens", "separate", "longest", "cost"):
        assert getattr(parts, name).tolist() == getattr(LENGTHS, name).tolist()
    assert {k: v.tolist() for k, v in parts.items.items()} == {k: v.tolist() for k, v in LENGTHS.items.items()}


def test_512_ranks_of_64_pairs_are_balanced_within_two_percent() -> None:
    rng = np.random.default_rng(0)
    tokens = np.clip(rng.lognormal(5.2, 0.8, 512 * 64), 16, 2048).astype(np.int64)
    ones = np.ones_like(tokens)
    items = dict.fromkeys(("pairs", "records", "responses"), ones)
    lengths = Lengths(tokens, tokens, tokens, tokens.astype(np.float32), items)  # type: ignore[arg-type]
    step = Plan(lengths, len(tokens), world_size=512, seed=0).step(0)
    loads = [sum(tokens[list(micro)].sum() for micro in rank) for rank in step.schedule]
    assert max(loads) <= 1.02 * min(loads)


@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_the_records_of_a_plan_are_those_of_its_steps_in_order(steps: int) -> None:
    plan = Plan(Lengths.of(MemoryStore(random_pairs(11))), 3, seed=5, max_steps=steps)  # type: ignore[arg-type]
    used = dict.fromkeys(record for step in plan for record in step.records)
    assert plan.records().tolist() == list(used)


@pytest.mark.parametrize("layout", ["shared", "packed", "padded", "masked"])
@pytest.mark.parametrize(("world_size", "max_tokens", "most"), [(1, 1, 99), (1, 60, 99), (2, 60, 99), (1, 10_000, 4)])
def test_groups_keep_the_order_and_fill_a_micro_batch_a_rank(
    world_size: int, max_tokens: int, most: int, layout: str
) -> None:
    lengths = Lengths.of(MemoryStore(random_pairs(23)))  # type: ignore[arg-type]
    plan = Plan(lengths, most, world_size, max_tokens, layout)  # type: ignore[arg-type]
    order = np.random.default_rng(0).permutation(23)[:17]
    groups = list(plan.groups(order))
    assert np.concatenate(groups).tolist() == order.tolist()
    assert all(1 <= len(group) <= most for group in groups)
    if layout in ("shared", "packed"):
        sizes = lengths.tokens if layout == "shared" else lengths.separate
        totals = [int(sizes[group].sum()) for group in groups]
        assert all(
            total <= world_size * max_tokens or len(group) == 1 for total, group in zip(totals, groups, strict=True)
        )
    for group in groups:
        schedule = plan.schedule(group)
        assert sorted(record for rank in schedule for records in rank for record in records) == sorted(group)

"""Batches come from a thread one step ahead: the same ones, in order, and its errors are the loop's."""

import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from memory_store import MemoryStore, random_pairs

from dpoctl.core.batch import Batch
from dpoctl.core.planner import Lengths, Plan
from dpoctl.core.reader import Prefetcher, Reader

STORE = MemoryStore(random_pairs(11))


class Watched(Reader):
    """Says which thread builds what."""

    def batches(self, schedule: Sequence[Sequence[int]]) -> list[Batch]:
        built.append((threading.current_thread().name, schedule))
        if len(built) == fails_at:
            raise ValueError("no such record")
        return super().batches(schedule)


built: list[tuple[str, Sequence[Sequence[int]]]] = []
fails_at = 0


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    built.clear()


def world(max_tokens: int = 100) -> tuple[Plan, Watched]:
    reader = Watched(STORE, "shared", torch.device("cpu"))  # type: ignore[arg-type]
    return Plan(Lengths.of(STORE), 4, max_tokens=max_tokens, seed=0, num_epochs=2), reader  # type: ignore[arg-type]


def test_the_steps_are_those_of_the_plan_from_the_one_that_is_asked_for() -> None:
    plan, reader = world()
    with Prefetcher(reader, 0) as ahead:
        found = [ahead.take(plan, number) for number in range(2, plan.num_steps)]
    assert [step for step, _ in found] == list(plan)[2:]
    for step, batches in found:
        for ours, true in zip(batches, Reader.batches(reader, step.schedule[0]), strict=True):
            assert torch.equal(ours.input_ids, true.input_ids)


def test_the_next_step_is_built_while_this_one_is_computed() -> None:
    plan, reader = world()
    with Prefetcher(reader, 0) as ahead:
        ahead.take(plan, 0)
        deadline = time.monotonic() + 30
        while len(built) < 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        ahead.take(plan, 1)
    assert built[1][0].startswith("batches")
    assert 2 <= len(built) <= 3, "one step ahead, and no more; none is built twice"


def test_what_was_prepared_of_another_plan_is_thrown_away() -> None:
    plan, reader = world()
    smaller = replace(plan, max_tokens=1)
    with Prefetcher(reader, 0) as ahead:
        ahead.take(plan, 0)
        step, batches = ahead.take(smaller, 1)
    assert step == smaller.step(1)
    assert len(batches) == 4 > len(plan.step(1).schedule[0]), "of the plan that was asked for"


def test_an_error_reaches_the_loop_at_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "fails_at", 3)
    plan, reader = world()
    with Prefetcher(reader, 0) as ahead:
        ahead.take(plan, 0), ahead.take(plan, 1)
        with pytest.raises(ValueError, match="no such record"):
            ahead.take(plan, 2)


def test_the_last_step_prepares_nothing() -> None:
    plan, reader = world()
    with Prefetcher(reader, 0) as ahead:
        ahead.take(plan, plan.num_steps - 1)
    assert len(built) == 1

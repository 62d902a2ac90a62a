"""Batches come from a thread one step ahead: the same ones, in order, and its errors are the loop's."""

import threading
import time
from collections.abc import Sequence

import pytest
import torch
from memory_store import MemoryStore, random_pairs

from dpoctl.core.ahead import prepared
from dpoctl.core.batch import Batch
from dpoctl.core.planner import Lengths, Plan
from dpoctl.core.reader import Reader

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
    with prepared(plan, reader, 0, 2) as steps:
        found = list(steps)
    assert [step for step, _ in found] == list(plan)[2:]
    for step, batches in found:
        for ours, true in zip(batches, Reader.batches(reader, step.schedule[0]), strict=True):
            assert torch.equal(ours.input_ids, true.input_ids)


def test_the_next_step_is_built_while_this_one_is_computed() -> None:
    plan, reader = world()
    with prepared(plan, reader, 0, 0) as steps:
        next(steps)
        deadline = time.monotonic() + 30
        while len(built) < 2 and time.monotonic() < deadline:
            time.sleep(0.001)
    assert len(built) == 2, "one step ahead, and no more"
    assert all(name.startswith("batches") for name, _ in built)


def test_an_error_reaches_the_loop_at_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "fails_at", 3)
    plan, reader = world()
    with prepared(plan, reader, 0, 0) as steps:
        next(steps), next(steps)
        with pytest.raises(ValueError, match="no such record"):
            next(steps)


def test_a_run_that_is_done_builds_nothing() -> None:
    plan, reader = world()
    with prepared(plan, reader, 0, plan.num_steps) as steps:
        assert list(steps) == []
    assert built == []

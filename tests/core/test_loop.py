"""The order of events in a run, its ways to end, and the steps that are not applied."""

import itertools
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from accelerate import Accelerator
from loop_samples import Notes, stepper_of
from torch import Tensor

from dpoctl.core.loop import Cadence, EvalSet, fit
from dpoctl.core.objective import Objective
from dpoctl.core.step import MemoryRetry, Stepper
from dpoctl.errors import RunError, StoppedError
from dpoctl.losses import Loss, Memory, PreferenceLoss, Scores
from dpoctl.losses.base import log_sigmoid

NEVER = Cadence(logging=100)
STEPS = 8


def evals_of(stepper: Stepper) -> Mapping[str, EvalSet]:
    return {"eval": EvalSet(stepper.reader, stepper.plan.lengths)}


def weights(stepper: Stepper) -> Tensor:
    return next(stepper.objective.scorer.parameters()).detach().clone()


def test_a_step_is_logged_then_evaluated_then_saved() -> None:
    notes, stepper = Notes(), stepper_of()
    assert stepper.plan.num_steps == STEPS
    stepper.plan = replace(stepper.plan, max_steps=5)
    cadence = Cadence(logging=2, eval=2, save=3, eval_on_start=True)
    assert fit(stepper, notes, cadence, evals_of(stepper)) == 5
    assert notes.events == [
        *("log eval 0", "evaluated 0"),
        "advance 1",
        *("advance 2", "log 2", "log eval 2", "evaluated 2"),
        *("advance 3", "log 3", "save 3"),
        *("advance 4", "log 4", "log eval 4", "evaluated 4"),
        *("advance 5", "log 5", "log eval 5", "evaluated 5", "save 5", "wait_saved"),
    ]


def test_the_end_is_logged_evaluated_and_saved_whatever_the_cadence() -> None:
    notes, stepper = Notes(), stepper_of()
    fit(stepper, notes, NEVER, evals_of(stepper))
    end = [f"log {STEPS}", f"log eval {STEPS}", f"evaluated {STEPS}", f"save {STEPS}", "wait_saved"]
    assert notes.events == [*(f"advance {step}" for step in range(1, STEPS + 1)), *end]


def test_a_row_holds_the_mean_since_the_last_one_and_the_state_of_the_step() -> None:
    every, second = Notes(), Notes()
    fit(stepper_of(), every, Cadence(logging=1), {})
    fit(stepper_of(), second, Cadence(logging=2), {})
    (_, first), (_, then) = every.rows[:2]
    step, row = second.rows[0]
    tokens = [step.counts["tokens"] for step in stepper_of().plan]
    mean = (tokens[0] * first["loss"] + tokens[1] * then["loss"]) / (tokens[0] + tokens[1])
    assert step == 2
    assert row["loss"] == pytest.approx(mean, rel=1e-6)
    assert row.keys() == {"loss", "grad_norm", "learning_rate", "epoch", "tokens_per_second"}
    assert (row["learning_rate"], row["grad_norm"]) == (pytest.approx(0.2), then["grad_norm"])
    assert row["epoch"] == 0.5


def test_several_evaluation_sets_have_their_names_in_front() -> None:
    notes, stepper = Notes(), stepper_of()
    stepper.plan = replace(stepper.plan, max_steps=1)
    (data,) = evals_of(stepper).values()
    fit(stepper, notes, NEVER, {"eval": data, "other": data})
    assert [sorted(row) for _, row in notes.rows[1:]] == [
        ["eval_loss", "eval_loss_se"],
        ["eval_other_loss", "eval_other_loss_se"],
    ]
    assert notes.events[-3:] == ["evaluated 1", "save 1", "wait_saved"]


def test_a_signal_ends_the_run_after_the_next_step_with_a_checkpoint_and_no_evaluation() -> None:
    notes = Notes(lambda event: event == "advance 2" and os.kill(os.getpid(), signal.SIGTERM))
    stepper = stepper_of()
    with pytest.raises(StoppedError) as stopped:
        fit(stepper, notes, NEVER, evals_of(stepper))
    assert (stopped.value.step, stopped.value.exit_code) == (3, 143)
    assert notes.events == ["advance 1", "advance 2", "advance 3", "log 3", "save 3", "wait_saved"]


def signal_in_evaluation(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Get a signal while the n-th batch of evaluation data is computed."""
    evaluate, calls = Objective.evaluate, itertools.count(1)

    def signalled(self: Objective, *arguments: Any) -> None:
        if next(calls) == at:
            os.kill(os.getpid(), signal.SIGINT)
        evaluate(self, *arguments)

    monkeypatch.setattr(Objective, "evaluate", signalled)


@pytest.mark.parametrize("at", [1, 4])
@pytest.mark.parametrize(("logging", "rows"), [(1, ["log 1", "advance 2", "log 2"]), (100, ["advance 2", "log 2"])])
def test_a_signal_breaks_an_evaluation_off_and_it_is_owed(
    logging: int, rows: list[str], at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes, stepper = Notes(), stepper_of()
    signal_in_evaluation(monkeypatch, at)
    with pytest.raises(StoppedError) as stopped:
        fit(stepper, notes, Cadence(logging=logging, eval=2), evals_of(stepper))
    assert (stopped.value.step, stopped.value.exit_code) == (2, 130)
    assert notes.events == ["advance 1", *rows, "save 2, evaluation owed", "wait_saved"]


def test_a_signal_while_samples_are_drawn_ends_the_run_before_the_next_step() -> None:
    notes, stepper = Notes(lambda event: event == "evaluated 2" and os.kill(os.getpid(), signal.SIGINT)), stepper_of()
    with pytest.raises(StoppedError) as stopped:
        fit(stepper, notes, Cadence(logging=1, eval=2), evals_of(stepper))
    assert stopped.value.step == 2
    assert notes.events[-5:] == ["log 2", "log eval 2", "evaluated 2", "save 2", "wait_saved"]


def test_of_several_sets_none_is_logged_before_all_are_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    notes, stepper = Notes(), stepper_of()
    (data,) = evals_of(stepper).values()
    signal_in_evaluation(monkeypatch, at=6)
    with pytest.raises(StoppedError):
        fit(stepper, notes, Cadence(logging=100, eval=2), {"eval": data, "other": data})
    assert not [event for event in notes.events if "eval " in event]


def test_an_evaluation_that_is_owed_comes_first() -> None:
    notes, stepper = Notes(), stepper_of()
    fit(stepper, notes, Cadence(logging=100), evals_of(stepper), start=7, owes_evaluation=True)
    assert notes.events[:3] == ["log eval 7", "evaluated 7", "advance 8"]
    notes = Notes()
    assert fit(stepper, notes, Cadence(), evals_of(stepper), start=STEPS, owes_evaluation=True) == STEPS
    assert notes.events == [f"log eval {STEPS}", f"evaluated {STEPS}"]


def test_the_best_evaluation_gets_a_checkpoint_whenever_it_comes() -> None:
    notes, stepper = Notes(bests={4}), stepper_of()
    fit(stepper, notes, Cadence(logging=3, eval=2), evals_of(stepper))
    assert notes.events[4:10] == ["advance 3", "log 3", "advance 4", "log eval 4", "evaluated 4", "log 4"]
    assert [event for event in notes.events if event.startswith("save")] == ["save 4", f"save {STEPS}"]


def test_a_run_that_was_to_end_at_the_step_that_it_resumes_from_ends_there() -> None:
    notes = Notes(stop_after="evaluated 5")
    assert fit(stepper_of(), notes, Cadence(), evals_of(stepper_of()), start=5, owes_evaluation=True) == 5
    assert notes.events == ["log eval 5", "evaluated 5"]


@pytest.mark.parametrize(("event", "done"), [("log 2", 2), ("log eval 4", 4)])
def test_the_observer_ends_the_run_after_what_it_was_told(event: str, done: int) -> None:
    notes, stepper = Notes(stop_after=event), stepper_of()
    assert fit(stepper, notes, Cadence(logging=2, eval=4), evals_of(stepper)) == done
    end = [f"log {done}", f"log eval {done}", f"evaluated {done}", f"save {done}", "wait_saved"]
    assert notes.events[-6:] == [f"advance {done}", *end]


def test_a_resumed_run_takes_the_steps_that_are_left() -> None:
    notes, whole, part = Notes(), stepper_of(), stepper_of()
    fit(whole, Notes(), NEVER, {})
    part.plan = replace(part.plan, max_steps=3)
    fit(part, Notes(), NEVER, {})
    part.plan = whole.plan
    cadence = Cadence(logging=100, eval_on_start=True)
    assert fit(part, notes, cadence, evals_of(part), start=3) == STEPS
    assert notes.events[:2] == ["advance 4", "advance 5"]
    assert torch.equal(weights(part), weights(whole))


def test_a_finished_run_does_nothing() -> None:
    notes, stepper = Notes(), stepper_of()
    assert fit(stepper, notes, Cadence(eval_on_start=True), evals_of(stepper), start=STEPS) == STEPS
    assert notes.events == []


def run_out_of_memory(monkeypatch: pytest.MonkeyPatch, step: int, times: int, error: Exception) -> list[int]:
    """Let the backward of a step fail, and return the list that its attempts' numbers of micro-batches go to."""
    backward, attempts = Objective.backward, list[int]()

    def starved(self: Objective, at: Any, *rest: Any) -> Any:
        memory = backward(self, at, *rest)
        if at.number == step:
            attempts.append(len(at.schedule[0]))
            if len(attempts) <= times:
                raise error
        return memory

    monkeypatch.setattr(Objective, "backward", starved)
    return attempts


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_memory_that_runs_out_is_retried_with_half_the_budget(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    plain, starved = stepper_of(max_tokens=300), stepper_of(max_tokens=300, retry=MemoryRetry(allowed=True))
    fit(plain, Notes(), NEVER, {})
    attempts, notes = run_out_of_memory(monkeypatch, 2, 1, error), Notes()
    largest = max(starved.plan.tokens_of(records) for records in starved.plan.step(2).schedule[0])
    assert fit(starved, notes, NEVER, evals_of(starved)) == STEPS
    assert (starved.retry.used, starved.plan.max_tokens) == (True, largest // 2)
    assert attempts[0] < attempts[1]
    message = f"out of memory with at most 300 tokens in a micro-batch; retrying once with at most {largest // 2}"
    assert f"step 3: {message}" in capfd.readouterr().err
    assert notes.events[:4] == ["advance 1", "advance 2", "advance 3", "advance 4"]
    torch.testing.assert_close(weights(starved), weights(plain))


@pytest.mark.parametrize(
    ("retry", "max_tokens", "times"),
    [
        (MemoryRetry(allowed=True), 300, 2),
        (MemoryRetry(allowed=True, used=True), 300, 1),
        (MemoryRetry(allowed=False), 300, 1),
        (MemoryRetry(allowed=True), 1, 1),
    ],
    ids=["twice", "used before", "not allowed", "no smaller budget"],
)
def test_memory_that_runs_out_for_good_ends_the_run(
    retry: MemoryRetry, max_tokens: int, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepper = stepper_of(max_tokens=max_tokens, retry=retry)
    run_out_of_memory(monkeypatch, 2, times, OUT_OF_MEMORY[0])
    with pytest.raises((RunError, torch.OutOfMemoryError), match="out of memory"):
        fit(stepper, Notes(), NEVER, {})


def test_another_error_is_not_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    stepper = stepper_of(retry=MemoryRetry(allowed=True))
    run_out_of_memory(monkeypatch, 2, 1, RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        fit(stepper, Notes(), NEVER, {})
    assert not stepper.retry.used


@dataclass(frozen=True, kw_only=True)
class Counting(PreferenceLoss):
    """A loss of the whole step that remembers how many steps it was shown."""

    couples_batch: ClassVar[bool] = True

    def for_step(self, scores: Scores, memory: Memory, *, step: int, seed: int) -> tuple[Loss, Memory]:
        return self, {"steps": memory.get("steps", 0.0) + 1}

    def __call__(self, scores: Scores) -> Tensor:
        return -log_sigmoid(scores.differences(self.beta * scores.logps))


class Following:
    """A live reference that says nothing, and writes down when it may follow the policy."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def __call__(self, batch: Any) -> Any:
        return batch

    def follow(self, step: int) -> None:
        self.steps.append(step)


def spoil(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Make the gradient of some steps, counted from 0, infinite."""
    backward = Objective.backward

    def spoilt(self: Objective, at: Any, *rest: Any) -> Any:
        memory = backward(self, at, *rest)
        if at.number in steps:
            next(self.scorer.parameters()).grad.view(-1)[0] = float("inf")  # type: ignore[union-attr]
        return memory

    monkeypatch.setattr(Objective, "backward", spoilt)


def test_a_number_that_is_not_finite_ends_the_run_before_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, stepper, notes = stepper_of(), stepper_of(), Notes()
    whole.plan = replace(whole.plan, max_steps=2)
    fit(whole, Notes(), NEVER, {})
    spoil(monkeypatch, {2})
    with pytest.raises(RunError, match=r"step 3: the gradient is not finite .*, in records \d"):
        fit(stepper, notes, NEVER, {})
    assert notes.events == ["advance 1", "advance 2"]
    assert torch.equal(weights(stepper), weights(whole))


def test_a_skipped_step_changes_nothing_and_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, notes = Following(), Notes()
    stepper = stepper_of(Counting(), reference=reference, on_nonfinite="skip")
    before: list[Tensor] = []
    notes.hear = lambda event: event.startswith("advance") and before.append(weights(stepper))
    spoil(monkeypatch, {2})
    fit(stepper, notes, Cadence(logging=1), {})
    assert [torch.equal(*pair) for pair in itertools.pairwise(before)].index(True) == 1
    assert [row.get("skipped_steps", 0) for _, row in notes.rows] == [0, 0, *[1] * (STEPS - 2)]
    assert "loss" not in notes.rows[2][1]
    assert stepper.objective.memory == ({"steps": STEPS - 1.0},)
    assert reference.steps == list(range(1, STEPS + 1)), "the step number decides, applied or not"


def test_memory_moves_with_applied_updates_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    stepper = stepper_of(Counting())
    stepper.plan = replace(stepper.plan, max_steps=1)
    fit(stepper, Notes(), NEVER, evals_of(stepper))
    assert stepper.objective.memory == ({"steps": 1.0},)
    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "optimizer_step_was_skipped", True)  # as after an overflow in float16
        fit(stepper, Notes(), NEVER, {})
    assert stepper.objective.memory == ({"steps": 1.0},)

"""Numbers that are not finite, and memory that runs out: found before the update, on all ranks together."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_runs import KINDS, Scene, at_step, die, outcome, rows_of
from forked import only_on
from safetensors.torch import load_file

TWO = ("--num-processes", "2")
SKIPPING = {"training.on_nonfinite": "skip"}


def losing(steps: set[int], value: float = float("nan"), rank: int = 0) -> Any:
    """Spoil the loss of some steps, counted from 0, on one rank."""

    def install() -> None:
        from dpoctl.core.objective import Objective

        backward = Objective.backward

        def spoilt(self: Any, step: Any, reader: Any, meter: Any, batches: Any) -> Any:
            memory = backward(self, step, reader, meter, batches)
            if step.number in steps and int(os.environ.get("RANK", "0")) == rank:
                meter._sums["loss"] = torch.tensor(value, dtype=torch.float64)
            return memory

        Objective.backward = spoilt  # type: ignore[method-assign]

    return install


def spoiling(step: int, rank: int = 0) -> Any:
    """Make one number of the gradient of a step infinite."""

    def install() -> None:
        from dpoctl.core.objective import Objective

        backward = Objective.backward

        def spoilt(self: Any, at: Any, reader: Any, meter: Any, batches: Any) -> Any:
            memory = backward(self, at, reader, meter, batches)
            if at.number == step:
                parameter = next(p for p in self.scorer.parameters() if p.grad is not None)
                parameter.grad.view(-1)[0] = float("inf")
            return memory

        Objective.backward = spoilt  # type: ignore[method-assign]

    return install


def without(steps: set[int]) -> Any:
    """Leave the update of some steps out: what skipping must come to."""

    def install() -> None:
        from dpoctl.core.guard import Guard

        check = Guard.check

        def refuse(self: Any, step: Any, loss: Any, norm: Any, signum: int) -> Any:
            is_good, signum = check(self, step, loss, norm, signum)
            return is_good and step.number not in steps, signum

        Guard.check = refuse  # type: ignore[method-assign]

    return install


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lambda rank: losing({5}, rank=rank), "the loss.* is not finite (nan)"),
        (lambda rank: losing({5}, float("-inf"), rank), "the loss.* is not finite (-inf)"),
        (lambda rank: spoiling(5, rank), "the gradient.* is not finite ("),
    ],
)
def test_a_number_that_is_not_finite_stops_the_run_before_the_update(
    fault: Any, said: str, ranks: int, scene: Scene, whole: bool, tally: Any
) -> None:
    if ranks == 2 and "gradient" not in said and not whole:
        pytest.skip("in the whole suite only")
    scene = scene.changed(KINDS["dpo"] | {"training.save_steps": 5})
    options = TWO if ranks == 2 else ()
    out = scene.folder / "run"
    ended = scene.run(out, *options, faults=[fault(ranks - 1)])
    assert ended.code == 1
    head, tail = said.split(".*")
    assert f"step 6: {head}" in ended.last
    assert tail in ended.last
    assert ", in records " in ended.last
    assert "Traceback" not in ended.err
    assert all("loss" not in row or row["loss"] > 0 for row in rows_of(out))
    weights = load_file(out / "checkpoints" / "step-000005" / "weights.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())
    assert json.loads((out / "run_status.json").read_text())["state"] == "failed"
    scene.finish(out, *options)
    survived = outcome(out) == scene.undisturbed(*options).outcome
    tally("a number that is not finite: stop", survived)
    assert survived


@pytest.mark.parametrize("kind", ["sft", "beta-dpo"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_skipped_step_is_as_if_it_had_not_been_and_is_counted(
    kind: str, ranks: int, scene: Scene, whole: bool, tally: Any
) -> None:
    if (kind, ranks) not in {("sft", 1), ("beta-dpo", 2)} and not whole:
        pytest.skip("in the whole suite only")
    scene, options = scene.changed(KINDS[kind] | SKIPPING), TWO if ranks == 2 else ()
    out, oracle = scene.folder / "run", scene.folder / "oracle"
    ended = scene.run(out, *options, faults=[losing({2, 5}, rank=0)])
    assert ended.code == 0, ended.err[-2000:]
    assert scene.run(oracle, *options, faults=[without({2, 5})]).code == 0
    assert ended.err.count("warning: step") >= 2
    assert "; step skipped (2 so far)" in ended.err
    rows = rows_of(out)
    assert [row.get("skipped_steps", 0) for row in rows if "grad_norm" in row] == [0, 0, 1, 1, 1, 2, 2, 2, 2, 2]
    assert "loss" not in next(row for row in rows if row["step"] == 3)
    stripped = [{key: value for key, value in row.items() if key != "skipped_steps"} for row in rows]
    survived = outcome(out)[0] == outcome(oracle)[0] and stripped == outcome(oracle)[1]
    tally("a number that is not finite: skip", survived)
    assert survived


def test_the_count_of_skipped_steps_survives_a_kill(scene: Scene, tally: Any) -> None:
    scene = scene.changed(KINDS["dpo"] | SKIPPING)
    scene.run(scene.folder / "whole", faults=[losing({2, 7})])
    out = scene.folder / "run"
    assert scene.run(out, faults=[losing({2, 7}), at_step(7, die)]).code == -9
    assert scene.run(out, "--resume", faults=[losing({2, 7})]).code == 0
    survived = outcome(out) == outcome(scene.folder / "whole")
    tally("a kill after a skipped step", survived)
    assert survived


def test_too_many_skipped_steps_in_a_row_stop_the_run(scene: Scene, tally: Any) -> None:
    scene = scene.changed(KINDS["dpo"] | SKIPPING)
    ended = scene.run(scene.folder / "run", faults=[losing(set(range(2, 10)))])
    assert ended.code == 1
    assert "step 8: the loss is not finite (nan) for the 6th time in a row" in ended.last
    tally("only numbers that are not finite", True)


def starving(step: int, times: int, error: Exception) -> Any:
    """Run out of memory in the backward pass of a step, so many times."""

    def install() -> None:
        from dpoctl.core.objective import Objective

        left, backward_share = [times], Objective._backward_share

        def starved(self: Any, share: Any) -> None:
            if self.steps == step and left[0]:
                left[0] -= 1
                raise error
            backward_share(self, share)

        backward = Objective.backward

        def counting(self: Any, at: Any, reader: Any, meter: Any, batches: Any) -> Any:
            self.steps = at.number
            return backward(self, at, reader, meter, batches)

        Objective.backward, Objective._backward_share = counting, starved  # type: ignore[method-assign]

    return install


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["device", "host"])
def test_memory_that_runs_out_once_costs_half_the_budget_and_nothing_else(
    error: Exception, scene: Scene, tally: Any
) -> None:
    scene = scene.changed(KINDS["sft"] | {"training.max_tokens_per_device": "auto", "model.disable_dropout": True})
    scene.finish(scene.folder / "whole")
    ended = scene.run(scene.folder / "run", faults=[starving(4, 1, error)])
    assert ended.code == 0, ended.err[-2000:]
    assert "step 5: out of memory with at most 2,048 tokens in a micro-batch; retrying once with" in ended.err
    rows, same = rows_of(scene.folder / "run"), rows_of(scene.folder / "whole")
    survived = all(
        row[key] == pytest.approx(other[key], rel=1e-5, abs=1e-6)
        for row, other in zip(rows, same, strict=True)
        for key in row
    )
    tally("out of memory once", survived)
    assert survived
    state = json.loads((scene.folder / "run" / "checkpoints" / "step-000010" / "state.json").read_text())
    assert state["extra"]["relieved"] is True
    assert state["extra"]["max_tokens"] < 2048


def test_a_run_that_was_retried_and_killed_resumes_to_the_same_bits(scene: Scene, tally: Any) -> None:
    scene, error = scene.changed(KINDS["dpo"]), OUT_OF_MEMORY[0]
    assert scene.run(scene.folder / "whole", faults=[starving(2, 1, error)]).code == 0
    out = scene.folder / "run"
    assert scene.run(out, faults=[starving(2, 1, error), at_step(7, die)]).code == -9
    scene.finish(out)
    survived = outcome(out) == outcome(scene.folder / "whole")
    tally("a kill after the budget was halved", survived)
    assert survived


@pytest.mark.long("twice")
@pytest.mark.parametrize(
    ("changes", "options", "times"),
    [({}, (), 9), ({"training.max_tokens_per_device": 300}, (), 1), ({}, TWO, 1)],
    ids=["twice", "a budget of the user's", "two ranks"],
)
def test_memory_that_runs_out_for_good_names_the_keys_to_change(
    changes: dict[str, Any], options: tuple[str, ...], times: int, scene: Scene, tally: Any
) -> None:
    fault = only_on(len(options) // 2, starving(4, times, OUT_OF_MEMORY[0]))
    ended = scene.changed(KINDS["dpo"] | changes).run(scene.folder / "run", *options, faults=[fault])
    assert ended.code == 1
    for key in ("training.max_tokens_per_device", "training.gradient_checkpointing", "data.max_length"):
        assert key in ended.err.splitlines()[-1], ended.err[-2000:]
    assert "Traceback" not in ended.err
    scene.changed(KINDS["dpo"] | changes).finish(scene.folder / "run", *options)
    tally("out of memory for good", True)


def test_weights_are_finite_in_every_checkpoint_of_a_diverging_run(scene: Scene, tally: Any) -> None:
    scene = scene.changed(KINDS["dpo"] | {"training.learning_rate": 1e20, "training.save_steps": 1})
    ended = scene.run(scene.folder / "run")
    assert ended.code == 1
    assert "is not finite" in ended.last
    assert Path(scene.folder / "run").exists()
    tally("a learning rate of 1e20", True)

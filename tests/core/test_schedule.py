"""The learning rate of every step: that of transformers, with a warm-up that does not waste the first step."""

import warnings
from typing import Any

import pytest
import torch
from good_recipe import GOOD
from torch import nn
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType

from dpoctl.core.schedule import learning_rate, warmup_steps
from dpoctl.errors import UsageError
from dpoctl.recipe.diagnostics import RecipeError
from dpoctl.recipe.library_arguments import SCHEDULES
from dpoctl.recipe.loader import parse_recipe
from dpoctl.recipe.schema import TrainingSection

STEPS, HIGHEST = 1000, 3e-4


def settings(**changes: Any) -> TrainingSection:
    return TrainingSection.model_validate({"output_dir": "x", "learning_rate": 1.0} | changes)


def rates(num_steps: int, **changes: Any) -> list[float]:
    rate = learning_rate(settings(**changes), num_steps)
    return [rate(number) for number in range(num_steps)]


def transformers_rates(kind: str, warmup: int, arguments: dict[str, Any]) -> list[float]:
    """Stepped as its trainer does."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=HIGHEST)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = get_scheduler(kind, optimizer, warmup, STEPS, arguments)
    found = []
    for _ in range(STEPS):
        found.append(float(scheduler.get_last_lr()[0]))
        optimizer.step()
        scheduler.step()
    return found


ARGUMENTS: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    ("cosine", {}),
    ("cosine", {"num_cycles": 1.5}),
    ("cosine_with_restarts", {}),
    ("cosine_with_restarts", {"num_cycles": 3}),
    ("cosine_with_min_lr", {"min_lr": 1e-5}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1, "num_cycles": 1.0}),
    ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1}),
    ("cosine_warmup_with_min_lr", {"min_lr": 1e-5, "warmup_lr_rate": 0.2}),
    ("polynomial", {}),
    ("polynomial", {"lr_end": 1e-6, "power": 2.0}),
    ("constant", {}),
    ("constant_with_warmup", {}),
    ("inverse_sqrt", {}),
    ("inverse_sqrt", {"timescale": 500}),
    ("warmup_stable_decay", {"num_decay_steps": 200}),
    ("warmup_stable_decay", {"num_decay_steps": 200, "num_stable_steps": 300, "decay_type": "1-sqrt"}),
    (
        "warmup_stable_decay",
        {"num_decay_steps": 300, "warmup_type": "cosine", "decay_type": "linear", "min_lr_ratio": 0.1},
    ),
]
RISES_FROM_MORE = {"cosine_warmup_with_min_lr"}


def test_every_schedule_is_compared_and_those_left_out_depend_on_metrics() -> None:
    assert {kind for kind, _ in ARGUMENTS} == SCHEDULES.keys()
    assert {kind.value for kind in SchedulerType} - SCHEDULES.keys() == {"reduce_lr_on_plateau", "greedy"}


@pytest.mark.parametrize(("kind", "arguments"), ARGUMENTS, ids=str)
def test_each_schedule_is_the_one_of_transformers(kind: str, arguments: dict[str, Any]) -> None:
    for warmup in (0, 100):
        theirs = transformers_rates(kind, warmup, arguments)
        changes = {"learning_rate": HIGHEST, "lr_scheduler_type": kind, "lr_scheduler_kwargs": arguments}
        changes |= {} if kind == "constant" else {"warmup_steps": warmup}
        from_zero = rates(STEPS, warmup_from_zero=True, **changes)
        assert from_zero == pytest.approx(theirs, abs=1e-12 * HIGHEST, rel=0)
        ahead = warmup if theirs[0] == 0 and warmup else 0
        expected = theirs[1 : ahead + 1] + theirs[ahead:]
        assert rates(STEPS, **changes) == pytest.approx(expected, abs=1e-12 * HIGHEST, rel=0)


def test_linear_rises_then_falls_to_zero_after_the_last_step() -> None:
    assert rates(6, lr_scheduler_type="linear", warmup_steps=2) == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])


def test_the_first_step_of_a_warm_up_is_wasted_only_if_asked_for() -> None:
    constant = {"lr_scheduler_type": "constant_with_warmup", "warmup_ratio": 0.5}
    assert rates(4, **constant) == pytest.approx([0.5, 1.0, 1.0, 1.0])
    assert rates(4, warmup_from_zero=True, **constant) == pytest.approx([0.0, 0.5, 1.0, 1.0])
    assert rates(2, lr_scheduler_type="constant") == [1.0, 1.0]


@pytest.mark.parametrize(
    ("changes", "steps"), [({}, 10), ({"warmup_ratio": 0.25}, 25), ({"warmup_steps": 3}, 3), ({"warmup_ratio": 0.0}, 0)]
)
def test_warm_up_is_a_tenth_unless_said_otherwise(changes: dict[str, Any], steps: int) -> None:
    assert warmup_steps(settings(**changes), 100) == steps


def test_a_decay_longer_than_the_run_is_refused() -> None:
    changes = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 95}}
    with pytest.raises(UsageError, match="100 steps, fewer than 10 of warm-up and 95 of decay"):
        rates(100, **changes)


WRONG = {
    "lr_scheduler_kwargs: {num_cycle: 1}": "cosine has no argument 'num_cycle'; it takes num_cycles",
    "lr_scheduler_kwargs: {num_cycles: two}": "lr_scheduler_kwargs.num_cycles: expected a number above 0, got 'two'",
    "lr_scheduler_type: linear, lr_scheduler_kwargs: {power: 1}": "linear has no argument 'power'; it takes none",
    "lr_scheduler_type: cosine_with_min_lr": "needs min_lr or min_lr_rate",
    "lr_scheduler_type: cosine_with_min_lr, lr_scheduler_kwargs: {min_lr: 1, min_lr_rate: 1}": "min_lr or min_lr_rate",
    "lr_scheduler_type: cosine_with_min_lr, lr_scheduler_kwargs: {min_lr: 1}": "must be below learning_rate",
    "lr_scheduler_type: polynomial, lr_scheduler_kwargs: {lr_end: 1}": "must be below learning_rate",
    "lr_scheduler_type: warmup_stable_decay": "needs num_decay_steps in lr_scheduler_kwargs",
    "lr_scheduler_type: constant, warmup_steps: 5": "constant has no warm-up; set constant_with_warmup",
    "lr_scheduler_type: constant, warmup_from_zero: true": "warmup_from_zero has no effect",
}


@pytest.mark.parametrize("lines", WRONG)
def test_arguments_that_a_schedule_cannot_use_are_refused_at_their_place(lines: str) -> None:
    text = GOOD + "".join(f"  {line}\n" for line in lines.replace(", l", "\nl").replace(", w", "\nw").split("\n"))
    with pytest.raises(RecipeError) as refused:
        parse_recipe(text, "r.yaml", command="dpo")
    (problem,) = refused.value.problems
    assert WRONG[lines] in problem.message
    assert problem.place is not None

"""The learning rate of each step, a pure function of the step's number: the schedules are those of transformers."""

import math
import warnings
from collections.abc import Callable

import torch
from torch import nn

from dpoctl.errors import UsageError
from dpoctl.recipe.schema import TrainingSection


def warmup_steps(training: TrainingSection, num_steps: int) -> int:
    """Return the number of warm-up steps; a tenth of the run unless the recipe sets it."""
    if training.lr_scheduler_type == "constant":
        return 0
    if training.warmup_steps is not None:
        return training.warmup_steps
    ratio = 0.1 if training.warmup_ratio is None else training.warmup_ratio
    # 0.07 * 100 is a little more than 7 in floating point.
    return math.ceil(round(ratio * num_steps, 6))


def learning_rate(training: TrainingSection, num_steps: int) -> Callable[[int], float]:
    """Return the learning rate of each step, counted from 0.

    It is the one of transformers. But where that starts at zero, the warm-up is one step ahead, unless the recipe sets
    `warmup_from_zero`: the first step is not wasted, and the last one of the warm-up has the full rate.

    Raises:
        UsageError: The stages of the schedule are longer than the run.
    """
    warmup = warmup_steps(training, num_steps)
    factor = _factor(training, warmup, num_steps)
    ahead = int(not training.warmup_from_zero and warmup > 0 and factor(0) == 0)
    return lambda number: training.learning_rate * factor(number + ahead if number < warmup else number)


def _factor(training: TrainingSection, warmup: int, num_steps: int) -> Callable[[int], float]:
    """Return the function by which transformers multiplies the highest learning rate."""
    from transformers import get_scheduler  # noqa: PLC0415 - it imports peft, which takes a second

    arguments = {key: value for key, value in training.lr_scheduler_kwargs.items() if value is not None}
    decay, stable = arguments.get("num_decay_steps", 0), arguments.get("num_stable_steps", 0)
    if decay and warmup + stable + decay > num_steps:
        raise UsageError(
            f"training.lr_scheduler_kwargs: the run has {num_steps:,} steps, fewer than {warmup:,} of warm-up"
            f"{f', {stable:,} stable ones' if stable else ''} and {decay:,} of decay",
            hint="set a smaller num_decay_steps",
        )
    # The schedules of transformers read nothing of their optimizer but the learning rate.
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=training.learning_rate)
    with warnings.catch_warnings():
        # That num_stable_steps is used, if it is given.
        warnings.simplefilter("ignore")
        scheduler = get_scheduler(training.lr_scheduler_type, optimizer, warmup, num_steps, arguments)
    factor: Callable[[int], float] = scheduler.lr_lambdas[0]
    return factor

"""One optimizer step: gradient, check, update; taken again with smaller micro-batches if memory runs out."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpoctl import console
from dpoctl.core.batch import Batch
from dpoctl.core.guard import Guard
from dpoctl.core.meters import Meter
from dpoctl.core.objective import Objective
from dpoctl.core.optim import set_learning_rate
from dpoctl.core.planner import Plan, Step
from dpoctl.core.reader import Reader
from dpoctl.errors import RunError
from dpoctl.model.memory import is_out_of_memory
from dpoctl.runs.signals import StopRequest

LESS_MEMORY = (
    "lower training.max_tokens_per_device, set training.gradient_checkpointing: true, or lower data.max_length; "
    "then continue with --resume"
)


@dataclass
class MemoryRetry:
    """The one retry of a run after memory ran out.

    Attributes:
        allowed: the recipe leaves the token budget open, and there is one process: several cannot be brought back to
            the same point after one of them failed.
        used: the run has been retried.
    """

    allowed: bool
    used: bool = False

    def smaller_plan(self, error: Exception, plan: Plan, number: int) -> Plan:
        """Return a plan with half the token budget for the rest of the run.

        Raises:
            RunError: memory ran out, and no retry is left.
            Exception: the error itself, if it is about something else.
        """
        if not is_out_of_memory(error):
            raise error
        message = f"step {number + 1}: out of memory with at most {plan.max_tokens:,} tokens in a micro-batch"
        if self.used or not self.allowed or plan.max_tokens < 2:
            raise RunError(message, hint=LESS_MEMORY) from error
        self.used, smaller = True, plan.with_half_budget(number)
        console.warn(f"{message}; retrying once with at most {smaller.max_tokens:,}")
        gc.collect()
        torch.cuda.empty_cache()
        return smaller


@dataclass(frozen=True)
class StepResult:
    """The outcome of a step.

    Attributes:
        grad_norm: the norm of the gradient before clipping.
        learning_rate: the learning rate of the update.
        signum: the signal to stop that any rank has received, 0 for none.
    """

    grad_norm: float
    learning_rate: float
    signum: int


@dataclass
class Stepper:
    """Takes the optimizer steps of a plan.

    Attributes:
        objective: gives the gradient.
        optimizer: as accelerate prepared it.
        plan: of the run; a retry replaces it.
        reader: of the training data.
        guard: decides if an update may happen.
        learning_rate: the learning rate by step number.
        max_grad_norm: the gradient is clipped to it.
        retry: answers memory that runs out.
        clip: clips the gradient of all ranks to a norm, and returns its norm before.
    """

    objective: Objective
    optimizer: Any
    plan: Plan
    reader: Reader
    guard: Guard
    learning_rate: Callable[[int], float]
    max_grad_norm: float | None
    retry: MemoryRetry
    clip: Callable[[float], Tensor]

    def take(self, step: Step, batches: Sequence[Batch], meter: Meter, stop: StopRequest) -> StepResult:
        """Take a step, a second time if memory runs out and may be retried.

        Args:
            step: of the plan.
            batches: this rank's micro-batches.
            meter: takes the metrics, if the update is applied.
            stop: looked at by the check, so that all ranks see a signal at the same step.

        Raises:
            RunError: a loss or a gradient is not finite, the ranks differ, or memory ran out; the weights are those
                before the update.
        """
        rate = self.learning_rate(step.number)
        try:
            return self._update(step, batches, rate, meter, stop)
        except (RuntimeError, MemoryError) as error:
            self.plan = self.retry.smaller_plan(error, self.plan, step.number)
        # Outside the handler, which kept the memory of the failed attempt alive.
        self.optimizer.zero_grad()
        return self._update(self.plan.step(step.number), None, rate, meter, stop)

    def _update(
        self, step: Step, batches: Sequence[Batch] | None, rate: float, meter: Meter, stop: StopRequest
    ) -> StepResult:
        """Compute a step, and update the weights if its numbers are finite."""
        objective, accelerator, own = self.objective, self.objective.accelerator, Meter(self.reader.device)
        set_learning_rate(self.optimizer, rate)
        memory = objective.backward(step, self.reader, own, batches)
        bound = float("inf") if self.max_grad_norm is None else self.max_grad_norm
        norm = self.clip(bound)
        is_good, signum = self.guard.check(step, own.sum("loss"), norm, stop.signum)
        if is_good:
            self.optimizer.step()
            meter.take(own)
            if not accelerator.optimizer_step_was_skipped:
                objective.keep_memory(memory)
        elif accelerator.scaler is not None:
            accelerator.scaler.update()
        self.optimizer.zero_grad()
        if accelerator.scaler is not None and accelerator.scaler.get_scale() < 1:
            raise RunError(
                f"step {step.number + 1}: the gradient overflows float16 at any scale",
                hint="set model.dtype: bfloat16 or float32",
            )
        if objective.reference is not None:
            objective.reference.follow(step.number + 1)
        return StepResult(float(norm), rate, signum)

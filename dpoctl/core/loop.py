"""The training loop: one page, for every task.

It walks the plan. What a step is, the plan says; what is learned, the objective says; here stands only the order of
things: gradient, check, update, log, evaluate, save, stop.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from dpoctl.core.ahead import Ahead
from dpoctl.core.batch import Batch
from dpoctl.core.guard import Guard
from dpoctl.core.meters import Meter
from dpoctl.core.objective import Objective
from dpoctl.core.optim import set_learning_rate
from dpoctl.core.planner import Plan, Step
from dpoctl.core.reader import Reader
from dpoctl.errors import RunError, StoppedError
from dpoctl.runs.signals import StopRequest

Metrics = dict[str, float]


@dataclass(frozen=True)
class EvalSet:
    """Held-out data: its records, and the plan of one pass over them."""

    reader: Reader
    plan: Plan


@dataclass(frozen=True)
class Cadence:
    """After how many steps things happen; `None` is never. What happens at the end happens anyway.

    Attributes:
        logging: write the means since the last time.
        eval: evaluate every evaluation set.
        save: write a checkpoint, which also closes the logging window.
        eval_on_start: evaluate before the first step.
    """

    logging: int = 10
    eval: int | None = None
    save: int | None = None
    eval_on_start: bool = False


@dataclass(frozen=True)
class Outputs:
    """Where the loop reports to.

    Attributes:
        log: takes a row of metrics and the step it belongs to, on every rank.
        save: begins to write a checkpoint of a step, on every rank.
        settle: waits until the last checkpoint is on the disk, on every rank.
        advance: tells people that a step is done.
        evaluated: called after the evaluation sets at a step, on every rank.
        ended: whether what was logged asks for the end, the same on all ranks.
    """

    log: Callable[[int, Metrics], None]
    save: Callable[[int], None]
    advance: Callable[[int], None]
    evaluated: Callable[[int], None] = lambda step: None
    ended: Callable[[], bool] = lambda: False
    settle: Callable[[], None] = lambda: None


@dataclass
class Run:
    """Everything the loop walks with."""

    accelerator: Accelerator
    objective: Objective
    optimizer: Any
    plan: Plan
    reader: Reader
    learning_rate: Callable[[int], float]
    max_grad_norm: float | None
    outputs: Outputs
    cadence: Cadence
    guard: Guard
    evals: Mapping[str, EvalSet] = field(default_factory=dict)
    start: int = 0
    relieve: Callable[[Exception, Plan, int], Plan] | None = None
    """Returns a plan that takes less memory for a step that failed, or raises the error that it is given."""
    updated: Callable[[int], None] = lambda step: None
    """Called after the update of each step, on every rank."""


def fit(run: Run) -> int:
    """Train from `run.start` to the end of the plan, or to the step after which the outputs ask for the end.

    Returns:
        The number of steps that are done.

    Raises:
        RunError: a loss or a gradient is not finite; the weights are those before the update.
        StoppedError: a signal asked to stop; a checkpoint of the last whole step was written.
    """
    plan, cadence, meter = run.plan, run.cadence, Meter(run.accelerator.device)
    window = _Window()
    if cadence.eval_on_start and run.start == 0:
        _evaluate_all(run, 0)
    with StopRequest() as stop, Ahead(run.reader, run.accelerator.process_index) as ahead:
        for number in range(run.start, plan.num_steps):
            step, batches = ahead.take(run.plan, number)
            rate, done = run.learning_rate(number), number + 1
            with window.measure(step.tokens):
                grad_norm, signum = _attempt(run, ahead, step, batches, rate, meter, stop)
                run.updated(done)
            run.outputs.advance(done)

            saving = _due(cadence.save, done) or done == plan.num_steps
            if _due(cadence.logging, done) or saving or signum:
                means = meter.read(lambda t: _add_up(run.accelerator, t))
                state = {"grad_norm": grad_norm, "learning_rate": rate, "epoch": done / plan.steps_per_epoch}
                state |= {"skipped_steps": run.guard.skipped} if run.guard.skipped else {}
                run.outputs.log(done, means | state | {"tokens_per_second": window.rate()})
            ended = run.outputs.ended()
            if _due(cadence.eval, done) or (run.evals and (ended or done == plan.num_steps)):
                _evaluate_all(run, done)
                ended = ended or run.outputs.ended()
            if saving or signum or ended:
                run.outputs.save(done)
            if signum or ended or done == plan.num_steps:
                run.outputs.settle()
            if signum:
                raise StoppedError(signum, done)
            if ended:
                return done
    return plan.num_steps


def evaluate(objective: Objective, data: EvalSet) -> Metrics:
    """Return the exact means over an evaluation set, whatever the ranks and micro-batches."""
    scorer, meter = objective.scorer, Meter(objective.accelerator.device)
    was_training = scorer.training
    scorer.eval()
    for step in data.plan:
        objective.evaluate(step, data.reader, meter)
    scorer.train(was_training)
    return meter.read(lambda t: _add_up(objective.accelerator, t))


def _attempt(
    run: Run, ahead: Ahead, step: Step, batches: Sequence[Batch], rate: float, meter: Meter, stop: StopRequest
) -> tuple[float, int]:
    """Take one optimizer step, a second time with another plan if `relieve` has one; returns what `_update` does."""
    if run.relieve is None:
        return _update(run, step, batches, rate, meter, stop)
    try:
        return _update(run, step, batches, rate, meter, stop)
    except (RuntimeError, MemoryError) as error:
        plan = run.relieve(error, run.plan, step.number)
    # Behind the handler: what the failed attempt held is free here.
    run.optimizer.zero_grad()
    run.plan = plan
    run.evals = {name: EvalSet(data.reader, plan.one_pass(data.plan.lengths)) for name, data in run.evals.items()}
    return _update(run, *ahead.take(plan, step.number), rate, meter, stop)


def _update(
    run: Run, step: Step, batches: Sequence[Batch], rate: float, meter: Meter, stop: StopRequest
) -> tuple[float, int]:
    """Take one optimizer step, if its numbers are finite.

    Returns:
        The norm of its gradient before clipping, and the signal that any rank has seen.
    """
    set_learning_rate(run.optimizer, rate)
    own = Meter(run.accelerator.device)
    memory = run.objective.backward(step, run.reader, own, batches)
    bound = float("inf") if run.max_grad_norm is None else run.max_grad_norm
    norm = run.accelerator.clip_grad_norm_(run.objective.scorer.parameters(), bound)
    admitted, signum = run.guard.admit(step, own.sum("loss"), norm, stop.signum)
    if admitted:
        run.optimizer.step()
        meter.take(own)
        if not run.accelerator.optimizer_step_was_skipped:
            run.objective.memory = memory
    elif run.accelerator.scaler is not None:
        run.accelerator.scaler.update()
    run.optimizer.zero_grad()
    if run.accelerator.scaler is not None and run.accelerator.scaler.get_scale() < 1:
        raise RunError(
            f"step {step.number + 1}: the gradient overflows float16 at any scale",
            hint="nothing is learned like this; set model.dtype: bfloat16 or float32",
        )
    return float(norm), signum


def _evaluate_all(run: Run, done: int) -> None:
    for name, data in run.evals.items():
        prefix = "eval_" if name == "eval" else f"eval_{name}_"
        metrics = evaluate(run.objective, data)
        run.outputs.log(done, {prefix + key: value for key, value in metrics.items()})
    run.outputs.evaluated(done)


def _due(every: int | None, done: int) -> bool:
    return every is not None and done % every == 0


def _add_up(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    total: Tensor = accelerator.reduce(tensor, reduction="sum")
    return total


@dataclass
class _Window:
    """Tokens and time of the updates since the last log; evaluations and checkpoints do not count."""

    tokens: int = 0
    seconds: float = 0.0

    @contextmanager
    def measure(self, tokens: int) -> Iterator[None]:
        """Count an update of so many tokens."""
        began = time.monotonic()
        yield
        self.seconds += time.monotonic() - began
        self.tokens += tokens

    def rate(self) -> float:
        """Return tokens per second, and start anew."""
        rate = self.tokens / max(self.seconds, 1e-9)
        self.tokens, self.seconds = 0, 0.0
        return rate

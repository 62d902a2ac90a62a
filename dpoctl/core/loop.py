"""The training loop, shared by all tasks.

It walks the plan and fixes the order of events: step, log, evaluate, save, stop. The stepper takes the steps, and an
observer writes what comes of them.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from accelerate import Accelerator

from dpoctl import console
from dpoctl.core.meters import Meter, Total, standard_error
from dpoctl.core.objective import Objective, Watch
from dpoctl.core.planner import Lengths, Plan
from dpoctl.core.reader import Prefetcher, Reader
from dpoctl.core.step import Stepper, StepResult
from dpoctl.errors import StoppedError
from dpoctl.runs.signals import StopRequest

Metrics = dict[str, float]


@dataclass(frozen=True)
class EvalSet:
    """Held-out data.

    Attributes:
        reader: reads its records.
        lengths: of the records.
        at_start: the metrics before the first step, where they are known; else they are computed.
    """

    reader: Reader
    lengths: Lengths
    at_start: Metrics | None = None


@dataclass(frozen=True)
class Cadence:
    """The number of steps between events; `None` is never. Each of them also happens at the end of the run.

    Attributes:
        logging: log the means since the last time.
        eval: evaluate every evaluation set.
        save: write a checkpoint, and log the means.
        eval_on_start: evaluate before the first step.
    """

    logging: int = 10
    eval: int | None = None
    save: int | None = None
    eval_on_start: bool = False


class EvaluationStoppedError(Exception):
    """A signal ended an evaluation."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class Observer(Protocol):
    """The receiver of a training's results. Every rank calls the same methods at the same steps."""

    def advance(self, step: int) -> None:
        """Show that a step is done."""

    def log(self, step: int, metrics: Metrics) -> None:
        """Take the metrics of training or of an evaluation set at a step."""

    def evaluated(self, step: int) -> None:
        """Note that all evaluation sets were logged at a step."""

    def should_stop(self) -> bool:
        """Whether the run shall end after this step, the same on all ranks."""

    def wants_checkpoint(self, step: int) -> bool:
        """Whether a step that was evaluated shall have a checkpoint, the same on all ranks."""

    def save(self, step: int, *, owes_evaluation: bool) -> None:
        """Begin to write the checkpoint of a step, whose evaluation may still have to be made."""

    def wait_saved(self) -> None:
        """Wait until the last checkpoint is on the disk."""


def fit(
    stepper: Stepper,
    observer: Observer,
    cadence: Cadence,
    evals: Mapping[str, EvalSet],
    start: int = 0,
    *,
    owes_evaluation: bool = False,
) -> int:
    """Train to the end of the plan, or until the observer or a signal ends the run.

    Args:
        stepper: takes the steps.
        observer: receives the results.
        cadence: says when to log, evaluate and save.
        evals: the evaluation sets by name.
        start: steps done before, by the run that is resumed.
        owes_evaluation: True if that run was stopped before the evaluation that was due.

    Returns:
        The number of steps that are done.

    Raises:
        RunError: a step failed; the weights are those before its update.
        StoppedError: a signal asked to stop; a checkpoint of the last whole step was written.
    """
    accelerator = stepper.objective.accelerator
    meter = Meter(accelerator.device)
    if cadence.eval_on_start and start == 0:
        _evaluate_all(stepper, observer, evals, 0)
    with StopRequest() as stop, Prefetcher(stepper.reader, accelerator.process_index) as prefetcher:
        if owes_evaluation and (signum := _evaluate_all(stepper, observer, evals, start, stop)):
            raise StoppedError(signum, start)
        if start > 0 and observer.should_stop():
            return start
        for done in range(start + 1, stepper.plan.num_steps + 1):
            step, batches = prefetcher.take(stepper.plan, done - 1)
            began = time.monotonic()
            result = stepper.take(step, batches, meter, stop)
            meter.add({"tokens_per_second": Total(step.tokens, time.monotonic() - began)})
            observer.advance(done)

            last, signum = _conclude(stepper, observer, cadence, evals, meter, result, done, stop)
            if signum or last:
                observer.wait_saved()
            if signum:
                raise StoppedError(signum, done)
            if last:
                return done
    return stepper.plan.num_steps


def _conclude(
    stepper: Stepper,
    observer: Observer,
    cadence: Cadence,
    evals: Mapping[str, EvalSet],
    meter: Meter,
    result: StepResult,
    done: int,
    stop: StopRequest,
) -> tuple[bool, int]:
    """Log, evaluate and save after a step; return whether it is the last one, and the signal that asks to stop."""
    last, signum = done == stepper.plan.num_steps, result.signum
    saving = last or _due(cadence.save, done) or signum
    if is_logged := bool(saving or _due(cadence.logging, done)):
        _log(stepper, observer, meter, done, result)
    last = last or observer.should_stop()
    evaluating = bool(evals) and (_due(cadence.eval, done) or last)
    owes_evaluation = evaluating and bool(signum)
    if evaluating and not signum:
        signum = _evaluate_all(stepper, observer, evals, done, stop)
        owes_evaluation = bool(signum)
        last = last or observer.should_stop()
        if not (signum or last):
            # It may have come while samples were drawn; the next step may take as long again.
            signum = _agreed(stop, stepper.objective.accelerator)
    saving = saving or last or signum or (evaluating and observer.wants_checkpoint(done))
    if saving and not is_logged:
        _log(stepper, observer, meter, done, result)
    if saving:
        observer.save(done, owes_evaluation=owes_evaluation)
    return last, signum


def evaluate(
    objective: Objective, reader: Reader, plan: Plan, stop: StopRequest | None = None, watch: Watch | None = None
) -> Metrics:
    """Return the exact means over an evaluation set, for any number of ranks and micro-batches.

    With them comes `loss_se`, the standard error of the loss, unless the loss couples the records.

    Args:
        objective: computes them.
        reader: reads the set.
        plan: one pass over the set.
        stop: ends the evaluation, on all ranks together.
        watch: gets the scores of the records of this rank.

    Raises:
        EvaluationStoppedError: a rank got a signal.
    """
    scorer, meter = objective.scorer, Meter(objective.accelerator.device)
    was_training = scorer.training
    scorer.eval()
    try:
        with console.WorkProgress("evaluating", len(plan.lengths)) as progress:
            for step in plan:
                if stop is not None and (signum := _agreed(stop, objective.accelerator)):
                    raise EvaluationStoppedError(signum)
                objective.evaluate(step, reader, meter, watch)
                progress.advance(len(step.records))
    finally:
        scorer.train(was_training)
    return standard_error(meter.read(objective.accelerator.reduce), len(plan.lengths))


def _agreed(stop: StopRequest, accelerator: Accelerator) -> int:
    """Return the signal that any rank has received; 0 if none has."""
    if accelerator.num_processes == 1:
        return stop.signum
    return int(accelerator.gather(torch.tensor([stop.signum], device=accelerator.device)).max())


def _log(stepper: Stepper, observer: Observer, meter: Meter, done: int, result: StepResult) -> None:
    """Log the means since the last time."""
    metrics = meter.read(stepper.objective.accelerator.reduce) | {"grad_norm": result.grad_norm}
    metrics |= {"learning_rate": result.learning_rate, "epoch": done / stepper.plan.steps_per_epoch}
    metrics |= {"skipped_steps": stepper.guard.skipped} if stepper.guard.skipped else {}
    observer.log(done, metrics)


def _evaluate_all(
    stepper: Stepper, observer: Observer, evals: Mapping[str, EvalSet], done: int, stop: StopRequest | None = None
) -> int:
    """Evaluate all sets, and log them together; return the signal that broke it off, with nothing logged, or 0."""
    found: list[Metrics] = []
    for name, data in evals.items():
        prefix = "eval_" if name == "eval" else f"eval_{name}_"
        try:
            metrics = data.at_start if done == 0 else None
            if metrics is None:
                metrics = evaluate(stepper.objective, data.reader, stepper.plan.one_pass(data.lengths), stop)
        except EvaluationStoppedError as stopped:
            return stopped.signum
        found.append({prefix + key: value for key, value in metrics.items()})
    # Before samples are drawn, which may take as long again.
    if stop is not None and (signum := _agreed(stop, stepper.objective.accelerator)):
        return signum
    for metrics in found:
        observer.log(done, metrics)
    observer.evaluated(done)
    return 0


def _due(every: int | None, done: int) -> bool:
    return every is not None and done % every == 0

"""The time of a run: its work over a rate, from the table of GPUs, from this CPU, or from a few real steps."""

import time
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from dpoctl.core.guard import Guard
from dpoctl.core.meters import Meter
from dpoctl.core.planner import Lengths, Plan
from dpoctl.core.step import MemoryRetry, Stepper
from dpoctl.data.prepare import PreparedData
from dpoctl.model.load import load_policy
from dpoctl.model.memory import MemoryMeter, keep_freed_memory, set_gradient_checkpointing
from dpoctl.recipe.gpus import Gpu
from dpoctl.recipe.schema import Recipe
from dpoctl.runs.signals import StopRequest
from dpoctl.tasks.estimate import MemoryEstimate, Work, flops_of
from dpoctl.tasks.reference import Reference, with_columns
from dpoctl.tasks.setup import Setup, build_accelerator

# Shares of the rate of matrix products that steps reach: measured were 16 and 20 % on an H100, of the data sheet's
# rate, and 50 to 61 % on a CPU, of its own matrix product.
CUDA_SHARES = (0.08, 0.18, 0.45)
CPU_SHARES = (0.1, 0.45, 0.9)
TRIES = 4
MEASURED_BAND = (0.9, 1.1)
START, ENDS = 15.0, 5.0
"""Seconds in which a run begins, with imports, reading and loading; and of imports, report and the end alone."""
ENOUGH = 20.0
"""Seconds of steps after which a measurement ends: single steps differ, and other programs disturb some of them."""


@dataclass(frozen=True)
class Rate:
    """Operations a second.

    Attributes:
        low: the least to expect.
        usual: the most likely.
        high: the most to expect.
        passes: that of passes without gradients.
        start: seconds before the first step and after the last, besides passes.
        origin: where it comes from, in words.
    """

    low: float
    usual: float
    high: float
    passes: float
    start: float
    origin: str

    def seconds(self, work: Work, ranks: int) -> tuple[float, float, float]:
        """Return the seconds of a run: the least, the most likely, the most."""

        def at(rate: float) -> float:
            return self.start + (work.steps / rate + work.passes / (self.passes * rate / self.usual)) / ranks

        return at(self.high), at(self.usual), at(self.low)

    def tokens_per_second(self, work: Work, ranks: int) -> tuple[float, float, float]:
        """Return the speed of steps: the least, the most likely, the most."""
        per = work.tokens * ranks / max(1.0, work.steps)
        return per * self.low, per * self.usual, per * self.high


def rate_of(gpu: Gpu | None, dtype: torch.dtype) -> Rate:
    """Return the rate of a GPU by the table of GPUs, or that of this CPU by a product of two matrices of a dtype."""
    if gpu is not None:
        low, usual, high = (share * gpu.rate for share in CUDA_SHARES)
        words = f"{CUDA_SHARES[0]:.0%} to {CUDA_SHARES[2]:.0%} of {gpu.rate / 1e12:,.0f} TFLOP/s"
        return Rate(low, usual, high, usual, START, words)
    rate = _cpu_rate(dtype)
    low, usual, high = (share * rate for share in CPU_SHARES)
    return Rate(low, usual, high, usual, START, f"{CPU_SHARES[0]:.0%} to {CPU_SHARES[2]:.0%} of this CPU's "
                f"{rate / 1e9:,.0f} GFLOP/s")  # fmt: skip


@cache
def _cpu_rate(dtype: torch.dtype) -> float:
    """Measure a product of two matrices, the best of some in a second: of bfloat16 it may be many times faster."""
    size, best, started = 768, float("inf"), time.perf_counter()
    left = torch.ones(size, size, dtype=dtype)
    for _ in range(TRIES):
        began = time.perf_counter()
        left @ left
        best = min(best, time.perf_counter() - began)
        if time.perf_counter() - started > 1:
            break
    return 2 * size**3 / best


@dataclass(frozen=True)
class MeasuredSteps:
    """The outcome of a few real steps.

    Attributes:
        rate: operations a second.
        count: number of steps.
        peak: bytes of tensors, or of the process beyond its libraries; None where the system does not tell.
        estimate: by which these steps were planned.
        plan: of the run.
    """

    rate: Rate
    count: int
    peak: int | None
    estimate: MemoryEstimate
    plan: Plan


def measure(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, data: PreparedData, steps: int = 3) -> MeasuredSteps:
    """Take real steps of a run in this process, and return what they took; nothing is written.

    Args:
        recipe: checked and complete.
        tokenizer: of the recipe.
        data: of the recipe.
        steps: the least number of them; more are taken while these take less than `ENOUGH`.
    """
    began = time.perf_counter()
    accelerator = build_accelerator(recipe)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    memory = MemoryMeter(accelerator.device)
    policy = load_policy(recipe, tokenizer, accelerator.device)
    memory.reset_peak()
    setup = Setup.of(recipe, accelerator, tokenizer, policy)
    reader, live = setup.reader(data.train, ""), None
    if setup.task.needs_reference and recipe.dpo.reference.is_live:
        live = Reference(setup).live()
    elif setup.task.needs_reference:
        # A step takes as long with any numbers.
        zeros = np.zeros(int(data.train.response_start[-1]), dtype=np.float32)
        reader = with_columns(reader, {"logps": zeros, "head_logps": zeros})
    traced = time.perf_counter()
    estimate = setup.estimate(data.train)
    # The run finds the trace in the cache.
    began += time.perf_counter() - traced
    plan = setup.plan(Lengths.of(data.train), estimate.budget)
    set_gradient_checkpointing(setup.policy.causal, estimate.every)
    scorer, optimizer, clip = setup.prepare()
    objective = setup.objective(scorer, live)
    guard, retry = Guard(accelerator, "skip"), MemoryRetry(allowed=False)
    stepper = Stepper(
        objective, optimizer, plan, reader, guard, lambda _: 0.0, recipe.training.max_grad_norm, retry, clip
    )
    started = time.perf_counter() - began
    seconds, work = _timed_steps(stepper, estimate, min(steps, plan.num_steps))
    settled = slice(1, None) if len(seconds) > 1 else slice(None)
    rate = sum(work[settled]) / sum(seconds[settled])
    # The first step is slower: memory is new, and kernels are made.
    start = started + max(0.0, seconds[0] - work[0] / rate) + ENDS
    low, high = (share * rate for share in MEASURED_BAND)
    passes = _rate_of_passes(stepper, estimate, len(seconds))
    words = f"measured here in {len(seconds)} {'step' if len(seconds) == 1 else 'steps'}"
    return MeasuredSteps(Rate(low, rate, high, passes, start, words), len(seconds), memory.peak(), estimate, plan)


def _timed_steps(stepper: Stepper, estimate: MemoryEstimate, least: int) -> tuple[list[float], list[float]]:
    """Take steps; return the seconds and the operations of each."""
    plan, reader, stop = stepper.plan, stepper.reader, StopRequest()
    seconds: list[float] = []
    work: list[float] = []
    while len(seconds) < plan.num_steps and (len(seconds) < least or sum(seconds) < ENOUGH):
        step = plan.step(len(seconds))
        began = time.perf_counter()
        stepper.take(step, reader.batches(step.schedule[0]), Meter(reader.device), stop)
        _wait(reader.device)
        seconds.append(time.perf_counter() - began)
        work.append(flops_of(estimate.footprint, plan.lengths, list(step.records), passes=False))
    return seconds, work


def _rate_of_passes(stepper: Stepper, estimate: MemoryEstimate, steps: int) -> float:
    """Return operations a second in passes without gradients over the rows of some steps."""
    plan, reader, work = stepper.plan, stepper.reader, 0.0
    began = time.perf_counter()
    for number in range(steps):
        step = plan.step(number)
        with torch.no_grad():
            for batch in reader.batches(step.schedule[0]):
                stepper.objective.scorer(batch)
        work += flops_of(estimate.footprint, plan.lengths, list(step.records), passes=True)
        _wait(reader.device)
        if time.perf_counter() - began > ENOUGH / 4:
            break
    return work / (time.perf_counter() - began)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

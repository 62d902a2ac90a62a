"""The estimate of a run: memory of a process by part, the token budget that fits, work and time.

The automatic token budget, the choice to divide a model, `dpoctl plan` and the refusal of what cannot fit all read it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dpoctl.core.optim import state_bytes, stored_moments
from dpoctl.core.planner import ATTENTION_COST, Lengths, Plan
from dpoctl.model.memory import activation_bytes_per_token, checkpointing_choices
from dpoctl.tasks.footprint import Footprint, Subject, formula, fullest, measure_footprint

# Larger micro-batches are not faster, they only need more memory. On a CPU this is a number of tokens; on a GPU a
# number of activations of one layer: 16,384 tokens of a model that is 4,096 wide. With 4,096 tokens launching kernels
# took twice as long as an H100 ran them.
CPU_TOKENS = 2048
GPU_ACTIVATIONS = 1 << 26
FRAGMENTATION = {"cuda": 0.05, "cpu": 0.35}
"""What the allocator holds beyond what lives, as a share of what comes and goes; by device.

On a CPU it is the C library's: what a layer frees and what it leaves lie side by side, and larger tensors do not fit
between. So recomputed layers, which free nearly all that they make, leave holes too: `HOLES` of what they make.
"""
HOLES = 0.17
CPU_CONTEXT = 100_000_000
"""Bytes that a process on a CPU holds between steps, besides tensors: data, kernels, what is left of loading.

These three were fitted to whole runs, see docs/planning.md.
"""
SMALL = 30_000_000
"""Parameters of a model for which a trace would take longer than it is worth: on a CPU it fits in any case."""
SEARCHES = 4
"""The most traces at token budgets between the smallest and the largest."""


@dataclass(frozen=True)
class Division:
    """The division of a model over its processes.

    Attributes:
        shards: number of processes that share a model; 1 if each holds all of it.
        offload: its parts lie in host memory.
    """

    shards: int = 1
    offload: bool = False


@dataclass(frozen=True)
class MemoryEstimate:
    """The memory of the fullest process of a run.

    Attributes:
        budget: the most tokens in a micro-batch.
        every: one layer in so many is recomputed; 0 is none.
        parts: bytes by what they are for, at the fullest moment.
        phase: that moment.
        footprint: of the fullest micro-batch.
        capacity: bytes that a process may take.
    """

    budget: int
    every: int
    parts: dict[str, int]
    phase: str
    footprint: Footprint
    capacity: float

    @property
    def peak(self) -> int:
        """Bytes at the fullest moment."""
        return sum(self.parts.values())

    @property
    def live(self) -> int:
        """Bytes of tensors at that moment: without context and fragmentation."""
        return self.peak - self.parts["context"] - self.parts["fragmentation"]

    @property
    def fits(self) -> bool:
        """Whether it fits."""
        return self.peak <= self.capacity


@dataclass(frozen=True)
class Estimator:
    """Estimates a run on a machine.

    Attributes:
        subject: the recipe, its rows and the kind of device.
        capacity: bytes that a process may take, those of its context included.
        division: how the model lies on the processes.
        context: bytes that the process takes besides tensors.
        other: bytes of another model that stays loaded as the reference.
    """

    subject: Subject
    capacity: float
    division: Division = Division()
    context: int = 0
    other: int = 0

    @property
    def is_small(self) -> bool:
        """Whether the model is so small that nothing can fail to fit, and a formula will do."""
        return self.subject.kind == "cpu" and _is_small(self)

    def choose(self) -> MemoryEstimate:
        """Choose the token budget and which layers are recomputed, as a run does; the estimate may not fit.

        With `gradient_checkpointing: auto` no layer is recomputed if two of the longest records fit without it; else
        every n-th layer, with the largest n that makes them fit; else every layer, which costs a third to a half of
        the speed.
        """
        training, lengths = self.subject.recipe.training, self.subject.lengths
        wanted, budget = training.gradient_checkpointing, training.max_tokens_per_device
        longest = int(lengths.tokens.max())
        useful = self.useful_tokens
        choices = checkpointing_choices() if wanted == "auto" else (int(wanted),)
        if budget != "auto":
            tried = [self.at(budget, every) for every in choices]
            return next((one for one in tried if one.fits), tried[-1])
        needed = max(1, min(2 * longest, useful))
        for every in choices:
            if (most := self.at(useful, every)).fits:
                return most
            if (least := self.at(needed, every)).fits:
                return self._largest(least, most)
        least = self.at(longest, choices[-1])
        return self._largest(least, self.at(needed, choices[-1])) if least.fits else least

    @property
    def useful_tokens(self) -> int:
        """The size of a micro-batch above which the device gets no faster."""
        return useful_tokens(int(self.subject.config.hidden_size), self.subject.kind)

    def at(self, budget: int, every: int) -> MemoryEstimate:
        """Return the estimate for a token budget."""
        if self.is_small or self.subject.model is not None:
            found = formula(self.subject, fullest(self.subject.plan(budget))[0], every)
        else:
            found = measure_footprint(self.subject, budget, every)
        parts, phase = self._parts(found, every)
        return MemoryEstimate(budget, every, parts, phase, found, self.capacity)

    def _largest(self, least: MemoryEstimate, most: MemoryEstimate) -> MemoryEstimate:
        """Return the largest budget that fits, between one that does and one that does not: by a line through both."""
        for _ in range(SEARCHES):
            slope = (most.peak - least.peak) / max(1, most.budget - least.budget)
            guess = least.budget + int((self.capacity - least.peak) / slope * 0.99) if slope > 0 else least.budget
            if guess <= least.budget * 1.02 or guess >= most.budget:
                break
            tried = self.at(guess, least.every)
            least, most = (tried, most) if tried.fits else (least, tried)
        return least

    def _parts(self, found: Footprint, every: int) -> tuple[dict[str, int], str]:
        """Return the bytes of each part at the fullest moment, and its name."""
        trace, shards, recipe = found.trace, self.division.shards, self.subject.recipe
        whole = trace.weights + trace.extra
        away = shards > 1 or self.division.offload
        share = 0 if self.division.offload else 1 / shards
        # Weights that are gathered in lower precision need no copies in it.
        casts = 2 * found.trained if away and recipe.lora is None and self.subject.dtype != torch.float32 else 0
        best: dict[str, int] = {}
        moment = ""
        for name, phase in trace.phases.items():
            rest = phase.peak - whole - trace.optimizer - phase.gradients
            if casts and name != "update":
                rest = max(0, rest - casts)
            kept = 0 if name == "update" else min(rest - phase.workspace, trace.kept - casts)
            kept = max(0, kept)
            at_head = "head" in name
            parts = {
                "weights": int(trace.weights * share),
                "gradients": int(phase.gradients * share),
                "optimizer state": int(trace.optimizer * share),
                "reference": int(trace.extra * share) + self.other,
                "gathered layers": self._gathered(found) if away else 0,
                "activations": kept,
                "head": rest - kept - phase.workspace if at_head else 0,
                "attention workspace": phase.workspace,
                "other": 0 if at_head else rest - kept - phase.workspace,
            }
            if sum(parts.values()) > sum(best.values()):
                best, moment = parts, name
        moving = sum(best[name] for name in ("gradients", "activations", "head", "attention workspace", "other"))
        best["fragmentation"] = int(moving * FRAGMENTATION[self.subject.kind])
        if self.subject.kind == "cpu":
            freed = activation_bytes_per_token(self.subject.config, self.subject.dtype, 0) // every if every else 0
            best["fragmentation"] += int(HOLES * found.tokens * freed)
            saving = self._saving(found)
            if sum(saving.values()) > sum(best.values()):
                best, moment = dict.fromkeys(best, 0) | saving, "writing of a checkpoint"
        best["context"] = self.context
        return best, moment

    def _saving(self, found: Footprint) -> dict[str, int]:
        """Return the bytes of each part while a checkpoint is written, from copies in memory."""
        trace, shards, training = found.trace, self.division.shards, self.subject.recipe.training
        copies = found.trained * (state_bytes(training)[0] + stored_moments(training))
        return {
            "weights": trace.weights // shards,
            "optimizer state": trace.optimizer // shards,
            "reference": trace.extra // shards + self.other,
            "checkpoint": copies // shards,
        }

    def _gathered(self, found: Footprint) -> int:
        """Return the bytes of whole weights and gradients that a divided model holds at a time.

        These are two layers, and the embedding and the head.
        """
        config = self.subject.config
        width = self.subject.dtype.itemsize
        ends = int(config.vocab_size) * int(config.hidden_size) * (1 if config.tie_word_embeddings else 2)
        layers = max(0, found.parameters - ends)
        per = found.trace.weights / max(1, found.parameters) if self.subject.recipe.lora is not None else width
        trained = 4 if self.subject.recipe.lora is None else 0
        return int((ends + 2 * layers / self.subject.depth) * (min(per, width) + trained))


def useful_tokens(width: int, kind: str) -> int:
    """Return the size of a micro-batch above which a kind of device gets no faster."""
    return GPU_ACTIVATIONS // width if kind == "cuda" else CPU_TOKENS


def _is_small(estimator: "Estimator") -> bool:
    config = estimator.subject.config
    width, vocabulary = int(config.hidden_size), int(config.vocab_size)
    rough = estimator.subject.depth * 12 * width * width + 2 * vocabulary * width
    return rough < SMALL


@dataclass(frozen=True)
class Work:
    """Floating-point operations of a run, two for a multiplication and an addition.

    Attributes:
        steps: of all steps.
        passes: of passes without gradients: the reference over the training rows, evaluations.
        tokens: of all steps; a shared prompt counts once.
    """

    steps: float
    passes: float
    tokens: int


def work_of(found: Footprint, lengths: Lengths, plan: Plan, *, has_reference: bool, evals: Sequence[Lengths] = (),
            evaluations: int = 0) -> Work:  # fmt: skip
    """Return the work of a run: what one micro-batch takes, scaled by what each part of it grows with.

    Args:
        found: of a micro-batch.
        lengths: of the training rows.
        plan: of the run.
        has_reference: whether a pass before training computes the reference of the rows that are used.
        evals: the lengths of the eval sets.
        evaluations: how often these are evaluated.
    """
    records = plan.records()
    repeats = plan.num_rows / max(1, len(records))
    steps = repeats * flops_of(found, lengths, records, passes=False)
    passes = flops_of(found, lengths, records, passes=True) if has_reference else 0.0
    for one in evals:
        passes += (evaluations + has_reference) * flops_of(found, one, np.arange(len(one)), passes=True)
    return Work(steps, passes, int(lengths.tokens[records].sum() * repeats))


def flops_of(found: Footprint, lengths: Lengths, records: Any, *, passes: bool) -> float:
    """Return the operations that some records take, in steps or in passes without gradients.

    Args:
        found: of a micro-batch.
        lengths: of all records.
        records: their numbers.
        passes: whether no gradient is computed.
    """
    flops, tokens = found.trace.flops, float(lengths.tokens[records].sum())
    scored = float(lengths.items["tokens"][records].sum())
    area = float(((lengths.cost[records] - lengths.tokens[records]) / ATTENTION_COST).sum())
    names = {"layers": "forward" if passes else "layers", "attention": "forward attention" if passes else "attention"}
    return (
        flops.get(names["layers"], 0) * tokens / max(1, found.tokens)
        # A pass without gradients takes one product with the head, a step two or three.
        + flops.get("head", 0) * (0.5 if passes else 1.0) * scored / max(1, found.scored)
        + flops.get(names["attention"], 0) * area / max(1, found.area)
    )

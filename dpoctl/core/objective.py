"""The plan counts, the losses judge, the loop divides.

The counts of a whole optimizer step are known before its first backward, so each micro-batch is scaled once, and
gradients and metrics depend neither on micro-batches nor on the number of ranks.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dpoctl.core.batch import Batch
from dpoctl.core.logps import Responses, per_response
from dpoctl.core.losses import Item, Loss, Memory, Need, Scores, Term
from dpoctl.core.meters import Meter, Total
from dpoctl.core.planner import Step
from dpoctl.core.reader import Reader

LiveReference = Callable[[Batch], Batch]
Counts = Mapping[Item, int]

# What is known of each response, `[R]`: the first a loss reaches the model through, the others it takes as given.
CARRIERS = ("logps", "head_logps")
CONSTANTS = ("ref_logps", "ref_head_logps", "confidence")


@dataclass(frozen=True)
class Judged:
    """What a term of the objective says of some scores.

    Attributes:
        weight: of the term.
        loss: as it was applied.
        values: what it returned.
    """

    weight: float
    loss: Loss
    values: Tensor


Report = Callable[[Scores, Sequence[Judged], Mapping[int, str]], Mapping[str, Total]]
"""Metrics of some scores, of what the terms say of them, and the names of sources that have metrics of their own."""


@dataclass
class Objective:
    """A weighted sum of losses, the module it is taken of, and what is reported.

    Attributes:
        accelerator: knows ranks, precision and how to go backward.
        scorer: the `Scorer`, wrapped.
        terms: the losses; the metric `loss` is a mean over the items of the first.
        report: what is logged beside the loss.
        reference: puts into a batch what a reference that runs beside the policy says of it; `None` when that comes
            with the batch, or none is needed.
        seed: of what losses draw at random.
        memory: what each term carries from step to step, the same on all ranks.
    """

    accelerator: Accelerator
    scorer: nn.Module
    terms: tuple[Term, ...]
    report: Report
    reference: LiveReference | None = None
    seed: int = 0
    memory: tuple[Memory, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Begin without memories."""
        self.memory = tuple({} for _ in self.terms)

    @cached_property
    def needs(self) -> frozenset[Need]:
        """What the terms need of each response besides its log-probability."""
        return frozenset[Need]().union(*(term.loss.needs for term in self.terms))

    def backward(
        self, step: Step, reader: Reader, meter: Meter, batches: Sequence[Batch] | None = None
    ) -> tuple[Memory, ...]:
        """Add the gradient of a step's loss to the parameters, and its metrics to the meter.

        Args:
            step: of the plan.
            reader: of its records.
            meter: takes the metrics.
            batches: this rank's micro-batches, where they were built ahead.

        Returns:
            What `memory` must be once the step is applied.
        """
        batches = self._batches(step, reader) if batches is None else batches
        if _couples(self.terms):
            return self._backward_coupled(step, reader, batches, meter)
        for index, batch in enumerate(batches):
            self._backward_through(batch, step, reader, meter, sync=index == len(batches) - 1)
        return self.memory

    @torch.no_grad()
    def evaluate(self, step: Step, reader: Reader, meter: Meter) -> None:
        """Add the metrics of a step of evaluation data to the meter."""
        terms = tuple(replace(term, loss=term.loss.at_eval()) for term in self.terms)
        local = [(batch, self.score(batch)) for batch in self._batches(step, reader)]
        if _couples(terms):
            whole = self._gather(step, reader, [scores for _, scores in local])
            self._note(meter, whole, judge(terms, whole), step, reader, counts=self.accelerator.is_main_process)
            return
        for batch, scores in local:
            self._note(meter, scores, judge(terms, scores), step, reader, counts=not batch.is_filler)

    def score(self, batch: Batch) -> Scores:
        """Run a batch: what policy and reference say of its responses."""
        if self.reference is not None:
            batch = self.reference(batch)
        said = self._responses(batch)
        return Scores(
            logps=said.logps,
            num_tokens=batch.num_tokens,
            pairs=batch.pairs,
            ref_logps=batch.ref_logps,
            starts=batch.starts,
            labels=batch.labels,
            targets=batch.targets,
            sources=batch.sources,
            token_logps=said.token_logps,
            head_logps=said.head_logps,
            ref_head_logps=batch.ref_head_logps,
            confidence=said.confidence,
        )

    @torch.no_grad()
    def first_loss(self, scores: Scores) -> float:
        """Return the loss of some scores, taken for the whole of a first step."""
        settled = [replace(term, loss=term.loss.settle(scores, {}, step=0, seed=self.seed)[0]) for term in self.terms]
        counts = {term.loss.item: int(count_items(scores, term.loss.item)) for term in settled}
        return float(total(judge(settled, scores), counts))

    def _backward_through(self, batch: Batch, step: Step, reader: Reader, meter: Meter, *, sync: bool) -> None:
        """Take the gradient of a micro-batch; nothing of its graph is left for the next one to lie beside."""
        with self._synchronised(sync):
            scores = self.score(batch)
            judged = judge(self.terms, scores)
            self._pull(scores.logps.sum() * 0.0 if batch.is_filler else total(judged, step.counts))
        self._note(meter, scores, judged, step, reader, counts=not batch.is_filler)

    def _backward_coupled(
        self, step: Step, reader: Reader, batches: Sequence[Batch], meter: Meter
    ) -> tuple[Memory, ...]:
        """Take the gradient of losses that see the whole step at once, without holding the step's graph.

        They reach the model only through c = dL / dlogps. With several micro-batches a first forward without
        gradients fills the vector of log-probabilities, the losses give c on it, and a second forward, its random
        numbers replayed, backpropagates sum(c * logps). With one micro-batch the first forward keeps its graph.
        """
        once = len(batches) == 1
        if once:
            local = [self.score(batches[0])]
        else:
            devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
            with torch.random.fork_rng(devices=devices), torch.no_grad():
                local = [self.score(batch) for batch in batches]
        whole = self._gather(step, reader, local)
        terms, memory = self._settle(whole, step)
        carriers = [name for name in CARRIERS if getattr(whole, name) is not None]
        judged, coefficients = _coefficients(terms, whole, step.counts, carriers)
        mine = torch.from_numpy(_slots(step, reader)[self.accelerator.process_index])
        own, used = coefficients[:, mine.to(coefficients.device)], 0
        for index, batch in enumerate(batches):
            with self._synchronised(index == len(batches) - 1):
                said = local[0] if once else self._responses(batch)
                columns = torch.stack([getattr(said, name) for name in carriers])
                share = 0 if batch.is_filler else len(batch.num_tokens)
                self._pull((columns * own[:, used : used + share]).sum() if share else columns.sum() * 0.0)
                used += share
                # As above: the graph is gone before the next one grows.
                del said, columns
        self._note(meter, whole, judged, step, reader, counts=self.accelerator.is_main_process)
        return memory

    def _settle(self, whole: Scores, step: Step) -> tuple[list[Term], tuple[Memory, ...]]:
        """Let each term fix what depends on the whole step."""
        settled = [
            term.loss.settle(whole, memory, step=step.number, seed=self.seed)
            for term, memory in zip(self.terms, self.memory, strict=True)
        ]
        terms = [replace(term, loss=loss) for term, (loss, _) in zip(self.terms, settled, strict=True)]
        return terms, tuple(memory for _, memory in settled)

    def _gather(self, step: Step, reader: Reader, local: Sequence[Scores]) -> Scores:
        """Put the scores of all ranks together, in the order of the plan, cut off from their graphs."""
        slots, outline = _slots(step, reader), reader.outline(step.records)
        names = [name for name in (*CARRIERS, *CONSTANTS) if getattr(local[0], name) is not None]
        # Fillers stand last and own no slot. Ranks differ in their number of responses, hence the padding.
        mine = len(slots[self.accelerator.process_index])
        sent = local[0].logps.new_zeros(len(names), max(len(at) for at in slots))
        for row, name in zip(sent, names, strict=True):
            row[:mine] = torch.cat([getattr(scores, name).detach() for scores in local])[:mine]
        received = self.accelerator.gather(sent[None])
        whole = sent.new_empty(len(names), len(outline["num_tokens"]))
        for rank, at in enumerate(slots):
            whole[:, torch.from_numpy(at).to(whole.device)] = received[rank, :, : len(at)]
        return Scores(**dict(zip(names, (row.clone() for row in whole), strict=True)), **outline)

    def _note(
        self, meter: Meter, scores: Scores, judged: Sequence[Judged], step: Step, reader: Reader, *, counts: bool
    ) -> None:
        """Add metrics to the meter: where they must not count their names alone, which are the same on every rank."""
        with torch.no_grad():
            totals = {"loss": _mean(scores, judged, step.counts), **self.report(scores, judged, reader.names)}
        meter.add(totals if counts else {name: Total(0.0, 0) for name in totals})

    def _batches(self, step: Step, reader: Reader) -> list[Batch]:
        """This rank's micro-batches."""
        return reader.batches(step.schedule[self.accelerator.process_index])

    def _responses(self, batch: Batch) -> Responses:
        return per_response(batch, self.scorer(batch), self.needs)

    def _pull(self, loss: Tensor) -> None:
        """Go backward from this rank's share of the loss; DDP averages over ranks, and shares add up."""
        self.accelerator.backward(loss * self.accelerator.num_processes)

    def _synchronised(self, sync: bool) -> nullcontext[None]:
        """Exchange gradients in the last micro-batch only."""
        return nullcontext() if sync else self.accelerator.no_sync(self.scorer)


def judge(terms: Sequence[Term], scores: Scores) -> list[Judged]:
    """Show scores to each term."""
    return [Judged(term.weight, term.loss, term.loss(scores)) for term in terms]


def total(judged: Sequence[Judged], counts: Counts) -> Tensor:
    """Return the share that some scores have in a step's loss, given the step's counts."""
    # A step may hold nothing that a term judges: no values add up to zero.
    shares = [j.values.sum() * (j.weight / max(1, counts[j.loss.item])) for j in judged]
    return torch.stack(shares).sum()


def count_items(scores: Scores, item: Item) -> Tensor | int:
    """Return how many items some scores hold."""
    if item == "pairs":
        return len(scores.pairs)
    if item == "responses":
        return len(scores.num_tokens)
    if item == "tokens":
        return scores.num_tokens.sum()
    assert scores.targets is not None
    if item == "records":
        return len(scores.targets)
    return (scores.num_tokens[scores.targets.clamp(0)] * (scores.targets >= 0)).sum()


def _mean(scores: Scores, judged: Sequence[Judged], counts: Counts) -> Total:
    """The loss as a total over the items of the first term, so that steps weigh as many as they have of these."""
    item = judged[0].loss.item
    # Dividing and multiplying by the same count would round.
    shares = [j.values.sum() * (j.weight * (counts[item] / max(1, counts[j.loss.item]))) for j in judged]
    return Total(torch.stack(shares).sum(), count_items(scores, item))


def _coefficients(
    terms: Sequence[Term], whole: Scores, counts: Counts, carriers: Sequence[str]
) -> tuple[list[Judged], Tensor]:
    """What the terms say of the whole step, and the derivatives of their sum, `[carriers, R]`."""
    leaves = [getattr(whole, name).requires_grad_() for name in carriers]
    judged = judge(terms, whole)
    gradients = torch.autograd.grad(total(judged, counts), leaves, materialize_grads=True)
    return judged, torch.stack(gradients)


def _couples(terms: Sequence[Term]) -> bool:
    return any(term.loss.couples_batch for term in terms)


def _slots(step: Step, reader: Reader) -> list[np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """For each rank, where its responses stand among the responses of the step."""
    rows = reader.rows(step.records)
    starts = dict(zip(step.records, np.cumsum(rows) - rows, strict=True))
    sizes = dict(zip(step.records, rows, strict=True))
    empty = np.zeros(0, dtype=np.int64)
    return [
        np.concatenate([empty, *(starts[r] + np.arange(sizes[r]) for records in schedule for r in records)])
        for schedule in step.schedule
    ]

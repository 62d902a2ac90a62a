"""The objective of a training: a weighted sum of losses, its gradient over a whole optimizer step, and its metrics.

The counts of a step are known from the plan before its first backward, so each micro-batch is scaled once, and
gradients and metrics depend neither on micro-batches nor on the number of ranks.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol, cast

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn

from dpoctl.core.batch import Batch
from dpoctl.core.logps import Scorer, per_response
from dpoctl.core.meters import Meter, Total, loss_moments
from dpoctl.core.planner import Step
from dpoctl.core.reader import Reader
from dpoctl.losses import Item, Loss, Memory, Need, Scores, Term
from dpoctl.model.memory import to_device

Counts = Mapping[Item, int]

# Columns of `Scores`, `[R]`, that losses differentiate, and those that they take as constants.
DIFFERENTIATED = ("logps", "head_logps")
CONSTANT = ("ref_logps", "ref_head_logps", "confidence")


@dataclass(frozen=True)
class TermValues:
    """A term of the objective, and the values of its loss for some scores.

    Attributes:
        weight: the term's weight.
        loss: the loss as it was applied.
        values: the values that it returned.
    """

    weight: float
    loss: Loss
    values: Tensor


Report = Callable[[Scores, Sequence[TermValues], Mapping[int, str]], Mapping[str, Total]]
"""Metrics of some scores, given the values of each term and the names of sources that have metrics of their own."""

Watch = Callable[[Sequence[int], Scores], None]
"""A receiver of the scores of some records, given their numbers."""


class RunningReference(Protocol):
    """A reference that runs beside the policy."""

    def __call__(self, batch: Batch) -> Batch:
        """Return a batch with the reference's log-probabilities."""

    def follow(self, step: int) -> None:
        """Move towards the policy if it is time to; called after each step with the number of steps done."""

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint must hold."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the tensors of a checkpoint."""


@dataclass
class Objective:
    """A weighted sum of losses, and the module that it is differentiated through.

    Attributes:
        accelerator: knows ranks and precision, and runs backward.
        scorer: the `Scorer`, wrapped.
        terms: the losses; the metric `loss` is a mean over the items of the first.
        report: the metrics beside the loss.
        reference: runs beside the policy; `None` if its log-probabilities come with the batches, or none are needed.
        seed: of the losses' random draws.
        balance_coef: the factor of the load-balancing loss of experts, a mean over the rows of a step; None leaves it
            out.
        memory: the state that each term carries from step to step, the same on all ranks.
    """

    accelerator: Accelerator
    scorer: nn.Module
    terms: tuple[Term, ...]
    report: Report
    reference: RunningReference | None = None
    seed: int = 0
    balance_coef: float | None = None
    memory: tuple[Memory, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Begin with empty memories."""
        self.memory = tuple({} for _ in self.terms)

    @cached_property
    def needs(self) -> frozenset[Need]:
        """The optional inputs that the terms need."""
        return frozenset[Need]().union(*(term.loss.needs for term in self.terms))

    def backward(
        self, step: Step, reader: Reader, meter: Meter, batches: Sequence[Batch] | None = None
    ) -> tuple[Memory, ...]:
        """Add the gradient of a step's loss to the parameters, and its metrics to the meter.

        Args:
            step: a step of the plan.
            reader: reads its records.
            meter: takes the metrics.
            batches: this rank's micro-batches, if they were prefetched.

        Returns:
            The memory to keep if the update is applied.
        """
        batches = self._batches(step, reader) if batches is None else batches
        if _couples(self.terms):
            return self._backward_coupled(step, reader, batches, meter)
        for index, batch in enumerate(batches):
            self._backward_micro_batch(batch, step, reader, meter, sync=index == len(batches) - 1)
        return self.memory

    def keep_memory(self, memory: tuple[Memory, ...]) -> None:
        """Keep the memory that `backward` returned, as its step was applied."""
        self.memory = memory

    @torch.no_grad()
    def evaluate(self, step: Step, reader: Reader, meter: Meter, watch: Watch | None = None) -> None:
        """Add the metrics of a step of evaluation data to the meter.

        Args:
            step: of one pass over the data.
            reader: reads its records.
            meter: takes the metrics.
            watch: gets the scores of the records of this rank.
        """
        terms = tuple(replace(term, loss=term.loss.at_eval()) for term in self.terms)
        local = [(batch, self.score(batch)) for batch in self._batches(step, reader)]
        if watch is not None:
            for records, (_, scores) in zip(step.schedule[self.accelerator.process_index], local, strict=True):
                if records:
                    watch(records, scores)
        if _couples(terms):
            whole = self._gather(step, reader, [scores for _, scores in local])
            self._record_metrics(meter, whole, evaluate_terms(terms, whole), step, reader, counts=self._is_main)
            return
        for batch, scores in local:
            values = evaluate_terms(terms, scores)
            self._record_metrics(meter, scores, values, step, reader, counts=not batch.is_filler)
            moments = _moments(scores, values)
            meter.add({name: Total(0.0, 0) for name in moments} if batch.is_filler else moments)

    @torch.no_grad()
    def evaluate_at_reference(self, step: Step, reader: Reader, meter: Meter) -> None:
        """Add the metrics of a step of evaluation data for a policy that equals its reference, without the model.

        Log-probabilities are those of the reference that the reader has; if it has none, they are taken as zero.
        """
        terms = tuple(replace(term, loss=term.loss.at_eval()) for term in self.terms)
        scores = _at_reference(step, reader)
        values = evaluate_terms(terms, scores)
        self._record_metrics(meter, scores, values, step, reader, counts=True)
        if not _couples(terms):
            meter.add(_moments(scores, values))

    def score(self, batch: Batch) -> Scores:
        """Score a batch under the policy, and under a live reference if there is one."""
        return self._score_policy(batch if self.reference is None else self.reference(batch))

    @torch.no_grad()
    def first_loss(self, scores: Scores) -> float:
        """Return the loss of some scores as if they were the whole first step."""
        terms = [replace(term, loss=term.loss.for_step(scores, {}, step=0, seed=self.seed)[0]) for term in self.terms]
        counts = {term.loss.item: int(scores.outline.count(term.loss.item)) for term in terms}
        return float(weighted_sum(evaluate_terms(terms, scores), counts))

    def _backward_micro_batch(self, batch: Batch, step: Step, reader: Reader, meter: Meter, *, sync: bool) -> None:
        """Take the gradient of a micro-batch; its graph is freed before the next micro-batch runs."""
        with self._synchronised(sync):
            scores = self.score(batch)
            values = evaluate_terms(self.terms, scores)
            share = scores.logps.sum() * 0.0 if batch.is_filler else weighted_sum(values, step.counts)
            if self.balance_coef is not None:
                share = share + self._balance_share(batch, step, meter, self.balance_coef)
            self._backward_share(share)
        self._record_metrics(meter, scores, values, step, reader, counts=not batch.is_filler)

    def _balance_share(self, batch: Batch, step: Step, meter: Meter, coefficient: float) -> Tensor:
        """Return the share of the load-balancing loss that the last forward has in a step, and record its metric."""
        scorer = cast(Scorer, self.accelerator.unwrap_model(self.scorer))
        balance, scorer.balance = scorer.balance, None
        assert balance is not None
        rows = 0 if batch.is_filler else len(batch.outline.targets)
        balance = balance * 0.0 if batch.is_filler else balance
        meter.add({"aux_loss": Total(balance.detach(), rows)})
        return balance * (coefficient / max(1, step.counts["records"]))

    def _backward_coupled(
        self, step: Step, reader: Reader, batches: Sequence[Batch], meter: Meter
    ) -> tuple[Memory, ...]:
        """Take the gradient of losses that couple the whole step, without holding the step's graph.

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
        terms, memory = self._terms_for_step(whole, step)
        names = [name for name in DIFFERENTIATED if getattr(whole, name) is not None]
        values, coefficients = _coefficients(terms, whole, step.counts, names)
        mine = torch.from_numpy(_slots(step, reader)[self.accelerator.process_index])
        own, used = coefficients[:, to_device(mine, coefficients.device)], 0
        for index, batch in enumerate(batches):
            with self._synchronised(index == len(batches) - 1):
                scores = local[0] if once else self._score_policy(batch)
                columns = torch.stack([getattr(scores, name) for name in names])
                size = 0 if batch.is_filler else len(batch.outline.num_tokens)
                self._backward_share((columns * own[:, used : used + size]).sum() if size else columns.sum() * 0.0)
                used += size
                # The graph must be gone before the next one grows.
                del scores, columns
        self._record_metrics(meter, whole, values, step, reader, counts=self._is_main)
        return memory

    def _terms_for_step(self, whole: Scores, step: Step) -> tuple[list[Term], tuple[Memory, ...]]:
        """Fill the statistics of a step into each term."""
        pairs = [
            term.loss.for_step(whole, memory, step=step.number, seed=self.seed)
            for term, memory in zip(self.terms, self.memory, strict=True)
        ]
        terms = [replace(term, loss=loss) for term, (loss, _) in zip(self.terms, pairs, strict=True)]
        return terms, tuple(memory for _, memory in pairs)

    def _gather(self, step: Step, reader: Reader, local: Sequence[Scores]) -> Scores:
        """Join the scores of all ranks in the order of the plan, detached from their graphs."""
        slots, outline = _slots(step, reader), reader.outline(step.records)
        names = [name for name in (*DIFFERENTIATED, *CONSTANT) if getattr(local[0], name) is not None]
        # Fillers come last and own no slot. Ranks differ in their number of responses, hence the padding.
        mine = len(slots[self.accelerator.process_index])
        sent = local[0].logps.new_zeros(len(names), max(len(at) for at in slots))
        for row, name in zip(sent, names, strict=True):
            row[:mine] = torch.cat([getattr(scores, name).detach() for scores in local])[:mine]
        received = self.accelerator.gather(sent[None])
        whole = sent.new_empty(len(names), len(outline.num_tokens))
        for rank, at in enumerate(slots):
            whole[:, to_device(torch.from_numpy(at), whole.device)] = received[rank, :, : len(at)]
        columns = dict(zip(names, (row.clone() for row in whole), strict=True))
        return Scores(outline=outline, **columns)

    def _record_metrics(
        self, meter: Meter, scores: Scores, values: Sequence[TermValues], step: Step, reader: Reader, *, counts: bool
    ) -> None:
        """Add metrics to the meter, or only their names if they do not count: all ranks must have the same names."""
        with torch.no_grad():
            totals = {"loss": _mean_loss(scores, values, step.counts), **self.report(scores, values, reader.names)}
        meter.add(totals if counts else {name: Total(0.0, 0) for name in totals})

    @property
    def _is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    def _batches(self, step: Step, reader: Reader) -> list[Batch]:
        """This rank's micro-batches."""
        return reader.batches(step.schedule[self.accelerator.process_index])

    def _score_policy(self, batch: Batch) -> Scores:
        return per_response(batch, self.scorer(batch), self.needs)

    def _backward_share(self, share: Tensor) -> None:
        """Backpropagate this rank's share of the loss; DDP averages over ranks, and the shares must add up."""
        self.accelerator.backward(share * self.accelerator.num_processes)

    def _synchronised(self, sync: bool) -> nullcontext[None]:
        """Exchange gradients in the last micro-batch only."""
        return nullcontext() if sync else self.accelerator.no_sync(self.scorer)


def _at_reference(step: Step, reader: Reader) -> Scores:
    """Return the scores of a policy that equals its reference."""
    outline, responses = reader.outline(step.records), reader.responses(step.records)
    zeros = torch.zeros(len(responses), device=reader.device)
    logps, head_logps = (
        zeros if column is None else to_device(torch.from_numpy(column[responses]), reader.device)
        for column in (reader.ref_logps, reader.ref_head_logps)
    )
    return Scores(logps, outline, ref_logps=logps, head_logps=head_logps, ref_head_logps=head_logps)


def evaluate_terms(terms: Sequence[Term], scores: Scores) -> list[TermValues]:
    """Call the loss of each term."""
    return [TermValues(term.weight, term.loss, term.loss(scores)) for term in terms]


def weighted_sum(values: Sequence[TermValues], counts: Counts) -> Tensor:
    """Return the share that some values have in a step's loss, given the step's counts."""
    # A step may hold no item of a term: the sum of no values is zero.
    shares = [term.values.sum() * (term.weight / max(1, counts[term.loss.item])) for term in values]
    return torch.stack(shares).sum()


def _mean_loss(scores: Scores, values: Sequence[TermValues], counts: Counts) -> Total:
    """The loss as a mean over the items of the first term, so that a step weighs by its number of these."""
    item = values[0].loss.item
    # Dividing and multiplying by the same count would round.
    shares = [term.values.sum() * (term.weight * (counts[item] / max(1, counts[term.loss.item]))) for term in values]
    return Total(torch.stack(shares).sum(), scores.outline.count(item))


def _moments(scores: Scores, values: Sequence[TermValues]) -> dict[str, Total]:
    """The moments of the loss by record."""
    size = len(scores.outline.targets)
    records, zeros = torch.arange(size, device=scores.logps.device), scores.logps.new_zeros(size, dtype=torch.float64)
    terms = []
    for term in values:
        at, counts = _items(term.loss.item, scores, records)
        sums = zeros.index_add(0, at, term.weight * term.values.double())
        terms.append((sums, zeros.index_add(0, at, counts.double())))
    return loss_moments(terms)


def _items(item: Item, scores: Scores, records: Tensor) -> tuple[Tensor, Tensor]:
    """The record of each value of a loss, and its contribution to the count of the item."""
    outline, own = scores.outline, scores.outline.records
    if item == "target_tokens":
        return own[outline.imitated], outline.num_tokens[outline.imitated]
    at = {
        "pairs": lambda: own[outline.pairs[:, 0]],
        "responses": lambda: own,
        "records": lambda: records,
        "tokens": lambda: own.repeat_interleave(outline.num_tokens),
    }[item]()
    return at, torch.ones_like(at)


def _coefficients(
    terms: Sequence[Term], whole: Scores, counts: Counts, names: Sequence[str]
) -> tuple[list[TermValues], Tensor]:
    """The terms' values for a whole step, and the derivatives of the loss by the named columns, `[names, R]`."""
    leaves = [getattr(whole, name).requires_grad_() for name in names]
    values = evaluate_terms(terms, whole)
    gradients = torch.autograd.grad(weighted_sum(values, counts), leaves, materialize_grads=True)
    return values, torch.stack(gradients)


def _couples(terms: Sequence[Term]) -> bool:
    return any(term.loss.couples_batch for term in terms)


def _slots(step: Step, reader: Reader) -> list[NDArray[np.int64]]:
    """For each rank, the places of its responses among those of the step."""
    sizes = reader.num_responses(step.records)
    starts = np.cumsum(sizes) - sizes
    places = {
        record: np.arange(start, start + size) for record, start, size in zip(step.records, starts, sizes, strict=True)
    }
    empty = np.zeros(0, dtype=np.int64)
    return [
        np.concatenate([empty, *(places[r] for records in schedule for r in records)]) for schedule in step.schedule
    ]

"""The plan counts, the loss judges each item, the loop divides.

The counts of a whole optimizer step are known before its first backward, so each micro-batch is scaled once, and
gradients and metrics depend neither on micro-batches nor on the number of ranks.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dpoctl.core.batch import Batch
from dpoctl.core.losses import Loss, Scores
from dpoctl.core.meters import Meter, Total
from dpoctl.core.planner import Step
from dpoctl.core.reader import Reader

Report = Callable[[Scores, Tensor], Mapping[str, Total]]
LiveReference = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Objective:
    """A loss, the module it is taken of, and what is reported.

    Attributes:
        accelerator: knows ranks, precision and how to go backward.
        scorer: the `Scorer`, wrapped.
        loss: judges items.
        report: metrics of some scores and their loss values, as totals.
        reference: log-probabilities `[R]` under a reference that runs beside the policy; `None` when they come with
            the batch, or none are needed.
    """

    accelerator: Accelerator
    scorer: nn.Module
    loss: Loss
    report: Report
    reference: LiveReference | None = None

    def backward(self, step: Step, reader: Reader, meter: Meter) -> None:
        """Add the gradient of a step's mean loss to the parameters, and its metrics to the meter."""
        batches = [reader.batch(records) for records in step.schedule[self.accelerator.process_index]]
        if self.loss.couples_batch:
            return self._backward_coupled(step, reader, batches, meter)
        # DDP averages gradients over ranks; the counts are already those of all ranks.
        scale = self.accelerator.num_processes / step.counts[self.loss.item]
        for index, batch in enumerate(batches):
            with self._synchronised(index == len(batches) - 1):
                scores = self.score(batch)
                values = self.loss(scores)
                self.accelerator.backward(values.sum() * (0.0 if batch.is_filler else scale))
            meter.add(_counted(self.report(scores, values), not batch.is_filler))
        return None

    @torch.no_grad()
    def evaluate(self, step: Step, reader: Reader, meter: Meter) -> None:
        """Add the metrics of a step of evaluation data to the meter."""
        batches = [reader.batch(records) for records in step.schedule[self.accelerator.process_index]]
        if self.loss.couples_batch:
            whole = self._gather(step, reader, [self.score(batch) for batch in batches])
            return meter.add(_counted(self.report(whole, self.loss(whole)), self.accelerator.is_main_process))
        for batch in batches:
            scores = self.score(batch)
            meter.add(_counted(self.report(scores, self.loss(scores)), not batch.is_filler))
        return None

    def score(self, batch: Batch) -> Scores:
        """Run a batch: log-probabilities of its responses under the policy, and under the reference if needed."""
        ref_logps = batch.ref_logps
        if self.reference is not None:
            with torch.no_grad():
                ref_logps = self.reference(batch)
        token_logps = self.scorer(batch)
        return Scores(
            logps=batch.sum_per_response(token_logps),
            num_tokens=batch.num_tokens,
            pairs=batch.pairs,
            ref_logps=ref_logps,
            token_logps=token_logps[batch.token_index],
        )

    def _backward_coupled(self, step: Step, reader: Reader, batches: Sequence[Batch], meter: Meter) -> None:
        """Take the gradient of a loss that sees the whole step at once, without holding the step's graph.

        The loss reaches the model only through c = dL / dlogps. With several micro-batches a first forward without
        gradients fills the vector of log-probabilities, the loss gives c on it, and a second forward, its random
        numbers replayed, backpropagates sum(c * logps). With one micro-batch the first forward keeps its graph.
        """
        if len(batches) == 1:
            local = [self.score(batches[0])]
        else:
            devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
            with torch.random.fork_rng(devices=devices), torch.no_grad():
                local = [self.score(batch) for batch in batches]
        whole = self._gather(step, reader, local)
        whole.logps.requires_grad_()
        values = self.loss(whole)
        (coefficients,) = torch.autograd.grad(values.sum() / step.counts[self.loss.item], whole.logps)
        own = coefficients[torch.from_numpy(_slots(step, reader)[self.accelerator.process_index]).to(values.device)]
        used = 0
        for index, batch in enumerate(batches):
            with self._synchronised(index == len(batches) - 1):
                scores = local[0] if len(batches) == 1 else self.score(batch)
                share = 0 if batch.is_filler else len(batch.num_tokens)
                weighted = scores.logps[:share] @ own[used : used + share] if share else scores.logps.sum() * 0.0
                self.accelerator.backward(weighted * self.accelerator.num_processes)
                used += share
        meter.add(_counted(self.report(whole, values.detach()), self.accelerator.is_main_process))

    def _gather(self, step: Step, reader: Reader, local: Sequence[Scores]) -> Scores:
        """Put the scores of all ranks together, in the order of the plan, cut off from their graphs."""
        slots = _slots(step, reader)
        num_tokens, pairs = reader.outline(step.records)
        fields = [torch.cat([s.logps.detach() for s in local])]
        if local[0].ref_logps is not None:
            fields.append(torch.cat([s.ref_logps for s in local if s.ref_logps is not None]))
        # Fillers stand last and own no slot. Ranks differ in their number of responses, hence the padding.
        width = max(len(s) for s in slots)
        sent = fields[0].new_zeros(len(fields), width)
        mine = len(slots[self.accelerator.process_index])
        sent[:, :mine] = torch.stack(fields)[:, :mine]
        received = self.accelerator.gather(sent[None])
        whole = sent.new_empty(len(fields), len(num_tokens))
        for rank, at in enumerate(slots):
            whole[:, torch.from_numpy(at).to(whole.device)] = received[rank, :, : len(at)]
        return Scores(
            logps=whole[0].clone(),
            num_tokens=torch.from_numpy(num_tokens).to(whole.device),
            pairs=torch.from_numpy(pairs).to(whole.device),
            ref_logps=whole[1] if len(fields) > 1 else None,
        )

    def _synchronised(self, sync: bool) -> nullcontext[None]:
        """Exchange gradients in the last micro-batch only."""
        return nullcontext() if sync else self.accelerator.no_sync(self.scorer)


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


def _counted(totals: Mapping[str, Total], counts: bool) -> Mapping[str, Total]:
    """Turn totals into nothing where they must not count, keeping their names on every rank."""
    return totals if counts else {name: Total(0.0, 0) for name in totals}

"""The Scorer: the one module that is ever wrapped, and the one road from a batch to log-probabilities.

DDP, FSDP, DeepSpeed and autocast wrap it and nothing else is called: a backbone called past its wrapper would give
unsynchronised gradients without an error.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpoctl.core.batch import Batch
from dpoctl.model.attention import SHARED_PREFIX
from dpoctl.model.head import Head
from dpoctl.model.layouts import FLAT, placement
from dpoctl.model.probe import Verdict, accepts, backbone


class Scorer(nn.Module):
    """Backbone and head of a causal model, run as the probe's verdict says.

    Args:
        model: the module that owns all parameters: the causal model, or PEFT's wrapper around it.
        causal: the causal model inside it.
        verdict: the layout and the head to use.
        confidence: score each token's confidence besides, as `dpoctl.model.head.score_targets` does.
    """

    def __init__(
        self, model: nn.Module, causal: PreTrainedModel, verdict: Verdict, *, confidence: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self.verdict = verdict
        # Not registered a second time: `model` owns every parameter.
        self._causal = (causal,)
        self._head = Head(causal, confidence=confidence)
        self._takes_positions = accepts(backbone(causal), "position_ids")
        if verdict.layout in FLAT:
            causal.set_attn_implementation(SHARED_PREFIX)

    @property
    def causal(self) -> PreTrainedModel:
        """The causal model."""
        return self._causal[0]

    def forward(self, batch: Batch) -> Tensor:
        """Return `[N]` float32 log-probabilities of the predicted tokens, in nats, or `[N, 2]` with confidences."""
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
        if self._takes_positions:
            inputs["position_ids"] = batch.position_ids
        device, dtype = batch.input_ids.device, self.causal.dtype
        inputs |= placement(self.verdict.layout, batch.segments, batch.attention_mask, device, dtype)
        if not self.verdict.own_head:
            return self._model_logps(batch, inputs)
        hidden = backbone(self.causal)(**inputs).last_hidden_state
        return self._head.logps(hidden.flatten(0, 1)[batch.score_pos], batch.score_tgt)

    def _model_logps(self, batch: Batch, inputs: dict[str, Any]) -> Tensor:
        """Through the model's own logits, of the columns that any row needs, for heads that are not a plain one."""
        width = batch.input_ids.shape[1]
        rows, columns = batch.score_pos // width, batch.score_pos % width
        kept, at = columns.unique(return_inverse=True)
        if accepts(self.causal, "logits_to_keep"):
            inputs["logits_to_keep"] = kept
        logits = cast(Tensor, self.causal(**inputs).logits)
        if logits.shape[1] == width:
            at = columns
        return self._head.select(logits[rows, at], batch.score_tgt)


@dataclass(frozen=True)
class Responses:
    """What a model says of each response of a batch.

    Attributes:
        logps: `[R]`, sum over its scored tokens.
        token_logps: `[N']`, one for every scored token of every response.
        head_logps: `[R]`, sum over the first m of them, m the number that the shortest response of the record has.
        confidence: `[R]`, mean over its tokens, without gradient.
    """

    logps: Tensor
    token_logps: Tensor
    head_logps: Tensor | None = None
    confidence: Tensor | None = None


def per_response(batch: Batch, scored: Tensor, needs: Collection[str] = ()) -> Responses:
    """Gather what the Scorer says of a batch's tokens by response.

    Args:
        batch: what was scored.
        scored: the Scorer's output, `[N]` or `[N, 2]`.
        needs: what a loss needs besides sums: `head`, `confidence`.
    """
    logps, confidence = (scored, None) if scored.dim() == 1 else scored.unbind(1)
    if confidence is not None:
        confidence = batch.sum_per_response(confidence.detach()) / batch.num_tokens
    return Responses(
        logps=batch.sum_per_response(logps),
        token_logps=logps[batch.token_index],
        head_logps=_head_sums(batch, logps) if "head" in needs else None,
        confidence=confidence if "confidence" in needs else None,
    )


def _head_sums(batch: Batch, token_logps: Tensor) -> Tensor:
    """`[R]`, sums over as many tokens of a response as the shortest of its record has."""
    lengths, sizes = batch.num_tokens, batch.starts.diff()
    record = torch.repeat_interleave(torch.arange(len(sizes), device=lengths.device), sizes)
    shortest = lengths.new_zeros(len(sizes)).scatter_reduce(0, record, lengths, "amin", include_self=False)[record]
    first = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    position = torch.arange(len(first), device=lengths.device) - first
    kept = position < torch.repeat_interleave(shortest, lengths)
    return torch.segment_reduce(token_logps[batch.token_index[kept]], "sum", lengths=shortest, unsafe=True)

"""The Scorer: the only module that is wrapped for training, and the only way from a batch to log-probabilities.

Sharding, DDP and autocast wrap it, and nothing else is called: calling the backbone without its wrapper would
give unsynchronised gradients without an error.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpoctl.core.batch import Batch
from dpoctl.losses import Scores
from dpoctl.model.attention import FLAT, SHARED_PREFIX, attention_arguments
from dpoctl.model.head import Head
from dpoctl.model.modules import embedding_and_head
from dpoctl.model.probe import ProbeResult, accepts, backbone
from dpoctl.model.routers import balance_losses, experts_per_token

Result = TypeVar("Result")


class Scorer(nn.Module):
    """Backbone and head of a causal model, in the layout that the probe chose.

    Args:
        model: the module that owns all parameters: the causal model, or PEFT's wrapper around it.
        causal: the causal model inside it.
        verdict: the probe's choice of layout and head.
        confidence: also score each token's confidence, as `dpoctl.model.head.score_targets` does.
        noise_alpha: of NEFTune: in training, add uniform noise between ± alpha / √(L d) to the embeddings of a row of L
            tokens, each of d numbers; None adds none.
        balances: in training, also compute the load-balancing loss of each row, and leave their sum in `balance`.
    """

    def __init__(
        self,
        model: nn.Module,
        causal: PreTrainedModel,
        verdict: ProbeResult,
        *,
        confidence: bool = False,
        noise_alpha: float | None = None,
        balances: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        # Not registered a second time: `model` owns every parameter.
        self._causal = (causal,)
        self._head = Head(causal, confidence=confidence)
        self._noise_alpha = noise_alpha
        self._balances = balances
        self.balance: Tensor | None = None
        self._takes_positions = accepts(backbone(causal), "position_ids")
        self.use(verdict)

    def use(self, verdict: ProbeResult) -> None:
        """Take the layout and the head of a probe."""
        self.verdict = verdict
        if verdict.layout in FLAT:
            self.causal.set_attn_implementation(SHARED_PREFIX)

    def inside(self, action: Callable[[], Result]) -> Result:
        """Run an action that calls the model directly, such as generation: here a sharded model has its own weights."""
        return action()

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
        inputs |= attention_arguments(self.verdict.layout, batch.segments, batch.attention_mask, device, dtype)
        if self._is_training and self._balances:
            inputs["output_router_logits"] = True
        with self._noise(batch):
            if not self.verdict.own_head:
                return self._model_logps(batch, inputs)
            output = backbone(self.causal)(**inputs)
        self._keep_balance(output, batch)
        hidden = output.last_hidden_state
        return self._head.logps(hidden.flatten(0, 1)[batch.score_pos], batch.score_tgt)

    @property
    def _is_training(self) -> bool:
        return self.training and torch.is_grad_enabled()

    def _keep_balance(self, output: Any, batch: Batch) -> None:
        self.balance = None
        if self._is_training and self._balances:
            rows, count = batch.row_numbers()
            per_token = experts_per_token(self.causal.config)
            assert per_token is not None
            self.balance = balance_losses(output.router_logits, rows, count, per_token).sum()

    @contextmanager
    def _noise(self, batch: Batch) -> Iterator[None]:
        """Add the noise of NEFTune to the embeddings inside, in training."""
        alpha = self._noise_alpha
        if alpha is None or not self._is_training:
            yield
            return
        lengths = batch.row_lengths()

        def disturb(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            bounds = (alpha / (lengths * output.shape[-1]).sqrt())[..., None].to(output.dtype)
            return output + torch.empty_like(output).uniform_(-1, 1) * bounds

        handle = embedding_and_head(self.causal)[0].register_forward_hook(disturb)
        try:
            yield
        finally:
            handle.remove()

    def _model_logps(self, batch: Batch, inputs: dict[str, Any]) -> Tensor:
        """Log-probabilities from the model's own logits, for heads that are not a plain matrix."""
        width = batch.input_ids.shape[1]
        rows, columns = batch.score_pos // width, batch.score_pos % width
        kept, at = columns.unique(return_inverse=True)
        if accepts(self.causal, "logits_to_keep"):
            inputs["logits_to_keep"] = kept
        output = self.causal(**inputs)
        self._keep_balance(output, batch)
        logits = cast(Tensor, output.logits)
        if logits.shape[1] == width:
            at = columns
        return self._head.select(logits[rows, at], batch.score_tgt)


def per_response(batch: Batch, scored: Tensor, needs: Collection[str] = ()) -> Scores:
    """Sum the Scorer's output over the tokens of each response.

    Args:
        batch: the batch that was scored.
        scored: the Scorer's output, `[N]` or `[N, 2]`.
        needs: the optional columns that a loss needs: `head`, `confidence`.
    """
    logps, confidence = (scored, None) if scored.dim() == 1 else scored.unbind(1)
    if confidence is not None:
        confidence = batch.sum_per_response(confidence.detach()) / batch.outline.num_tokens
    return Scores(
        logps=batch.sum_per_response(logps),
        outline=batch.outline,
        ref_logps=batch.ref_logps,
        token_logps=logps[batch.token_index],
        head_logps=_head_sums(batch, logps) if "head" in needs else None,
        ref_head_logps=batch.ref_head_logps,
        confidence=confidence if "confidence" in needs else None,
    )


def _head_sums(batch: Batch, token_logps: Tensor) -> Tensor:
    """`[R]`, sums over as many tokens of a response as the shortest of its record has."""
    lengths, records = batch.outline.num_tokens, batch.outline.records
    shortest = lengths.new_zeros(len(batch.outline.starts) - 1)
    shortest = shortest.scatter_reduce(0, records, lengths, "amin", include_self=False)[records]
    # With `output_size`, and with a mask instead of a selection, the host need not wait for a GPU to know the sizes.
    tokens = len(batch.token_index)
    first = (lengths.cumsum(0) - lengths).repeat_interleave(lengths, output_size=tokens)
    position = torch.arange(tokens, device=lengths.device) - first
    kept = position < shortest.repeat_interleave(lengths, output_size=tokens)
    return batch.sum_per_response(token_logps, kept)

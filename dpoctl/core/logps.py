"""The Scorer: the one module that is ever wrapped, and the one road from a batch to log-probabilities.

DDP, FSDP, DeepSpeed and autocast wrap it and nothing else is called: a backbone called past its wrapper would give
unsynchronised gradients without an error.
"""

from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from dpoctl.core.batch import Batch
from dpoctl.model.attention import SHARED_PREFIX
from dpoctl.model.head import Head, select_logps
from dpoctl.model.probe import Verdict, accepts, backbone


class Scorer(nn.Module):
    """Backbone and head of a causal model, run as the probe's verdict says.

    Args:
        model: the module that owns all parameters: the causal model, or PEFT's wrapper around it.
        causal: the causal model inside it.
        verdict: the layout and the head to use.
    """

    def __init__(self, model: nn.Module, causal: PreTrainedModel, verdict: Verdict) -> None:
        super().__init__()
        self.model = model
        self.verdict = verdict
        # Not registered a second time: `model` owns every parameter.
        self._causal = (causal,)
        self._head = Head(causal)
        self._takes_positions = accepts(backbone(causal), "position_ids")
        if verdict.layout == "shared":
            causal.set_attn_implementation(SHARED_PREFIX)

    @property
    def causal(self) -> PreTrainedModel:
        """The causal model."""
        return self._causal[0]

    def forward(self, batch: Batch) -> Tensor:
        """Return `[N]` float32 log-probabilities of the batch's predicted tokens, in nats."""
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
        if self._takes_positions:
            inputs["position_ids"] = batch.position_ids
        if batch.segments is not None:
            inputs["layout"] = batch.segments
        else:
            inputs["attention_mask"] = batch.attention_mask
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
        return select_logps(logits[rows, at], batch.score_tgt)

"""The load-balancing loss of a mixture of experts, row by row, so that micro-batches do not change it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from dpoctl.errors import UsageError
from dpoctl.model.probe import EXPERT_KEYS


def require_routers(causal: PreTrainedModel) -> None:
    """Check that a model says where its tokens are routed.

    Raises:
        UsageError: it does not.
    """
    config = causal.config
    if not hasattr(config, "router_aux_loss_coef") or experts_per_token(config) is None:
        raise UsageError(
            f"sft.router_aux_loss_coef: a {type(causal).__name__} has no routers that transformers balances",
            hint="remove sft.router_aux_loss_coef",
        )


def experts_per_token(config: PretrainedConfig) -> int | None:
    """Return the number of experts that a token is routed to; None for a model without experts."""
    if not any(getattr(config, name, None) for name in EXPERT_KEYS):
        return None
    number: Any = getattr(config, "num_experts_per_tok", None)
    return number if isinstance(number, int) else None


def balance_losses(router_logits: Sequence[Tensor], rows: Tensor, count: int, per_token: int) -> Tensor:
    """Return `[count]`, the load-balancing loss of each row, as in transformers and in equations (4) to (6) of Switch.

    It is the number of experts times the sum over experts of (share of the row's tokens that they get) x (mean
    probability that the router gives them), over all layers.

    Args:
        router_logits: of each layer, `[T, experts]`.
        rows: `[T]`, the row of each token; `count` for padding.
        count: the number of rows.
        per_token: the number of experts that a token is routed to.
    """
    experts = router_logits[0].shape[-1]
    chosen = torch.zeros(count + 1, experts, device=rows.device)
    probability = torch.zeros_like(chosen)
    for logits in router_logits:
        weights = logits.reshape(-1, experts).softmax(-1)
        top = weights.topk(per_token, dim=-1).indices
        chosen = chosen.index_add(0, rows, torch.zeros_like(weights, dtype=torch.float32).scatter_(1, top, 1.0))
        probability = probability.index_add(0, rows, weights.float())
    tokens = torch.bincount(rows, minlength=count + 1)[:count, None] * len(router_logits)
    return ((chosen[:count] / tokens) * (probability[:count] / tokens)).sum(-1) * experts

"""From hidden states to the log-probabilities of chosen tokens, in chunks, without ever holding all logits.

`[N, vocabulary]` would be the largest tensor of a step by far. Here a chunk of rows passes through the head, its
log-sum-exp is taken in float32, and only one number a row is kept, or two.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from dpoctl.model.linear_head import LinearHead, is_plain

# Logits of one chunk, in elements: 256 MiB in float32. Far smaller chunks starve the matrix product.
CHUNK_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to the output of its head before the softmax.

    Attributes:
        scale: factor on the logits.
        softcap: logits pass `softcap * tanh(logits / softcap)` after the scale.
    """

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> "LogitTransform":
        """Read the transform from a model's config; the start-up probe checks it against the model's own logits."""
        multipliers = [getattr(config, name, None) for name in ("logit_scale", "lm_head_multiplier")]
        scale = 1.0
        for multiplier in multipliers:
            scale *= multiplier if multiplier is not None else 1.0
        divisor = getattr(config, "logits_scaling", None)
        caps = [getattr(config, name, None) for name in ("final_logit_softcapping", "logits_soft_cap")]
        return cls(scale / (divisor or 1.0), next((cap for cap in caps if cap is not None), None))

    def __call__(self, logits: Tensor) -> Tensor:
        """Apply to logits of any shape."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def select_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """Return `[n]` float32 log-probabilities of `targets` `[n]` under `logits` `[n, vocabulary]`."""
    logits = logits.float() if logits.dtype != torch.float64 else logits
    return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)


def score_targets(logits: Tensor, targets: Tensor) -> Tensor:
    """Return `[n, 2]` float32: log-probabilities of `targets` as `select_logps` has them, and their confidence.

    The confidence of a token is log p(token) - log sum_v p(v)^2: above zero for a token that is likelier than one drawn
    from the model would be on average, zero for any token of a uniform model. It carries no gradient.
    """
    logps = select_logps(logits, targets)
    with torch.no_grad():
        logits = logits.float() if logits.dtype != torch.float64 else logits
        collision = (logits - logits.logsumexp(-1, keepdim=True)).mul_(2).logsumexp(-1)
        confidence = logps - collision
    return torch.stack([logps, confidence], dim=-1)


class Head:
    """The output head of a causal model: log-probabilities of targets given hidden states.

    A frozen head costs two matrix products: d logp / d hidden is taken in the forward, chunk by chunk, and kept
    `[N, hidden]`; backward is then a product with the upstream gradient. A trainable one costs three, or four where
    its probabilities are too many to be kept. What is more than a linear layer (an adapter on it, a soft cap) goes
    through autograd, and is computed again in backward where it is trained.

    Args:
        causal: whose head it is.
        confidence: return the confidence in each target besides, from the same logits; see `score_targets`.
    """

    def __init__(self, causal: PreTrainedModel, *, confidence: bool = False) -> None:
        self.module = cast(nn.Module, causal.get_output_embeddings())
        self.transform = LogitTransform.of(causal.config)
        self.vocabulary = int(causal.config.vocab_size)
        self.select = score_targets if confidence else select_logps
        self.linear = LinearHead(self.transform.scale, confidence)

    def logps(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return `[N]` log-probabilities, or `[N, 2]` with confidences.

        Args:
            hidden: `[N, hidden]`, rows that predict.
            targets: `[N]`, the token each row must predict.
        """
        if self.transform.softcap is None and is_plain(self.module):
            return self.linear(cast(nn.Linear, self.module), hidden, targets)
        rows = max(1, CHUNK_ELEMENTS // self.vocabulary)
        chunks = list(zip(hidden.split(rows), targets.split(rows), strict=True))
        if not torch.is_grad_enabled():
            return torch.cat([self._chunk(h, t) for h, t in chunks])
        if any(p.requires_grad for p in self.module.parameters()):
            with _separate_casts(hidden.device.type):
                return torch.cat([cast(Tensor, checkpoint(self._chunk, h, t, use_reentrant=False)) for h, t in chunks])
        frozen: Any = _FrozenHead
        return torch.cat([frozen.apply(h, t, self._chunk) for h, t in chunks])

    def _chunk(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return self.select(self.transform(self.module(hidden)), targets)


def _separate_casts(device: str) -> torch.autocast:
    """Autocast as it is around, but casting the head anew for each chunk: the chunks' gradients then add in float32."""
    return torch.autocast(
        device,
        dtype=torch.get_autocast_dtype(device),
        enabled=torch.is_autocast_enabled(device),
        cache_enabled=False,
    )


class _FrozenHead(torch.autograd.Function):
    """Log-probabilities whose gradient with respect to the hidden states is already known in the forward.

    A row's log-probability depends on that row alone, so one backward through the sum gives every row's gradient,
    and what comes from above is a factor on it. A second column is known not to carry any.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, logps: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        if not ctx.needs_input_grad[0]:
            return logps(hidden, targets)
        with torch.enable_grad():
            leaf = hidden.detach().requires_grad_()
            out = logps(leaf, targets)
            (gradient,) = torch.autograd.grad(out.sum(), leaf)
        ctx.save_for_backward(gradient)
        return out.detach()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        upstream = upstream if upstream.dim() == 1 else upstream[:, 0]
        return upstream[:, None].to(gradient.dtype) * gradient, None, None

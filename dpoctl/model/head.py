"""The output head: log-probabilities of target tokens from hidden states, in chunks.

All logits, `[N, vocabulary]`, would be the largest tensor of a step. Here the head runs on one chunk of rows at a time,
the log-sum-exp is taken in float32, and only one or two numbers per row are kept.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from dpoctl.model.linear_head import LinearHead, at_least_float32, is_plain

# Logits of one chunk, in elements: 256 MiB in float32. Much smaller chunks make the matrix product inefficient.
CHUNK_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class LogitTransform:
    """Scale and soft cap that a model applies to the output of its head before the softmax.

    Attributes:
        scale: factor on the logits.
        softcap: scaled logits become `softcap * tanh(logits / softcap)`.
    """

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> "LogitTransform":
        """Read the transform from a model's configuration; `probe` compares the result with the model's own logits."""
        factors = [getattr(config, name, None) for name in ("logit_scale", "lm_head_multiplier")]
        divisor = getattr(config, "logits_scaling", None) or 1.0
        caps = [getattr(config, name, None) for name in ("final_logit_softcapping", "logits_soft_cap")]
        scale = math.prod(factor for factor in factors if factor is not None) / divisor
        return cls(scale, next((cap for cap in caps if cap is not None), None))

    def __call__(self, logits: Tensor) -> Tensor:
        """Transform logits of any shape."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def select_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """Return `[n]` float32 log-probabilities of `targets` `[n]` under `logits` `[n, vocabulary]`."""
    logits = at_least_float32(logits)
    return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)


def score_targets(logits: Tensor, targets: Tensor) -> Tensor:
    """Return `[n, 2]` float32: the log-probabilities of `targets`, see `select_logps`, and their confidences.

    The confidence of a token is log p(token) - log sum_v p(v)^2: positive for a token that is more probable than a
    token sampled from the model is on average, zero for every token of a uniform model. It has no gradient.
    """
    logps = select_logps(logits, targets)
    with torch.no_grad():
        logits = at_least_float32(logits)
        collision = (logits - logits.logsumexp(-1, keepdim=True)).mul_(2).logsumexp(-1)
        confidence = logps - collision
    return torch.stack([logps, confidence], dim=-1)


class Head:
    """The output head of a causal model, as a function from hidden states to log-probabilities of targets.

    A frozen head costs two matrix products: the forward computes d logp / d hidden, `[N, hidden]`, as well, and the
    backward multiplies it by the upstream gradient. A trainable head costs three, or four if its probabilities are too
    large to be kept. A head that is more than a linear layer (an adapter on it, a soft cap) goes through autograd, and
    is recomputed in the backward if it is trained.

    Args:
        causal: the model.
        confidence: also return the confidence of each target; see `score_targets`.
    """

    def __init__(self, causal: PreTrainedModel, *, confidence: bool = False) -> None:
        self.module = cast(nn.Module, causal.get_output_embeddings())
        self.transform = LogitTransform.of(causal.config)
        self.vocabulary = int(causal.config.vocab_size)
        self.select = score_targets if confidence else select_logps
        self.linear = LinearHead(self.transform.scale, confidence)

    def logps(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return `[N]` float32 log-probabilities, or `[N, 2]` with confidences.

        Args:
            hidden: `[N, hidden]`.
            targets: `[N]`, the token to predict from each row.
        """
        if self.transform.softcap is None and is_plain(self.module):
            return self.linear(cast(nn.Linear, self.module), hidden, targets)
        rows = max(1, CHUNK_ELEMENTS // self.vocabulary)
        chunks = list(zip(hidden.split(rows), targets.split(rows), strict=True))
        if not torch.is_grad_enabled():
            return torch.cat([self._chunk(h, t) for h, t in chunks])
        if any(p.requires_grad for p in self.module.parameters()):
            with _uncached_autocast(hidden.device.type):
                return torch.cat([cast(Tensor, checkpoint(self._chunk, h, t, use_reentrant=False)) for h, t in chunks])
        frozen: Any = _FrozenHead
        return torch.cat([frozen.apply(h, t, self._chunk) for h, t in chunks])

    def _chunk(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return self.select(self.transform(self.module(hidden)), targets)


def _uncached_autocast(device: str) -> torch.autocast:
    """Return the current autocast without its cache.

    Each chunk then casts the head's weight again, and the gradients of the chunks are summed in float32.
    """
    return torch.autocast(
        device, dtype=torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device), cache_enabled=False
    )


class _FrozenHead(torch.autograd.Function):
    """Log-probabilities under a frozen head, with d logp / d hidden computed in the forward.

    The log-probability of a row depends on that row only, so one backward through the sum gives the gradient of every
    row, and the upstream gradient is a factor on it. The second column, confidence, has no gradient.
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

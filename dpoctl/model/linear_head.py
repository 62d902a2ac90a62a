"""Log-probabilities of chosen tokens under a plain linear head, with a backward that is written out.

With p the probabilities of a row and y its token, d logp / d logits = onehot(y) - p. That times the weights is what
the hidden states get, up to one factor a row that backward brings: so it is taken in the forward, while the
probabilities are in cache. The weights' own gradient needs the probabilities once more: they are kept where they are
few, and computed again where they are many.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Logits of one chunk, in elements. A GPU wants large products; a CPU wants what stays in its cache.
CHUNK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 26}
# Probabilities that are kept for the weights' gradient, in elements: 1 GiB in float32.
KEPT_ELEMENTS = 1 << 28


def is_plain(module: nn.Module) -> bool:
    """Whether a head is a linear layer and nothing else: no adapter, no hook, no shard of a weight."""
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    # Sharded weights are tensors of another kind, or are there during a module's own forward only.
    whole = type(module.weight) is nn.Parameter and module.weight.shape == (module.out_features, module.in_features)
    return whole and not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


@dataclass(frozen=True)
class LinearHead:
    """What is done with the output of a linear head.

    Attributes:
        scale: factor on the logits.
        confidence: return the confidence in each target besides; see `dpoctl.model.head.score_targets`.
    """

    scale: float = 1.0
    confidence: bool = False

    def __call__(self, module: nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return `[N]` float32 log-probabilities, or `[N, 2]` with confidences.

        Args:
            module: a plain one.
            hidden: `[N, hidden]`, rows that predict.
            targets: `[N]`, the token each row must predict.
        """
        apply = cast(Any, _TokenLogps).apply
        dtype, device = hidden.dtype, hidden.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        # Cast outside, so that backward casts the gradient back; inside all is of one dtype.
        bias = None if module.bias is None else module.bias.to(dtype)
        logps: Tensor = apply(hidden.to(dtype), module.weight, bias, targets, self)
        return logps

    def judge(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is said of a chunk, and its probabilities `[n, vocabulary]`."""
        logits = logits if self.scale == 1.0 else logits * self.scale
        logits = logits if logits.dtype == torch.float64 else logits.float()
        peak, at = logits.max(-1, keepdim=True)
        probabilities = logits.softmax(-1)
        # The largest probability is at least one over the vocabulary: its logarithm is safe and exact.
        normaliser = peak - probabilities.gather(-1, at).log()
        logps = (logits.gather(-1, targets[:, None]) - normaliser).squeeze(-1)
        if not self.confidence:
            return logps, probabilities
        collision = 2 * torch.linalg.vector_norm(probabilities, dim=-1).log()
        return torch.stack([logps, logps - collision], dim=-1), probabilities


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: LinearHead
    ) -> Tensor:
        own = weight.to(hidden.dtype)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        trained = wants_weight or wants_bias
        keep = trained and len(targets) * len(weight) <= KEPT_ELEMENTS
        said, slopes, kept = [], [], []
        for h, y in zip(hidden.split(_rows(weight)), targets.split(_rows(weight)), strict=True):
            out, slope = head.judge(F.linear(h, own, bias), y)
            said.append(out)
            if not (wants_hidden or trained):
                continue
            slope = _to_slope(slope, y, hidden.dtype)
            if wants_hidden:
                slopes.append(slope @ own)
            if keep:
                kept.append(slope)
        ctx.head, ctx.kept, ctx.weight_dtype = head, kept, weight.dtype
        ctx.save_for_backward(
            torch.cat(slopes) if slopes else None, *((hidden, weight, bias, targets) if trained else (None,) * 4)
        )
        return torch.cat(said)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        slope, hidden, weight, bias, targets = ctx.saved_tensors
        # Slopes are those of minus the log-probability; a second column carries no gradient.
        factor = (upstream if upstream.dim() == 1 else upstream[:, 0])[:, None] * -ctx.head.scale
        to_hidden = None if slope is None else factor.to(slope.dtype) * slope
        if hidden is None:
            return to_hidden, None, None, None, None
        wants_weight, wants_bias = ctx.needs_input_grad[1:3]
        to_weight = torch.zeros_like(weight) if wants_weight else None
        to_bias = torch.zeros_like(bias) if wants_bias else None
        rows = _rows(weight)
        pulled = factor.to(hidden.dtype)
        for number, (h, y, f) in enumerate(zip(*(t.split(rows) for t in (hidden, targets, pulled)), strict=True)):
            chunk = ctx.kept[number] if ctx.kept else _recomputed(ctx.head, h, weight, bias, y)
            if to_weight is not None:
                _add_product(to_weight, chunk.T, f * h)
            if to_bias is not None:
                to_bias += (chunk * f).sum(0)
        return to_hidden, to_weight, to_bias, None, None


def _rows(weight: Tensor) -> int:
    """Rows of a chunk."""
    return max(1, CHUNK_ELEMENTS.get(weight.device.type, CHUNK_ELEMENTS["cuda"]) // len(weight))


def _to_slope(probabilities: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn probabilities into p - onehot(y), in place and in the dtype of the products."""
    probabilities[torch.arange(len(targets), device=targets.device), targets] -= 1
    return probabilities.to(dtype)


def _recomputed(head: LinearHead, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    _, probabilities = head.judge(F.linear(hidden, weight.to(hidden.dtype), bias), targets)
    return _to_slope(probabilities, targets, hidden.dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a product to a total, which may be of a wider dtype: chunks add up in that one."""
    if total.dtype == left.dtype:
        torch.addmm(total, left, right, out=total)
    else:
        total += left @ right

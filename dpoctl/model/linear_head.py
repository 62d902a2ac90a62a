"""Log-probabilities of target tokens under a plain linear head, block by block, with an explicit backward.

Logits exist for one block of rows and vocabulary entries at a time; on a CPU a block fits the cache. With l the logits
of a row, y its target and m the largest logit of another token so far, three sums over the other tokens are accumulated
block by block, and rescaled whenever m grows:

    s = sum_j e^(l_j - m),    q = sum_j e^2(l_j - m),    g = sum_j e^(l_j - m) w_j.

After the last block, with n = 1 / (s + e^(l_y - m)) the factor from exponentials to probabilities,

    log p = -log(1 + s e^(m - l_y)),    -d log p / d hidden = n g - n s w_y,

both exact however close p is to one. The second is the gradient of the hidden states up to one factor per row, so g is
accumulated in the forward, while the exponentials of a block exist. The gradient of the weight needs the exponentials
e^(l_j - m) again: they are kept if they are few, else computed again.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpoctl.model.memory import device_kind

# Rows and vocabulary entries of a block: on a CPU it fits the cache; a GPU needs large products (256 MiB in float32).
BLOCK = {"cpu": (1024, 2048), "cuda": (4096, 16384)}
# Largest number of exponentials that are kept for the gradient of the weight: 1 GiB in float32.
KEPT_ELEMENTS = 1 << 28
# e^-60 is zero beside any probability that matters.
_MAX_EXPONENT = 60.0


def is_plain(module: nn.Module) -> bool:
    """Whether a module is a linear layer and nothing else: no adapter, no hook, no sharded weight."""
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    # A sharded weight is another type of tensor, or exists only during the module's own forward. A fake parameter, of
    # a model that is only traced, has the class of its tensor.
    shape = (module.out_features, module.in_features)
    whole = type(module.weight).__name__ in ("Parameter", "FakeTensor") and module.weight.shape == shape
    return whole and not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Cast to float32, unless the tensor is float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@dataclass(frozen=True)
class LinearHead:
    """Log-probabilities of targets under a linear layer.

    Attributes:
        scale: factor on the logits.
        confidence: also return the confidence of each target; see `dpoctl.model.head.score_targets`.
    """

    scale: float = 1.0
    confidence: bool = False

    def __call__(self, module: nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return `[N]` float32 log-probabilities, or `[N, 2]` with confidences.

        Args:
            module: the head; `is_plain` must be true of it.
            hidden: `[N, hidden]`.
            targets: `[N]`, the token to predict from each row.
        """
        apply = cast(Any, _TokenLogps).apply
        dtype, device = hidden.dtype, hidden.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        # The casts are outside the function, so that autograd casts the gradients back; inside there is one dtype.
        bias = None if module.bias is None else module.bias.to(dtype)
        logps: Tensor = apply(hidden.to(dtype), module.weight, bias, targets, self)
        return logps


@dataclass(frozen=True)
class _Block:
    """A block of the vocabulary: its first entry, its weight `[entries, hidden]` and its bias `[entries]`."""

    first: int
    weight: Tensor
    bias: Tensor | None

    def logits(self, hidden: Tensor, scale: float) -> Tensor:
        """Return `[n, entries]` in float32, or float64."""
        logits = F.linear(hidden, self.weight, self.bias)
        return at_least_float32(logits if scale == 1.0 else logits * scale)

    def replace_targets(self, values: Tensor, targets: Tensor, new: Tensor | float) -> Tensor:
        """Replace each target's value in `values` `[n, entries]` by `new` `[n, 1]`, and return the old ones `[n]`.

        Rows with a target in another block are unchanged, and zero in the result.
        """
        column = (targets - self.first)[:, None]
        inside = (column >= 0) & (column < len(self.weight))
        column = column.clamp(0, len(self.weight) - 1)
        old = values.gather(-1, column)
        values.scatter_(-1, column, torch.where(inside, new, old))
        return torch.where(inside, old, 0.0).squeeze(-1)


@dataclass
class _Rows:
    """Some rows and their sums over the blocks so far; the letters are those of the module's docstring.

    Attributes:
        hidden: `[n, hidden]`.
        targets: `[n]`.
        target_logit: `[n]`, l_y.
        maximum: `[n]`, m.
        exp_sum: `[n]`, s.
        square_sum: `[n]`, q.
        weight_sum: `[n, hidden]`, g, or `None` if the hidden states need no gradient.
        maxima: m as of each block.
        exponentials: e^(l_j - m) of each block, zero for the targets; empty if they are not kept.
    """

    hidden: Tensor
    targets: Tensor
    target_logit: Tensor
    maximum: Tensor
    exp_sum: Tensor
    square_sum: Tensor
    weight_sum: Tensor | None
    maxima: list[Tensor] = field(default_factory=list)
    exponentials: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, hidden: Tensor, targets: Tensor, *, needs_hidden: bool) -> Self:
        """Return the rows before the first block; `needs_hidden` asks for the gradient of the hidden states."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        zeros = [hidden.new_zeros(len(hidden), dtype=dtype) for _ in range(3)]
        # Finite, so that differences are finite too as long as a row has seen no token but its target.
        maximum = torch.full_like(zeros[0], torch.finfo(dtype).min / 4)
        weight_sum = hidden.new_zeros(hidden.shape, dtype=dtype) if needs_hidden else None
        return cls(hidden, targets, zeros[0], maximum, zeros[1], zeros[2], weight_sum)

    def add(self, block: _Block, head: LinearHead, *, keep: bool) -> None:
        """Add a block to the sums, and keep its exponentials if asked."""
        logits = block.logits(self.hidden, head.scale)
        self.target_logit += block.replace_targets(logits, self.targets, float("-inf"))
        maximum = torch.maximum(self.maximum, logits.amax(-1))
        rescale = (self.maximum - maximum).exp_()
        self.maximum = maximum
        self.maxima.append(maximum)
        exponentials = logits.sub_(maximum[:, None]).exp_()
        self.exp_sum = self.exp_sum * rescale + exponentials.sum(-1)
        if head.confidence:
            squares = torch.linalg.vector_norm(exponentials, dim=-1).square()
            self.square_sum = self.square_sum * rescale * rescale + squares
        exponentials = exponentials.to(self.hidden.dtype)
        if self.weight_sum is not None:
            self.weight_sum.mul_(rescale[:, None])
            _add_product(self.weight_sum, exponentials, block.weight)
        if keep:
            self.exponentials.append(exponentials)

    def logit_gradient(self, number: int, block: _Block, head: LinearHead) -> Tensor:
        """Return `[n, entries]`, -d log p / d logits of a block, up to `probability_scale`."""
        if self.exponentials:
            exponentials = self.exponentials[number]
        else:
            logits = block.logits(self.hidden, head.scale)
            exponentials = logits.sub_(self.maxima[number][:, None]).exp_().to(self.hidden.dtype)
        # The gradient of the target is p - 1, which is -s in units of the final maximum.
        target = -self.exp_sum * self._growth(number).exp()
        block.replace_targets(exponentials, self.targets, target.to(exponentials.dtype)[:, None])
        return exponentials

    def probability_scale(self, number: int) -> Tensor:
        """Return `[n]`, the factor from the exponentials of a block to probabilities."""
        return self._normaliser * (-self._growth(number)).exp()

    def logps(self, *, confidence: bool) -> Tensor:
        """Return `[n]` log-probabilities, or `[n, 2]` with confidences."""
        target, log_sum = self.target_logit - self.maximum, self.exp_sum.log()
        logps = -torch.logaddexp(torch.zeros_like(target), log_sum - target)
        if not confidence:
            return logps
        collision = torch.logaddexp(2 * logps, self.square_sum.log() - 2 * torch.logaddexp(log_sum, target))
        return torch.stack([logps, logps - collision], dim=-1)

    def hidden_gradient(self, weight: Tensor) -> Tensor:
        """Return `[n, hidden]`, -d log p / d hidden without the factor on the logits."""
        assert self.weight_sum is not None
        normaliser = self._normaliser[:, None]
        gradient = self.weight_sum.mul_(normaliser) - (self.exp_sum[:, None] * normaliser) * weight[self.targets]
        return gradient.to(self.hidden.dtype)

    @property
    def _normaliser(self) -> Tensor:
        """The factor n `[n]`, from exponentials to probabilities."""
        return 1 / (self.exp_sum + (self.target_logit - self.maximum).exp())

    def _growth(self, number: int) -> Tensor:
        """Return `[n]`, the growth of m since a block, at most `_MAX_EXPONENT`."""
        return (self.maximum - self.maxima[number]).clamp_(max=_MAX_EXPONENT)


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: LinearHead
    ) -> Tensor:
        cast_weight = weight.to(hidden.dtype)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        trained = needs_weight or needs_bias
        keep = trained and len(targets) * len(weight) <= KEPT_ELEMENTS
        size, _ = _sizes(weight)
        parts = zip(hidden.split(size), targets.split(size), strict=True)
        chunks = [_Rows.of(h, y, needs_hidden=needs_hidden) for h, y in parts]
        for block in _blocks(cast_weight, bias):
            for rows in chunks:
                rows.add(block, head, keep=keep)
        gradient = torch.cat([rows.hidden_gradient(cast_weight) for rows in chunks]) if needs_hidden else None
        ctx.head, ctx.chunks = head, chunks if trained else ()
        ctx.save_for_backward(gradient, *((weight, bias) if trained else (None, None)))
        return torch.cat([rows.logps(confidence=head.confidence) for rows in chunks])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        gradient, weight, bias = ctx.saved_tensors
        # The kept gradients are those of -log p. A second column, confidence, has no gradient.
        factor = (upstream if upstream.dim() == 1 else upstream[:, 0]) * -ctx.head.scale
        hidden_gradient = None if gradient is None else factor[:, None].to(gradient.dtype) * gradient
        if weight is None:
            return hidden_gradient, None, None, None, None
        needs_weight, needs_bias = ctx.needs_input_grad[1:3]
        weight_gradient = torch.zeros_like(weight) if needs_weight else None
        bias_gradient = torch.zeros_like(bias) if needs_bias else None
        cast_weight = weight.to(ctx.chunks[0].hidden.dtype)
        for number, block in enumerate(_blocks(cast_weight, bias)):
            entries = slice(block.first, block.first + len(block.weight))
            for rows, f in zip(ctx.chunks, factor.split(_sizes(weight)[0]), strict=True):
                logit_gradient = rows.logit_gradient(number, block, ctx.head)
                scale = (f * rows.probability_scale(number)).to(logit_gradient.dtype)
                if weight_gradient is not None:
                    _add_product(weight_gradient[entries], logit_gradient.T, scale[:, None] * rows.hidden)
                if bias_gradient is not None:
                    bias_gradient[entries] += logit_gradient.T @ scale
        return hidden_gradient, weight_gradient, bias_gradient, None, None


def _sizes(weight: Tensor) -> tuple[int, int]:
    """Return the number of rows and of vocabulary entries of a block."""
    return BLOCK.get(device_kind(weight.device), BLOCK["cuda"])


def _blocks(weight: Tensor, bias: Tensor | None) -> Iterator[_Block]:
    _, size = _sizes(weight)
    for first in range(0, len(weight), size):
        yield _Block(first, weight[first : first + size], None if bias is None else bias[first : first + size])


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a matrix product to a total, in the dtype of the total, which may be of higher precision."""
    if total.dtype == left.dtype:
        torch.addmm(total, left, right, out=total)
    else:
        total += left @ right

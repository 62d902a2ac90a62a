"""Log-probabilities of chosen tokens under a plain linear head, block by block, with a backward that is written out.

Logits exist for some rows and some words of the vocabulary at a time: on a CPU few enough for its cache. With l a row's
logits, y its token and m the largest logit of another token so far, three sums over the other tokens grow from block to
block, and fade whenever m grows:

    s = sum_j e^(l_j - m),    q = sum_j e^2(l_j - m),    g = sum_j e^(l_j - m) w_j.

At the end, with n = 1 / (s + e^(l_y - m)),

    log p = -log(1 + s e^(m - l_y)),    -d log p / d hidden = n g - n s w_y,

exact however near p comes to one. The second is what the hidden states get, up to one factor a row: so g is summed in
the forward, while a block is at hand. The weights' own gradient needs the e^(l_j - m) once more: they are kept where
they are few, and computed again where they are many.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Rows and words of a block. A CPU wants what stays in its cache; a GPU large products, of 256 MiB in float32.
BLOCK = {"cpu": (1024, 2048), "cuda": (4096, 16384)}
# Shares that are kept for the weights' gradient, in elements: 1 GiB in float32.
KEPT_ELEMENTS = 1 << 28
# Beyond this exponent a share is nothing.
FAR = 60.0


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


@dataclass(frozen=True)
class _Block:
    """Words of the vocabulary that are scored at once: the first, their weights and their bias."""

    first: int
    weight: Tensor
    bias: Tensor | None

    def logits(self, hidden: Tensor, scale: float) -> Tensor:
        """Return `[n, words]` in float32, or float64."""
        logits = F.linear(hidden, self.weight, self.bias)
        logits = logits if scale == 1.0 else logits * scale
        return logits if logits.dtype == torch.float64 else logits.float()

    def replace(self, values: Tensor, targets: Tensor, new: Tensor | float) -> Tensor:
        """Put something in place of each row's target, where it is in the block; returns what was there, else zero."""
        at = (targets - self.first)[:, None]
        here = (at >= 0) & (at < len(self.weight))
        at = at.clamp(0, len(self.weight) - 1)
        found = values.gather(-1, at)
        values.scatter_(-1, at, torch.where(here, new, found))
        return torch.where(here, found, 0.0).squeeze(-1)


@dataclass
class _Rows:
    """Some rows and what is known of them so far, in the letters of the module's description.

    Attributes:
        hidden: `[n, hidden]`.
        targets: `[n]`.
        target: `[n]`, l_y.
        peak: `[n]`, m.
        others: `[n]`, s.
        squares: `[n]`, q.
        pulled: `[n, hidden]`, g, where hidden states get something.
        peaks: m as it was at each block.
        shares: e^(l_j - m) of each block with zeros for the targets, where they are kept.
    """

    hidden: Tensor
    targets: Tensor
    target: Tensor
    peak: Tensor
    others: Tensor
    squares: Tensor
    pulled: Tensor | None
    peaks: list[Tensor] = field(default_factory=list)
    shares: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, hidden: Tensor, targets: Tensor, *, pulls: bool) -> Self:
        """Begin."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        zeros = [hidden.new_zeros(len(hidden), dtype=wide) for _ in range(3)]
        # Finite, so that differences are numbers even where nothing but targets was seen.
        peak = torch.full_like(zeros[0], torch.finfo(wide).min / 4)
        pulled = hidden.new_zeros(hidden.shape, dtype=wide) if pulls else None
        return cls(hidden, targets, zeros[0], peak, zeros[1], zeros[2], pulled)

    def see(self, block: _Block, head: LinearHead, *, keep: bool) -> None:
        """Go on by a block."""
        logits = block.logits(self.hidden, head.scale)
        self.target += block.replace(logits, self.targets, float("-inf"))
        peak = torch.maximum(self.peak, logits.amax(-1))
        fade = (self.peak - peak).exp_()
        self.peak = peak
        self.peaks.append(peak)
        shares = logits.sub_(peak[:, None]).exp_()
        self.others = self.others * fade + shares.sum(-1)
        if head.confidence:
            self.squares = self.squares * fade * fade + torch.linalg.vector_norm(shares, dim=-1).square()
        shares = shares.to(self.hidden.dtype)
        if self.pulled is not None:
            self.pulled.mul_(fade[:, None])
            _add_product(self.pulled, shares, block.weight)
        if keep:
            self.shares.append(shares)

    def shares_again(self, number: int, block: _Block, head: LinearHead) -> Tensor:
        """Return the shares of a block once more, with -s for the targets: their p - 1 in the same measure."""
        if self.shares:
            shares = self.shares[number]
        else:
            logits = block.logits(self.hidden, head.scale)
            shares = logits.sub_(self.peaks[number][:, None]).exp_().to(self.hidden.dtype)
        missing = -self.others * self._distance(number).exp()
        block.replace(shares, self.targets, missing.to(shares.dtype)[:, None])
        return shares

    def weights_of(self, number: int) -> Tensor:
        """`[n]`, what turns the shares of a block into probabilities."""
        return self.normaliser * (-self._distance(number)).exp()

    @property
    def normaliser(self) -> Tensor:
        """`[n]`, what turns shares into probabilities."""
        return 1 / (self.others + (self.target - self.peak).exp())

    def said(self, *, confidence: bool) -> Tensor:
        """Return `[n]` log-probabilities, or `[n, 2]` with confidences."""
        known, others = self.target - self.peak, self.others.log()
        logps = -torch.logaddexp(torch.zeros_like(known), others - known)
        if not confidence:
            return logps
        collision = torch.logaddexp(2 * logps, self.squares.log() - 2 * torch.logaddexp(others, known))
        return torch.stack([logps, logps - collision], dim=-1)

    def slope(self, weight: Tensor) -> Tensor:
        """`[n, hidden]`, -d log p / d hidden up to the scale."""
        assert self.pulled is not None
        normaliser = self.normaliser[:, None]
        slope = self.pulled.mul_(normaliser) - (self.others[:, None] * normaliser) * weight[self.targets]
        return slope.to(self.hidden.dtype)

    def _distance(self, number: int) -> Tensor:
        """`[n]`, by how much m grew since a block, as far as it matters."""
        return (self.peak - self.peaks[number]).clamp_(max=FAR)


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: LinearHead
    ) -> Tensor:
        own = weight.to(hidden.dtype)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        trained = wants_weight or wants_bias
        keep = trained and len(targets) * len(weight) <= KEPT_ELEMENTS
        size, _ = _sizes(weight)
        parts = zip(hidden.split(size), targets.split(size), strict=True)
        chunks = [_Rows.of(h, y, pulls=wants_hidden) for h, y in parts]
        for block in _blocks(own, bias):
            for rows in chunks:
                rows.see(block, head, keep=keep)
        slope = torch.cat([rows.slope(own) for rows in chunks]) if wants_hidden else None
        ctx.head, ctx.chunks = head, chunks if trained else ()
        ctx.save_for_backward(slope, *((weight, bias) if trained else (None, None)))
        return torch.cat([rows.said(confidence=head.confidence) for rows in chunks])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        slope, weight, bias = ctx.saved_tensors
        # Slopes are those of minus the log-probability; a second column carries no gradient.
        factor = (upstream if upstream.dim() == 1 else upstream[:, 0]) * -ctx.head.scale
        to_hidden = None if slope is None else factor[:, None].to(slope.dtype) * slope
        if weight is None:
            return to_hidden, None, None, None, None
        wants_weight, wants_bias = ctx.needs_input_grad[1:3]
        to_weight = torch.zeros_like(weight) if wants_weight else None
        to_bias = torch.zeros_like(bias) if wants_bias else None
        own = weight.to(ctx.chunks[0].hidden.dtype)
        for number, block in enumerate(_blocks(own, bias)):
            words = slice(block.first, block.first + len(block.weight))
            for rows, f in zip(ctx.chunks, factor.split(_sizes(weight)[0]), strict=True):
                shares = rows.shares_again(number, block, ctx.head)
                pulled = (f * rows.weights_of(number)).to(shares.dtype)
                if to_weight is not None:
                    _add_product(to_weight[words], shares.T, pulled[:, None] * rows.hidden)
                if to_bias is not None:
                    to_bias[words] += shares.T @ pulled
        return to_hidden, to_weight, to_bias, None, None


def _sizes(weight: Tensor) -> tuple[int, int]:
    """Rows and words of a block."""
    return BLOCK.get(weight.device.type, BLOCK["cuda"])


def _blocks(weight: Tensor, bias: Tensor | None) -> Iterator[_Block]:
    _, words = _sizes(weight)
    for first in range(0, len(weight), words):
        yield _Block(first, weight[first : first + words], None if bias is None else bias[first : first + words])


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a product to a total, which may be of a wider dtype: parts add up in that one."""
    if total.dtype == left.dtype:
        torch.addmm(total, left, right, out=total)
    else:
        total += left @ right

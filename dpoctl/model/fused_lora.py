"""LoRA layers as one autograd function: `x W' + b + s (x A') B'`, with few passes over memory.

peft's own forward makes three more tensors of the output's size for each adapted layer, may keep a float32 copy of its
input, and copies the output of quantised layers. Here the low-rank product is added in place, and only `x A'` and the
input are kept, which layers with the same input share. Quantised weights are dequantised again in the backward. Layers
with dropout, a LoRA variant or sharded weights keep peft's forward.
"""

from dataclasses import dataclass
from types import MethodType
from typing import Any, cast

import torch
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn

from dpoctl.model.linear_head import is_plain
from dpoctl.model.quantize import dequantised_weight, is_quantised


def fuse_lora(model: nn.Module) -> None:
    """Replace the forwards of adapted layers; at each call a layer that is not plain LoRA runs peft's forward."""
    for module in model.modules():
        if isinstance(module, Linear) or (isinstance(module, LoraLayer) and is_quantised(module.get_base_layer())):
            vars(module)["forward"] = MethodType(_forward, module)


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    adapters = () if args or kwargs else _plain_adapters(layer)
    base = _plain_base(layer.base_layer) if adapters else None
    if base is None:
        out: Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return out
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    scales = tuple(layer.scaling[name] for name in adapters)
    factors = [factor for name in adapters for factor in (layer.lora_A[name].weight, layer.lora_B[name].weight)]
    flat: Tensor = cast(Any, _Lora).apply(x.reshape(-1, x.shape[-1]), base, scales, *factors)
    return flat.view(*x.shape[:-1], -1)


def _plain_adapters(layer: Any) -> tuple[str, ...]:
    """Return the names of a layer's active adapters if all are plain and the base is frozen, else none."""
    if layer.disable_adapters or layer.merged or any(p.requires_grad for p in layer.base_layer.parameters()):
        return ()
    active = tuple(name for name in layer.active_adapters if name in layer.lora_A)
    return active if all(_is_plain_adapter(layer, name) for name in active) else ()


def _is_plain_adapter(layer: Any, name: str) -> bool:
    factors, dropout = (layer.lora_A[name], layer.lora_B[name]), layer.lora_dropout[name]
    drops = layer.training and getattr(dropout, "p", 0.0) > 0
    return name not in layer.lora_variant and not drops and all(is_plain(f) and f.bias is None for f in factors)


@dataclass(frozen=True)
class _LinearBase:
    """A frozen linear layer under an adapter."""

    layer_weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor, scales: tuple[float, ...], factors: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
        """Return `x W' + b + s (x A') B'`, and each `s x A'`."""
        out, lows = _low_rank(x, scales, factors)
        if self.bias is not None:
            out += self.bias.to(x.dtype)
        # Adding the large product to the small one in one kernel is cheaper than the reverse.
        return torch.addmm(out, x, self.weight(x.dtype).T, out=out), lows

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Return the weight `[out, in]`."""
        return self.layer_weight.to(dtype)


@dataclass(frozen=True)
class _QuantisedBase:
    """A layer of bitsandbytes under an adapter."""

    layer: Any

    def forward(self, x: Tensor, scales: tuple[float, ...], factors: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
        """Return `x W' + b + s (x A') B'`, and each `s x A'`."""
        return _low_rank(x, scales, factors, self.layer(x))

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Return the dequantised weight `[out, in]`."""
        return dequantised_weight(self.layer, dtype)


def _plain_base(layer: Any) -> _LinearBase | _QuantisedBase | None:
    if is_plain(layer):
        return _LinearBase(layer.weight, layer.bias)
    has_hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks
    return _QuantisedBase(layer) if is_quantised(layer) and not has_hooks else None


class _Lora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, base: _LinearBase | _QuantisedBase, scales: tuple[float, ...], *factors: Tensor
    ) -> Tensor:
        # Kept for the backward, because there are many of these small copies, and a GPU waits for each launch.
        cast_factors = tuple(factor.to(x.dtype) for factor in factors)
        out, lows = base.forward(x, scales, cast_factors)
        ctx.scales, ctx.base, ctx.dtypes = scales, base, [factor.dtype for factor in factors]
        ctx.save_for_backward(x, *cast_factors, *lows)
        return out

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        x_gradient, *gradients = _low_rank_gradients(
            upstream, x, ctx.scales, rest, ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
        )
        factor_gradients = [g if g is None else g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)]
        if x_gradient is not None:
            torch.addmm(x_gradient, upstream, ctx.base.weight(upstream.dtype), out=x_gradient)
        return x_gradient, None, None, *factor_gradients


def _low_rank(
    x: Tensor, scales: tuple[float, ...], factors: tuple[Tensor, ...], out: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Return the sum of `s (x A') B'` over the adapters, added in place to `out` if there is one, and each `s x A'`."""
    lows = []
    for a, b, scale in zip(factors[::2], factors[1::2], scales, strict=True):
        low = (x @ a.T).mul_(scale)
        lows.append(low)
        out = low @ b.T if out is None else torch.addmm(out, low, b.T, out=out)
    assert out is not None
    return out, lows


def _low_rank_gradients(
    upstream: Tensor,
    x: Tensor,
    scales: tuple[float, ...],
    saved: list[Tensor],
    needs_x: bool,
    needs_factors: tuple[bool, ...],
) -> list[Tensor | None]:
    """Return the gradient of the input through the adapters, then those of their factors; `None` where not needed.

    Args:
        upstream: `[n, out]`.
        x: `[n, in]`.
        scales: of the adapters.
        saved: their factors in the dtype of `x`, then each `s x A'`.
        needs_x: whether the input needs a gradient.
        needs_factors: which factors are trained.
    """
    count = len(scales)
    factors, lows = saved[: 2 * count], saved[2 * count :]
    x_gradient: Tensor | None = None
    factor_gradients: list[Tensor | None] = []
    for number, (a, b, scale, low) in enumerate(zip(factors[::2], factors[1::2], scales, lows, strict=True)):
        needs_a, needs_b = needs_factors[2 * number : 2 * number + 2]
        low_gradient = (upstream @ b).mul_(scale)
        factor_gradients += [low_gradient.T @ x if needs_a else None, upstream.T @ low if needs_b else None]
        if needs_x:
            x_gradient = low_gradient @ a if x_gradient is None else x_gradient.addmm_(low_gradient, a)
    return [x_gradient, *factor_gradients]

"""Plain LoRA as one step of autograd: `x W' + b + s (x A') B'`, with few passes over memory.

Written as peft writes it, each adapted layer makes three more tensors of its output's size, and may keep a float32 copy
of its input. Here the low-rank product is added in place, and what is kept is the input, which the layers that share it
share, and `x A'`. Whatever is more than plain (dropout, quantised weights, shards) stays with peft.
"""

from types import MethodType
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import Tensor, nn

from dpoctl.model.linear_head import is_plain


def use_plain_lora(model: nn.Module) -> None:
    """Let the adapted layers of a model run in one step where they are plain; decided anew at each forward."""
    for module in model.modules():
        if type(module) is Linear:
            vars(module)["forward"] = MethodType(_forward, module)


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    adapters = () if args or kwargs else _plain_adapters(layer)
    if not adapters:
        out: Tensor = Linear.forward(layer, x, *args, **kwargs)
        return out
    base, factors = layer.base_layer, [(layer.lora_A[name].weight, layer.lora_B[name].weight) for name in adapters]
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    scales = tuple(layer.scaling[name] for name in adapters)
    flat: Tensor = cast(Any, _PlainLora).apply(
        x.reshape(-1, x.shape[-1]), base.weight, base.bias, scales, *(factor for pair in factors for factor in pair)
    )
    return flat.view(*x.shape[:-1], -1)


def _plain_adapters(layer: Any) -> tuple[str, ...]:
    """Names of the adapters at work in a layer, if all are plain and the layer is, and is frozen; else none."""
    if layer.disable_adapters or layer.merged or any(p.requires_grad for p in layer.base_layer.parameters()):
        return ()
    active = tuple(name for name in layer.active_adapters if name in layer.lora_A)
    plain = is_plain(layer.base_layer) and all(_is_plain_adapter(layer, name) for name in active)
    return active if plain else ()


def _is_plain_adapter(layer: Any, name: str) -> bool:
    factors, dropout = (layer.lora_A[name], layer.lora_B[name]), layer.lora_dropout[name]
    drops = layer.training and getattr(dropout, "p", 0.0) > 0
    return name not in layer.lora_variant and not drops and all(is_plain(f) and f.bias is None for f in factors)


class _PlainLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scales: tuple[float, ...], *factors: Tensor
    ) -> Tensor:
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        out, lows = F.linear(x, weight, bias), []
        for a, b, scale in zip(factors[::2], factors[1::2], scales, strict=True):
            lows.append((x @ a.to(x.dtype).T).mul_(scale))
            torch.addmm(out, lows[-1], b.to(x.dtype).T, out=out)
        ctx.scales = scales
        ctx.save_for_backward(x, weight, *factors, *lows)
        return out

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *rest = ctx.saved_tensors
        count = len(ctx.scales)
        factors, lows = rest[: 2 * count], rest[2 * count :]
        to_x = upstream @ weight if ctx.needs_input_grad[0] else None
        to_factors: list[Tensor | None] = []
        for number, (a, b, scale, low) in enumerate(zip(factors[::2], factors[1::2], ctx.scales, lows, strict=True)):
            wants_a, wants_b = ctx.needs_input_grad[4 + 2 * number : 6 + 2 * number]
            to_low = (upstream @ b.to(x.dtype)).mul_(scale)
            to_factors += [
                (to_low.T @ x).to(a.dtype) if wants_a else None,
                (upstream.T @ low).to(b.dtype) if wants_b else None,
            ]
            if to_x is not None:
                torch.addmm(to_x, to_low, a.to(x.dtype), out=to_x)
        return to_x, None, None, None, *to_factors

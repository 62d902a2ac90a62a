"""AdamW for weights that are stored in bfloat16, with stochastic rounding: 8 bytes a parameter instead of 16.

bfloat16 has 8 significant bits. An update smaller than 1/256 of a weight is lost when the sum is rounded to the nearest
number, and so is the growth of a second moment with beta2 = 0.999. Rounded up or down at random, with probabilities
such that the mean is exact, small updates add up as they do in float32.

The random bits depend on the seed, the step and the tensor alone: all ranks round alike, and a resumed run rounds as
the run would have.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_LOW_BITS = 16
CHUNK = 1 << 24
"""Elements that are float32 at a time: 64 MiB for each of a handful of copies."""


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """Round float32 values to bfloat16, up or down at random, so that the mean of many roundings is the value.

    Args:
        values: float32, of any shape; finite.
        generator: of the random bits, on the device of the values.

    Returns:
        bfloat16, of the same shape.
    """
    noise = torch.randint(1 << _LOW_BITS, values.shape, generator=generator, device=values.device, dtype=torch.int32)
    # The low half of a float32 is what bfloat16 drops: noise that carries over rounds up.
    bits = values.contiguous().view(torch.int32) + noise
    return (bits & -(1 << _LOW_BITS)).view(torch.float32).to(torch.bfloat16)


class BFloat16AdamW(Optimizer):
    """AdamW whose weights and moments are bfloat16, each rounded stochastically after an update in float32.

    With gradient g, learning rate a and weight decay w, as torch's AdamW:

        m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2,
        p = p - a w p - a (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps).

    Args:
        parameters: tensors or groups; those that are float32 are updated without rounding.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the denominator.
        weight_decay: decoupled.
        seed: of the rounding.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._seed = seed

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        numbered = enumerate((group, parameter) for group in self.param_groups for parameter in group["params"])
        for number, (group, parameter) in numbered:
            if parameter.grad is not None:
                self._update(parameter, group, number)

    def _update(self, parameter: Tensor, group: dict[str, Any], number: int) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        step = int(state["step"])
        rounding = _Rounding(self._seed, step, number, parameter.device)
        assert parameter.grad is not None
        tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        for weights, gradient, first, second in zip(*(t.view(-1).split(CHUNK) for t in tensors), strict=True):
            _update_chunk(weights, gradient, first, second, group, step, rounding)


def _update_chunk(
    weights: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    group: dict[str, Any],
    step: int,
    rounding: "_Rounding",
) -> None:
    """Update some weights and their moments in place, through float32 copies."""
    beta1, beta2 = group["betas"]
    wide = gradient.float()
    mean = first.float().lerp_(wide, 1 - beta1)
    square = second.float().mul_(beta2).addcmul_(wide, wide, value=1 - beta2)
    denominator = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
    values = weights.float().mul_(1 - group["lr"] * group["weight_decay"])
    values.addcdiv_(mean, denominator, value=-group["lr"] / (1 - beta1**step))
    for stored, exact in ((weights, values), (first, mean), (second, square)):
        stored.copy_(rounding(exact) if stored.dtype == torch.bfloat16 else exact)


class _Rounding:
    """Stochastic rounding of the tensors of one parameter at one step."""

    def __init__(self, seed: int, step: int, number: int, device: torch.device) -> None:
        self._generator = torch.Generator(device)
        # Three small numbers to one seed, as far apart as the generator needs.
        self._generator.manual_seed((seed * 1_000_003 + step) * 1_000_003 + number & (1 << 63) - 1)

    def __call__(self, values: Tensor) -> Tensor:
        return round_stochastically(values, self._generator)


def rounded(base: type[Optimizer], seed: int) -> type[Optimizer]:
    """Return a bitsandbytes optimizer that updates bfloat16 parameters in float32, one at a time, and rounds them.

    Args:
        base: a class of bitsandbytes with `update_step(group, parameter, group index, parameter index)`.
        seed: of the rounding.
    """

    class Rounded(base):  # type: ignore[misc, valid-type]
        """Keeps no second copy of the weights: only the one in turn is float32 for a moment."""

        def update_step(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
            if p.dtype != torch.bfloat16:
                super().update_step(group, p, gindex, pindex)
                return
            gradient, p.grad = p.grad, None
            p.data = p.data.float()
            p.grad = None if gradient is None else gradient.float()
            super().update_step(group, p, gindex, pindex)
            p.grad = None
            number = (gindex << 32) + pindex
            p.data = _Rounding(seed, int(self.state[p]["step"]), number, p.device)(p.data)
            p.grad = gradient

    return Rounded

"""Fused forwards for RMS norms and gated MLPs on GPUs, where memory traffic costs as much time as the matrix products.

A module is replaced only if its parameters and children have the names of such a layer, and the fused forward gives the
same output as the module's own on random numbers, compared when the model is loaded. Class names are not used.
"""

from collections.abc import Callable
from functools import lru_cache
from inspect import signature
from types import MethodType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpoctl import console
from dpoctl.model.lazy_weights import is_lazy, whole

# Allowed rounding error of one operation, relative to the largest number of a row.
_ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
# Scales of the random rows that are compared; the smallest makes a wrong epsilon visible.
_SCALES = (1e-3, 0.1, 1.0, 5.0)
_EPSILONS = ("variance_epsilon", "eps")
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

Backward = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Verdict = Callable[[nn.Module, Callable[[Any, Tensor], Tensor], torch.dtype], bool]


def fuse_layers(model: nn.Module, dtype: torch.dtype, *, compiled: bool = False) -> int:
    """Replace the forwards of RMS norms and gated MLPs by fused ones.

    Args:
        model: on its device, adapters injected.
        dtype: of the computation.
        compiled: compile `silu(gate) * up` for the model's device, which takes some seconds.

    Returns:
        The number of modules whose forward was replaced.
    """
    device = next(parameter.device for parameter in model.parameters() if not is_lazy(parameter))
    return fuse_layers_by(model, dtype, agrees_on_random_rows, _compiled_product(device) if compiled else _EAGER)


def fuse_layers_by(model: nn.Module, dtype: torch.dtype, agrees: Verdict, product: "GatedProduct") -> int:
    """Replace the forwards that a comparison accepts.

    Args:
        model: adapters injected.
        dtype: of the computation.
        agrees: whether a module and its fused forward give the same output in a precision.
        product: computes `silu(gate) * up`.

    Returns:
        The number of modules whose forward was replaced.
    """
    verdicts: dict[object, bool] = {}
    fused = 0
    for module in model.modules():
        if "forward" in vars(module) or len(signature(module.forward).parameters) != 1:
            continue
        replacement = _rms_norm_forward(module) or _gated_mlp_forward(module, product)
        if replacement is None:
            continue
        # Of layers that are alike, only one is read from the file for this.
        kind = repr(module) if any(map(is_lazy, module.parameters())) else id(module)
        if kind not in verdicts:
            with whole(module):
                verdicts[kind] = agrees(module, replacement, dtype)
        if verdicts[kind]:
            vars(module)["forward"] = MethodType(replacement, module)
            fused += 1
    return fused


def _rms_norm_forward(module: nn.Module) -> Callable[[Any, Tensor], Tensor] | None:
    """Return a fused forward if the module has one weight `[d]` and an epsilon, as an RMS norm does."""
    epsilon = next((vars(module)[name] for name in _EPSILONS if isinstance(vars(module).get(name), float)), None)
    parameters = dict(module.named_parameters(recurse=False))
    if epsilon is None or parameters.keys() != {"weight"} or parameters["weight"].ndim != 1:
        return None

    def forward(self: Any, x: Tensor) -> Tensor:
        # Autocast would cast input and output to float32; the kernel itself sums in float32.
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), epsilon)

    return forward


def _gated_mlp_forward(module: nn.Module, product: "GatedProduct") -> Callable[[Any, Tensor], Tensor] | None:
    """Return a fused forward `down(silu(gate(x)) * up(x))` if the module has the children of a gated MLP."""
    children = dict(module.named_children()).keys()
    # A further child, such as dropout, makes it another function.
    if not children >= set(_PROJECTIONS) or not children <= {*_PROJECTIONS, "act_fn"}:
        return None

    def forward(self: Any, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(product(self.gate_proj(x), self.up_proj(x)))
        return out

    return forward


class GatedProduct:
    """`silu(gate) * up`, which keeps only gate and up for the backward.

    Args:
        forward: `(gate, up)` to the product.
        backward: `(upstream, gate, up)` to the gradients of gate and up.
    """

    def __init__(self, forward: Callable[[Tensor, Tensor], Tensor], backward: Backward) -> None:
        self.forward, self.backward = forward, backward

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return the product, in the shape of `up`."""
        # Flattened, so that a compiled kernel has one dynamic size instead of several.
        flat: Tensor = cast(Any, _GatedProductFunction).apply(gate.reshape(-1), up.reshape(-1), self)
        return flat.view(up.shape)


class _GatedProductFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, product: GatedProduct) -> Tensor:
        ctx.product = product
        ctx.save_for_backward(gate, up)
        return product.forward(gate.detach(), up.detach())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        return *ctx.product.backward(upstream, *ctx.saved_tensors), None


def _gated_product(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _gated_product_gradients(upstream: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    gate_gradient: Tensor = torch.ops.aten.silu_backward(upstream * up, gate)
    return gate_gradient, upstream * F.silu(gate)


_EAGER = GatedProduct(_gated_product, _gated_product_gradients)


@lru_cache(maxsize=1)
def _compiled_product(device: torch.device) -> GatedProduct:
    """Compile the product and its gradients; without a working compiler, return the eager product."""
    product = GatedProduct(
        torch.compile(_gated_product, dynamic=True), torch.compile(_gated_product_gradients, dynamic=True)
    )
    try:
        sample = torch.ones(64, device=device, dtype=torch.bfloat16)
        product.backward(product.forward(sample, sample), sample, sample)
    except Exception as error:  # a compiler can fail with any error, and none of them may end a run
        console.note(f"gated MLPs are not compiled, which is slower: the compiler failed ({type(error).__name__})")
        return _EAGER
    return product


@torch.no_grad()
def agrees_on_random_rows(module: nn.Module, replacement: Callable[[Any, Tensor], Tensor], dtype: torch.dtype) -> bool:
    """Whether a fused forward gives the module's own output on random rows of several scales."""
    weight = next(module.parameters())
    width = weight.shape[-1] if weight.ndim == 1 else cast(int, cast(Any, module).gate_proj.in_features)
    generator = torch.Generator().manual_seed(0)
    # The mean is not zero, or a norm that subtracts the mean would pass.
    rows = (torch.randn(len(_SCALES), width, generator=generator) + 1) * torch.tensor(_SCALES)[:, None]
    rows = rows[None].to(weight.device, dtype)
    with torch.autocast(weight.device.type, dtype, enabled=dtype != torch.float32):
        try:
            true, ours = module(rows), replacement(module, rows)
        except (RuntimeError, TypeError, ValueError, AttributeError):
            return False
    if not isinstance(true, Tensor) or true.shape != ours.shape:
        return False
    errors = (ours.float() - true.float()).abs().amax(-1)
    return bool((errors <= _ROUNDING[dtype] * true.float().abs().amax(-1)).all())

"""Fused norms and gated MLPs give the numbers of the modules' own code; modules with other equations are not fused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpoctl.model.fused_layers import fuse_layers
from dpoctl.model.modules import keep_activations_in


def fused_names(model: nn.Module) -> set[str]:
    return {type(module).__name__ for module in model.modules() if "forward" in vars(module)}


def gradients(model: Any, dtype: torch.dtype) -> list[Tensor]:
    model.zero_grad()
    ids = torch.arange(4, 40)[None]
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        logits = model(input_ids=ids).logits
    logits.float().log_softmax(-1)[0, :, 7].sum().backward()
    return [logits.detach().float(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize(
    ("kind", "dtype", "compiled"),
    [(kind, dtype, False) for kind in ("llama", "mistral", "qwen3") for dtype in (torch.float32, torch.bfloat16)]
    + [("llama", torch.float32, True)],
)
@pytest.mark.filterwarnings("ignore")
def test_values_and_gradients_are_those_of_the_modules(
    tiny_model: Any, kind: str, dtype: torch.dtype, compiled: bool
) -> None:
    model = tiny_model(kind)
    if dtype == torch.bfloat16:
        keep_activations_in(model, dtype)
    own = gradients(model, dtype)
    layers = model.config.num_hidden_layers
    norms = {"llama": 2, "mistral": 2, "qwen3": 4}[kind]
    assert fuse_layers(model, dtype, compiled=compiled) == layers * (norms + 1) + 1
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for ours, true in zip(gradients(model, dtype), own, strict=True):
        assert float((ours - true).norm()) <= tolerance * float(true.norm())


def test_norms_and_mlps_of_gemma_are_not_fused(tiny_model: Any) -> None:
    """Gemma adds one to the weight of a norm, and has another activation in its MLP."""
    model = tiny_model("gemma3_text")
    assert fuse_layers(model, torch.float32) == 0
    assert not fused_names(model)


class MeanNorm(nn.Module):
    """A norm that subtracts the mean, with the attribute names of an RMS norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(width)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], self.weight, None, self.variance_epsilon)


class OddEpsilon(MeanNorm):
    """A norm with its epsilon outside the root."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + 1e-3)


class DroppingMlp(nn.Module):
    """A gated MLP with dropout at its end, which has no effect in eval mode."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(width, width) for _ in range(3))
        self.act_fn, self.dropout = nn.SiLU(), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dropout(self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))
        return out


class GatedNorm(nn.Module):
    """A norm with a gate as a second argument, as in state-space layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(width)), 1e-6

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        out = nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)
        return out if gate is None else out * gate


@pytest.mark.parametrize("module", [MeanNorm, OddEpsilon, DroppingMlp, GatedNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modules_with_the_same_names_but_other_equations_are_not_fused(module: Any, dtype: torch.dtype) -> None:
    own = module(512).eval().to(dtype)
    assert fuse_layers(nn.Sequential(own), dtype) == 0


def test_only_gate_and_up_are_kept_for_the_backward(tiny_llama: PreTrainedModel) -> None:
    mlp: Any = tiny_llama.model.layers[0].mlp
    fuse_layers(mlp, torch.float32)
    kept: list[Tensor] = []
    x = torch.randn(1, 5, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        mlp(x)
    assert sum(t.numel() == 5 * 96 for t in {t.data_ptr(): t for t in kept}.values()) == 3

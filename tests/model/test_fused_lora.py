"""Fused LoRA gives the numbers of peft; layers that are not plain LoRA run peft's forward."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from flops import counted
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from dpoctl.model import fused_lora
from dpoctl.model.fused_lora import fuse_lora


class TwoLayers(nn.Module):
    """Two layers with the same input."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 20, bias=bias), nn.Linear(12, 20, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) * torch.tanh(self.two(x))


def adapted(*, bias: bool = True, **config: Any) -> PeftModel:
    torch.manual_seed(0)
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["one", "two"], "init_lora_weights": False}
    return get_peft_model(TwoLayers(bias), LoraConfig(**settings | config))  # type: ignore[arg-type]


def gradients(model: PeftModel, x: Tensor) -> list[Tensor]:
    """Return the output, and the gradients of the input and of the trained parameters."""
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    out = model(leaf)
    out.float().square().sum().backward()
    assert leaf.grad is not None
    return [out.detach(), leaf.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_same_as_peft(model: Any, x: Tensor) -> None:
    theirs = gradients(model, x)
    fuse_lora(model)
    ours = gradients(model, x)
    assert len(ours) == len(theirs) == 6
    for mine, true in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("config", [{}, {"use_rslora": True, "r": 4}], ids=["usual", "rank-stabilised"])
def test_output_and_gradients_are_those_of_peft(bias: bool, config: dict[str, Any]) -> None:
    model, x = adapted(bias=bias, **config).double(), torch.randn(2, 7, 12, dtype=torch.float64)
    assert_same_as_peft(model, x)


def test_two_active_adapters_are_added_as_in_peft() -> None:
    model, x = adapted().double(), torch.randn(7, 12, dtype=torch.float64)
    model.add_adapter("frozen", LoraConfig(r=2, target_modules=["one", "two"], init_lora_weights=False))
    tuner: Any = model.double().base_model
    tuner.set_adapter(["frozen", "default"])
    tuner.set_requires_grad("frozen", False)
    assert_same_as_peft(model, x)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="the quant extra is not installed")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bias", [False, True])
def test_over_quantised_layers_values_and_gradients_are_those_of_peft(bits: int, bias: bool) -> None:
    """In float32: to a millionth of their norm."""
    model, x = quantised(bits, bias), torch.randn(3, 7, 64)
    theirs = gradients(model, x)
    fuse_lora(model)
    ours = gradients(model, x)
    assert len(ours) == len(theirs) == 6
    for mine, true in zip(ours, theirs, strict=True):
        assert float((mine - true).norm()) <= 1e-6 * float(true.norm())


def quantised(bits: int, bias: bool) -> PeftModel:
    """Two wider layers, their weights in a few bits."""
    from bitsandbytes import nn as packed

    from dpoctl.model.quantize import prepare_quantised_layers

    torch.manual_seed(0)
    model = TwoLayers(bias)
    for name in ("one", "two"):
        plain = nn.Linear(64, 48, bias=bias)
        layer: Any = (
            packed.Linear4bit(64, 48, bias=bias, compute_dtype=torch.float32, quant_type="nf4")
            if bits == 4
            else packed.Linear8bitLt(64, 48, bias=bias, has_fp16_weights=False, threshold=6.0)
        )
        layer.load_state_dict(plain.state_dict())
        setattr(model, name, layer.to("cpu"))
    setattr(model, f"is_loaded_in_{bits}bit", True)
    prepare_quantised_layers(model)
    return get_peft_model(
        model,  # type: ignore[arg-type]
        LoraConfig(r=3, lora_alpha=5, target_modules=["one", "two"], init_lora_weights=False),
    )


def test_under_autocast_no_input_is_copied_to_float32() -> None:
    model, x = adapted(), torch.randn(64, 12, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        theirs = gradients(model, x)
    kept: list[Tensor] = []
    fuse_lora(model)
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),  # type: ignore[func-returns-value]
        torch.autocast("cpu", torch.bfloat16),
    ):
        ours = gradients(model, x)
    wide = [t for t in kept if t.dtype == torch.float32 and t.numel() >= x.numel()]
    assert not [t for t in wide if t.shape == x.shape]
    for mine, true in zip(ours, theirs, strict=True):
        assert mine.dtype == true.dtype
        assert float((mine.float() - true.float()).norm() / true.float().norm()) < 2e-2


def test_layers_with_the_same_input_keep_it_once() -> None:
    model, x = adapted(), torch.randn(7, 12)
    fuse_lora(model)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        model(x)
    assert len({t.data_ptr() for t in kept if t.shape == x.shape}) == 1


def test_an_adapter_of_zero_changes_no_bit() -> None:
    model, x = adapted(init_lora_weights=True), torch.randn(7, 12)
    fuse_lora(model)
    with model.disable_adapter():
        base = model(x)
    assert torch.equal(model(x), base)


def test_the_peak_of_memory_is_lower_than_with_peft() -> None:
    model, x = adapted(), torch.randn(4096, 12, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        with counted() as theirs:
            gradients(model, x)
        fuse_lora(model)
        with counted() as ours:
            gradients(model, x)
    assert ours.flops == theirs.flops
    assert ours.peak_bytes < theirs.peak_bytes


@pytest.mark.parametrize("change", ["dropout", "dora", "disabled", "merged", "trained base"])
def test_layers_that_are_not_plain_run_the_forward_of_peft(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config: dict[str, Any] = {"dropout": {"lora_dropout": 0.5}, "dora": {"use_dora": True}}.get(change, {})
    model, x = adapted(**config), torch.randn(5, 12)
    tuner: Any = model.base_model
    if change == "disabled":
        tuner.disable_adapter_layers()
    elif change == "merged":
        tuner.merge_adapter()
    elif change == "trained base":
        model.requires_grad_(True)
    model.train(change == "dropout")
    torch.manual_seed(1)
    theirs = model(x)
    fuse_lora(model)
    monkeypatch.setattr(fused_lora, "_Lora", None)
    torch.manual_seed(1)
    assert torch.equal(model(x), theirs)

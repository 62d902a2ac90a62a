"""Plain LoRA in one step is peft's LoRA; what is not plain is left to peft."""

from typing import Any

import pytest
import torch
from flops import counted
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from dpoctl.model import plain_lora
from dpoctl.model.plain_lora import use_plain_lora


class Two(nn.Module):
    """Two layers that share an input."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 20, bias=bias), nn.Linear(12, 20, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) * torch.tanh(self.two(x))


def adapted(*, bias: bool = True, **config: Any) -> PeftModel:
    torch.manual_seed(0)
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["one", "two"], "init_lora_weights": False}
    return get_peft_model(Two(bias), LoraConfig(**settings | config))  # type: ignore[arg-type]


def pull(model: PeftModel, x: Tensor) -> list[Tensor]:
    """Output, and the gradients of the input and of what is trained."""
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    out = model(leaf)
    out.float().square().sum().backward()
    assert leaf.grad is not None
    return [out.detach(), leaf.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_output_and_gradients_stay(model: Any, x: Tensor) -> None:
    theirs = pull(model, x)
    use_plain_lora(model)
    ours = pull(model, x)
    assert len(ours) == len(theirs) == 6
    for mine, true in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("config", [{}, {"use_rslora": True, "r": 4}], ids=["usual", "rank-stabilised"])
def test_output_and_gradients_are_peft_s(bias: bool, config: dict[str, Any]) -> None:
    model, x = adapted(bias=bias, **config).double(), torch.randn(2, 7, 12, dtype=torch.float64)
    assert_output_and_gradients_stay(model, x)


def test_two_adapters_at_once_add_up_as_peft_s_do() -> None:
    model, x = adapted().double(), torch.randn(7, 12, dtype=torch.float64)
    model.add_adapter("frozen", LoraConfig(r=2, target_modules=["one", "two"], init_lora_weights=False))
    tuner: Any = model.double().base_model
    tuner.set_adapter(["frozen", "default"])
    tuner.set_requires_grad("frozen", False)
    assert_output_and_gradients_stay(model, x)


def test_under_autocast_no_input_is_copied_to_float32() -> None:
    model, x = adapted(), torch.randn(64, 12, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        theirs = pull(model, x)
    kept: list[Tensor] = []
    use_plain_lora(model)
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),  # type: ignore[func-returns-value]
        torch.autocast("cpu", torch.bfloat16),
    ):
        ours = pull(model, x)
    wide = [t for t in kept if t.dtype == torch.float32 and t.numel() >= x.numel()]
    assert not [t for t in wide if t.shape == x.shape]
    for mine, true in zip(ours, theirs, strict=True):
        assert mine.dtype == true.dtype
        assert float((mine.float() - true.float()).norm() / true.float().norm()) < 2e-2


def test_layers_that_share_an_input_keep_it_once() -> None:
    model, x = adapted(), torch.randn(7, 12)
    use_plain_lora(model)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        model(x)
    assert len({t.data_ptr() for t in kept if t.shape == x.shape}) == 1


def test_an_adapter_that_is_zero_changes_no_bit() -> None:
    model, x = adapted(init_lora_weights=True), torch.randn(7, 12)
    use_plain_lora(model)
    with model.disable_adapter():
        base = model(x)
    assert torch.equal(model(x), base)


def test_fewer_bytes_are_alive_than_with_peft_s_copies() -> None:
    model, x = adapted(), torch.randn(4096, 12, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        with counted() as theirs:
            pull(model, x)
        use_plain_lora(model)
        with counted() as ours:
            pull(model, x)
    assert ours.flops == theirs.flops
    assert ours.peak_bytes < theirs.peak_bytes


@pytest.mark.parametrize("change", ["dropout", "dora", "disabled", "merged", "trained base"])
def test_what_is_not_plain_is_left_to_peft(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
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
    use_plain_lora(model)
    monkeypatch.setattr(plain_lora, "_PlainLora", None)
    torch.manual_seed(1)
    assert torch.equal(model(x), theirs)

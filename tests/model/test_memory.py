"""Gradient checkpointing changes no gradient, and the estimate of its memory fits measurements."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_samples import IDS
from transformers import AutoConfig

from dpoctl.model.memory import activation_bytes_per_token, checkpointing_choices, set_gradient_checkpointing
from dpoctl.model.policy import Policy


def gradients(policy: Policy) -> dict[str, torch.Tensor]:
    policy.model.train()
    policy.model.zero_grad()
    policy.causal(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in policy.causal.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_gradients_are_the_same_when_layers_are_recomputed(
    save_base: Any, make_recipe: Any, load: Callable[..., Policy], model_type: str, lora: dict[str, Any] | None
) -> None:
    save_base(model_type)
    policy = load(make_recipe(**({} if lora is None else {"lora": lora})))
    calls: list[str] = []
    norm = next(
        m for name, m in policy.causal.named_modules() if name.endswith(("layers.0.input_layernorm", "h.0.ln_1"))
    )
    norm.register_forward_hook(lambda *_: calls.append("norm"))
    usual = gradients(policy)
    assert len(calls) == 1
    set_gradient_checkpointing(policy.causal, 1)
    recomputed = gradients(policy)
    assert len(calls) == 3
    assert usual.keys() == recomputed.keys()
    assert all(torch.equal(usual[name], recomputed[name]) for name in usual)
    set_gradient_checkpointing(policy.causal, 0)
    gradients(policy)
    assert len(calls) == 4


def test_the_estimate_for_llama_3_8b_is_that_of_the_measurement() -> None:
    config = AutoConfig.for_model("llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32)
    assert activation_bytes_per_token(config, torch.bfloat16, every_n_layers=0) / 2**20 == pytest.approx(7.5, rel=0.02)
    assert activation_bytes_per_token(config, torch.bfloat16, every_n_layers=1) / 2**20 == pytest.approx(0.48, rel=0.05)


def test_the_estimate_for_gpt2_uses_its_own_key_names() -> None:
    gpt2 = AutoConfig.for_model("gpt2", n_embd=64, n_layer=3)
    assert activation_bytes_per_token(gpt2, torch.float32, every_n_layers=0) == 3 * (4 * (4 * 256 + 8 * 64) + 16 * 64)


def test_every_second_layer_is_recomputed_and_gradients_are_the_same(
    save_base: Any, make_recipe: Any, load: Callable[..., Policy]
) -> None:
    if 2 not in checkpointing_choices():
        pytest.skip("this release of transformers recomputes all layers or none")
    save_base("llama", num_hidden_layers=4)
    policy = load(make_recipe())
    calls: list[int] = []
    for number, layer in enumerate(policy.causal.model.layers):
        layer.input_layernorm.register_forward_hook(lambda *_, number=number: calls.append(number))
    usual = gradients(policy)
    calls.clear()
    set_gradient_checkpointing(policy.causal, 2)
    recomputed = gradients(policy)
    recomputed_layers = [number for number in range(4) if calls.count(number) == 2]
    assert len(recomputed_layers) == 2
    assert len(calls) == 6
    assert all(torch.equal(usual[name], recomputed[name]) for name in usual)


def test_the_estimate_falls_with_every_choice() -> None:
    config = AutoConfig.for_model("llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32)
    estimates = [activation_bytes_per_token(config, torch.bfloat16, every) for every in (0, 4, 2, 1)]
    assert estimates == sorted(estimates, reverse=True)
    assert estimates[2] / estimates[0] == pytest.approx(0.55, abs=0.03)

"""Dropout is off in every form, or on because it was asked for."""

import json
from collections.abc import Callable
from typing import Any

import torch
from model_samples import logits
from torch import nn

from dpoctl.model.policy import Policy


def test_dropout_is_off_in_train_mode(save_base: Any, make_recipe: Any, load: Callable[..., Policy]) -> None:
    for model_type, rates in {
        "llama": {"attention_dropout": 0.5},
        "gpt2": {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5},
        "mixtral": {"attention_dropout": 0.5, "router_jitter_noise": 0.5},
    }.items():
        save_base(model_type, **rates)
        lora = {"r": 4} if model_type == "mixtral" else {"r": 4, "lora_dropout": 0.05}
        policy = load(make_recipe(lora=lora))
        calm = logits(policy.causal)
        policy.model.train()
        assert torch.equal(logits(policy.causal), calm)
        assert all(m.p == 0 for m in policy.model.modules() if isinstance(m, nn.Dropout))
        assert dict(policy.original_config).items() >= rates.items()


def test_an_adapters_own_rate_without_effect_is_said(
    save_base: Any, save_sft: Any, make_recipe: Any, load: Callable[..., Policy], said: Callable[[], str]
) -> None:
    save_base("llama")
    folder = save_sft()
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_dropout": 0.05}))
    load(make_recipe(folder, lora={"start": "continue"}))
    assert "the adapter's own lora_dropout 0.05 has no effect" in said()


def test_dropout_that_is_asked_for_acts_on_the_policy_and_never_on_the_reference(
    save_base: Any, make_recipe: Any, load: Callable[..., Policy], said: Callable[[], str]
) -> None:
    base = save_base("llama", attention_dropout=0.5)
    policy = load(make_recipe(model={"disable_dropout": False}, lora={"r": 4, "lora_dropout": 0.05}))
    policy.model.train()
    assert not torch.equal(logits(policy.causal), logits(policy.causal))
    with policy.reference():
        assert torch.equal(logits(policy.causal), logits(base.eval()))
    assert "no effect" not in said()

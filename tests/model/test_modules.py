"""Dropout is off by default, and acts on the policy only if it is enabled."""

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
        expected = logits(policy.causal)
        policy.model.train()
        assert torch.equal(logits(policy.causal), expected)
        assert all(m.p == 0 for m in policy.model.modules() if isinstance(m, nn.Dropout))
        assert dict(policy.original_config).items() >= rates.items()


def test_a_note_says_that_the_dropout_of_an_adapter_has_no_effect(
    save_base: Any, save_sft: Any, make_recipe: Any, load: Callable[..., Policy], stderr: Callable[[], str]
) -> None:
    save_base("llama")
    folder = save_sft()
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_dropout": 0.05}))
    load(make_recipe(folder, lora={"start": "continue"}))
    assert "the adapter's own lora_dropout 0.05 has no effect: model.disable_dropout is true" in stderr()


def test_enabled_dropout_acts_on_the_policy_and_not_on_the_reference(
    save_base: Any, make_recipe: Any, load: Callable[..., Policy], stderr: Callable[[], str]
) -> None:
    base = save_base("llama", attention_dropout=0.5)
    policy = load(make_recipe(model={"disable_dropout": False}, lora={"r": 4, "lora_dropout": 0.05}))
    policy.model.train()
    assert not torch.equal(logits(policy.causal), logits(policy.causal))
    with policy.reference():
        assert torch.equal(logits(policy.causal), logits(base.eval()))
    assert "no effect" not in stderr()

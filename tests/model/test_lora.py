"""Targets that do not exist are named, and adapters that are more than plain LoRA are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_samples import logits
from safetensors.torch import load_file, save_file

from dpoctl.errors import SetupError, UsageError, UserError
from dpoctl.model.lora import unmatched_targets
from dpoctl.model.modules import linear_layers
from dpoctl.model.policy import Policy


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_targets_that_match_no_module_are_found(save_base: Any, make_recipe: Any, load: Callable[..., Policy]) -> None:
    save_base("llama")
    recipe = make_recipe(lora={"target_modules": ["q_proj", "w1", "w2"]})
    policy = load(recipe)
    assert unmatched_targets(policy.causal, recipe.lora) == ("w1", "w2")
    assert linear_layers(policy.causal)[:2] == ("down_proj", "gate_proj")
    assert all("q_proj" in name for name in policy.trainable_state())


def test_targets_of_which_none_matches_are_refused_with_the_names_of_linear_layers(
    save_base: Any, make_recipe: Any, load: Callable[..., Policy]
) -> None:
    save_base("gpt2")
    with pytest.raises(UsageError) as refusal:
        load(make_recipe(lora={"target_modules": ["w1", "w2"]}))
    assert str(refusal.value) == (
        "lora.target_modules: no module of this model matches w1, w2; its linear layers are c_attn, c_fc, c_proj"
    )


def test_the_old_names_of_fused_experts_are_accepted(
    save_base: Any, make_recipe: Any, load: Callable[..., Policy]
) -> None:
    save_base("mixtral")
    recipe = make_recipe(lora={"target_modules": ["q_proj", "w1", "w2", "w3", "up_proj"]})
    policy = load(recipe)
    assert any("experts" in name for name in policy.trainable_state())
    assert unmatched_targets(policy.causal, recipe.lora) == ("up_proj",)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"target_modules": ".*w[12]"}, "lora.target_modules: no module of this model matches"),
        ({"layers_to_transform": [0, 7]}, "layers_to_transform: there is no adapted module in layer 7; from 0 to"),
        (
            {"rank_pattern": {"w1": 2}},
            "lora.rank_pattern: no adapted module matches 'w1'; the adapted modules are",
        ),
        ({"modules_to_save": ["head"]}, "lora.modules_to_save: this model has no module 'head'; its linear layers are"),
        ({"target_modules": ["mlp"]}, "lora: Target module"),
        ({"target_modules": ["lm_head"], "modules_to_save": ["lm_head"]}, "no module of this model matches lm_head"),
    ],
)
def test_a_module_that_cannot_be_adapted_is_refused_in_one_line(
    save_base: Any, make_recipe: Any, load: Callable[..., Policy], lora: dict[str, Any], message: str
) -> None:
    save_base("llama")
    with pytest.raises(UsageError, match=message) as caught:
        load(make_recipe(lora=lora))
    assert "\n" not in str(caught.value)


def test_the_same_seed_gives_the_same_adapter_whatever_ran_before(
    save_base: Any, make_recipe: Any, load: Callable[..., Policy]
) -> None:
    save_base("llama")
    one = load(make_recipe(lora={"r": 4})).trainable_state()
    torch.rand(3)
    before = torch.get_rng_state()
    two = load(make_recipe(lora={"r": 4})).trainable_state()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], two[name]) for name in one)
    three = load(make_recipe(lora={"r": 4}, training={"seed": 7})).trainable_state()
    assert not all(torch.equal(one[name], three[name]) for name in one)


def test_a_note_says_that_tied_weights_are_trained_separately(
    save_base: Any, make_recipe: Any, load: Callable[..., Policy], stderr: Callable[[], str]
) -> None:
    save_base("llama", tie_word_embeddings=True)
    load(make_recipe(lora={"modules_to_save": ["lm_head"]}))
    assert "embedding and head are tied in this model: lm_head is trained separately" in stderr()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": "all"}, "more than plain LoRA (bias: all)"),
        ({"use_qalora": True, "lora_bias": True}, "more than plain LoRA (lora_bias: True, use_qalora: True)"),
        ({"init_lora_weights": "pissa"}, "more than plain LoRA (init_lora_weights: pissa)"),
        ({"trainable_token_indices": [1]}, "more than plain LoRA (trainable_token_indices: [1])"),
        ({"peft_type": "IA3"}, "has peft_type IA3, not LORA; merge it into its base model"),
        ({"r": 8}, "has rank 4 in adapter_model.safetensors, and r is 8 in adapter_config.json"),
        ({"target_modules": ["q_proj"]}, "does not fit its base model: only one of them has 'base_model.model."),
    ],
)
@pytest.mark.parametrize("start", ["new", "continue"])
def test_an_adapter_that_is_not_plain_lora_or_does_not_fit_is_refused(
    save_base: Any,
    save_sft: Any,
    make_recipe: Any,
    load: Callable[..., Policy],
    changes: dict[str, Any],
    message: str,
    start: str,
) -> None:
    save_base("llama")
    folder = save_sft()
    edit(folder, **changes)
    with pytest.raises(UserError) as caught:
        load(make_recipe(folder, lora={"start": start}))
    assert message in str(caught.value)


def test_base_weights_in_an_adapter_must_equal_those_of_the_base(
    save_base: Any, save_sft: Any, make_recipe: Any, load: Callable[..., Policy]
) -> None:
    base = save_base("llama")
    folder = save_sft()
    (folder / "model_manifest.json").unlink()
    weights = load_file(folder / "adapter_model.safetensors")
    embedding = base.model.embed_tokens.weight.detach().clone()
    key = "base_model.model.model.embed_tokens.weight"
    save_file({**weights, key: embedding}, folder / "adapter_model.safetensors")
    load(make_recipe(folder, lora={"start": "continue"}))
    save_file({**weights, key: embedding + 1}, folder / "adapter_model.safetensors")
    with pytest.raises(
        UsageError, match=r"replaces '.*embed_tokens.weight' of its base model; merge it into its base model$"
    ):
        load(make_recipe(folder, lora={"start": "continue"}))


def test_an_adapter_needs_its_base_and_its_safetensors(
    tmp_path: Path, save_base: Any, save_sft: Any, make_recipe: Any, load: Callable[..., Policy]
) -> None:
    save_base("llama")
    folder = save_sft()
    edit(folder, base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(SetupError, match=r"needs its base: .*gone"):
        load(make_recipe(folder, lora={"start": "new"}))
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(SetupError, match="pickled weights are never opened"):
        load(make_recipe(folder, lora={"start": "new"}))


def test_an_adapter_needs_a_lora_section_and_continue_needs_an_adapter(
    save_base: Any, save_sft: Any, make_recipe: Any, load: Callable[..., Policy]
) -> None:
    save_base("llama")
    with pytest.raises(UsageError, match=r"lora: \{start: continue\}"):
        load(make_recipe(save_sft()))
    with pytest.raises(UsageError, match=r"is not an adapter; set lora.start: new$"):
        load(make_recipe(lora={"start": "continue"}))


def test_a_module_that_the_sft_adapter_trained_whole_cannot_be_a_target(
    save_base: Any, save_sft: Any, make_recipe: Any, load: Callable[..., Policy]
) -> None:
    save_base("llama")
    folder = save_sft(modules_to_save=["lm_head"])
    with pytest.raises(
        UsageError,
        match=r"^lora.target_modules includes lm_head, which adapter .* trained whole; leave it out, or name it in",
    ):
        load(make_recipe(folder, lora={"start": "new", "target_modules": ["lm_head", "q_proj"]}))


def test_experts_can_be_trained_further_but_not_stacked(
    save_base: Any, save_sft: Any, make_recipe: Any, load: Callable[..., Policy]
) -> None:
    save_base("mixtral")
    folder = save_sft()
    policy = load(make_recipe(folder, lora={"start": "continue"}))
    first = logits(policy.causal)
    with policy.reference():
        assert torch.equal(logits(policy.causal), first)
    with pytest.raises(
        UsageError, match=r"cannot be joined, because one of them targets experts; set lora.start: continue, or"
    ):
        load(make_recipe(folder, lora={"start": "new", "target_modules": ["q_proj"]}))

"""What cannot be adapted is named; what would make the reference another function is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_samples import logits
from safetensors.torch import load_file, save_file

from dpoctl.errors import SetupError, UsageError
from dpoctl.model.lora import unmatched_targets
from dpoctl.model.modules import linear_layers
from dpoctl.model.policy import Policy


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_targets_that_match_nothing_are_told_from_those_that_do(
    save_base: Any, make_recipe: Any, load: Callable[..., Policy]
) -> None:
    save_base("llama")
    recipe = make_recipe(lora={"target_modules": ["q_proj", "w1", "w2"]})
    policy = load(recipe)
    assert unmatched_targets(policy.causal, recipe.lora) == ("w1", "w2")
    assert linear_layers(policy.causal)[:2] == ("down_proj", "gate_proj")
    assert all("q_proj" in name for name in policy.trainable_state())


def test_targets_that_all_match_nothing_are_refused_with_the_names_that_would_do(
    save_base: Any, make_recipe: Any, load: Callable[..., Policy]
) -> None:
    save_base("gpt2")
    with pytest.raises(UsageError, match=r"w1, w2; its linear layers are c_attn, c_fc, c_proj"):
        load(make_recipe(lora={"target_modules": ["w1", "w2"]}))


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
        ({"modules_to_save": ["head"]}, "'head' is no module of this model"),
        ({"target_modules": ["mlp"]}, "lora: Target module"),
        ({"target_modules": ["lm_head"], "modules_to_save": ["lm_head"]}, "lora.target_modules: nothing"),
    ],
)
def test_a_module_that_cannot_be_adapted_is_one_line(
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


def test_tied_ends_that_are_trained_apart_are_said_so(
    save_base: Any, make_recipe: Any, load: Callable[..., Policy], said: Callable[[], str]
) -> None:
    save_base("llama", tie_word_embeddings=True)
    load(make_recipe(lora={"modules_to_save": ["lm_head"]}))
    assert "lm_head gets weights of its own" in said()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": "all"}, "more than plain LoRA (bias: all)"),
        ({"use_dora": True, "lora_bias": True}, "more than plain LoRA (lora_bias: True, use_dora: True)"),
        ({"init_lora_weights": "pissa"}, "more than plain LoRA (init_lora_weights: pissa)"),
        ({"trainable_token_indices": [1]}, "more than plain LoRA (trainable_token_indices: [1])"),
        ({"peft_type": "IA3"}, "is IA3, not LORA"),
        ({"r": 8}, "does not fit its base model"),
        ({"target_modules": ["q_proj"]}, "does not fit its base model"),
    ],
)
@pytest.mark.parametrize("start", ["new", "continue"])
def test_an_adapter_that_is_not_what_it_seems_is_refused(
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
    with pytest.raises(UsageError) as caught:
        load(make_recipe(folder, lora={"start": start}))
    assert message in str(caught.value)


def test_an_adapter_that_carries_weights_of_the_base_must_carry_the_bases_own(
    save_base: Any, save_sft: Any, make_recipe: Any, load: Callable[..., Policy]
) -> None:
    base = save_base("llama")
    folder = save_sft()
    weights = load_file(folder / "adapter_model.safetensors")
    embedding = base.model.embed_tokens.weight.detach().clone()
    key = "base_model.model.model.embed_tokens.weight"
    save_file({**weights, key: embedding}, folder / "adapter_model.safetensors")
    load(make_recipe(folder, lora={"start": "continue"}))
    save_file({**weights, key: embedding + 1}, folder / "adapter_model.safetensors")
    with pytest.raises(UsageError, match=r"replaces .*embed_tokens"):
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
    with pytest.raises(UsageError, match="is not an adapter"):
        load(make_recipe(lora={"start": "continue"}))


def test_a_module_that_the_sft_adapter_trained_whole_cannot_be_a_target(
    save_base: Any, save_sft: Any, make_recipe: Any, load: Callable[..., Policy]
) -> None:
    save_base("llama")
    folder = save_sft(modules_to_save=["lm_head"])
    with pytest.raises(UsageError, match="includes lm_head"):
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
    with pytest.raises(UsageError, match="cannot be joined"):
        load(make_recipe(folder, lora={"start": "new", "target_modules": ["q_proj"]}))

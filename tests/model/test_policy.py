"""Policy and reference: one model, two functions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_samples import disturb, logits, reference_logits

from dpoctl.errors import RunError
from dpoctl.model.load import load_run
from dpoctl.model.policy import Policy

STARTS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4},
    "list": {"r": 4, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "head": {"r": 4, "target_modules": ["q_proj", "lm_head"]},
    "saved head": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved ends": {"r": 4, "modules_to_save": ["embed_tokens", "lm_head"]},
    "saved norm": {"r": 4, "modules_to_save": ["norm"]},
    "embedding": {"r": 4, "target_modules": ["embed_tokens", "q_proj"]},
}


@pytest.mark.parametrize("lora", STARTS.values(), ids=STARTS.keys())
@pytest.mark.parametrize("tied", [False, True])
def test_the_reference_is_the_starting_policy_whatever_was_trained(
    save_base: Any, make_recipe: Any, load: Callable[..., Policy], lora: dict[str, Any], tied: bool
) -> None:
    base = save_base("llama", tie_word_embeddings=tied)
    policy = load(make_recipe(lora=lora))
    start = logits(policy.causal)
    assert torch.equal(start, logits(base))
    disturb(policy)
    trained = logits(policy.causal)
    assert (trained - start).abs().max() > 0.1
    assert torch.equal(reference_logits(policy), start)
    assert torch.equal(logits(policy.causal), trained)


@pytest.mark.parametrize("start", ["new", "continue"])
@pytest.mark.parametrize("sft", [{}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "embed_tokens"]}])
def test_over_an_sft_adapter_the_reference_is_that_adapter(
    save_base: Any, save_sft: Any, make_recipe: Any, load: Callable[..., Policy], start: str, sft: dict[str, Any]
) -> None:
    base = save_base("llama")
    folder = save_sft(**sft)
    policy = load(make_recipe(folder, lora={"start": start}))
    first = logits(policy.causal)
    assert (first - logits(base)).abs().max() > 0.1
    assert torch.equal(reference_logits(policy), first)
    disturb(policy)
    assert (logits(policy.causal) - first).abs().max() > 0.1
    assert torch.equal(reference_logits(policy), first)


def test_a_new_adapter_may_save_modules_that_the_sft_adapter_saved_too(
    save_base: Any, save_sft: Any, make_recipe: Any, load: Callable[..., Policy]
) -> None:
    save_base("llama")
    folder = save_sft(modules_to_save=["lm_head"])
    policy = load(make_recipe(folder, lora={"start": "new", "modules_to_save": ["lm_head", "embed_tokens"]}))
    first = logits(policy.causal)
    disturb(policy)
    assert torch.equal(reference_logits(policy), first)


def test_only_the_new_adapter_is_trainable_and_in_float32(
    save_base: Any, save_sft: Any, make_recipe: Any, load: Callable[..., Policy]
) -> None:
    save_base("llama")
    recipe = make_recipe(save_sft(), model={"dtype": "bfloat16"}, lora={"start": "new"})
    policy = load(recipe)
    names = list(policy.trainable_state())
    assert names
    assert all(".default." in name for name in names)
    with policy.reference(), torch.autocast("cpu", torch.bfloat16):
        logits(policy.causal)
    assert list(policy.trainable_state()) == names
    for name, parameter in policy.causal.named_parameters():
        assert parameter.dtype == (torch.bfloat16 if ".lora_" not in name else torch.float32)


def test_in_bfloat16_policy_and_reference_agree_bit_for_bit_at_the_start(
    save_base: Any, make_recipe: Any, load: Callable[..., Policy]
) -> None:
    save_base("llama")
    policy = load(
        make_recipe(model={"dtype": "bfloat16"}, lora=STARTS["saved ends"] | {"target_modules": "all-linear"})
    )
    with torch.autocast("cpu", torch.bfloat16):
        first = logits(policy.causal)
    with policy.reference(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(policy.causal), first)
    with torch.autocast("cpu", torch.bfloat16):
        policy.causal(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()
    gradients = {name: p.grad for name, p in policy.causal.named_parameters() if p.requires_grad}
    assert all(gradient is not None and gradient.dtype == torch.float32 for gradient in gradients.values())


def test_gradients_flow_after_the_reference_was_computed_between_forward_and_backward(
    save_base: Any, make_recipe: Any, load: Callable[..., Policy]
) -> None:
    save_base("llama")
    policy = load(make_recipe(lora={"r": 4, "modules_to_save": ["lm_head"]}))
    disturb(policy)
    loss = policy.causal(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss
    reference_logits(policy)
    loss.backward()
    assert all(p.grad is not None for p in policy.causal.parameters() if p.requires_grad)


def test_the_mode_of_the_model_survives_the_reference_and_an_error_in_it(
    save_base: Any, make_recipe: Any, load: Callable[..., Policy]
) -> None:
    save_base("llama")
    policy = load(make_recipe(lora={"r": 4}))
    policy.model.train()
    disturb(policy)
    trained = logits(policy.causal)
    with policy.reference():
        assert not policy.causal.training
    assert policy.causal.training
    with pytest.raises(IndexError), policy.reference():
        logits(policy.causal, torch.tensor([[10**6]]))
    assert policy.causal.training
    assert torch.equal(logits(policy.causal), trained)


def test_a_model_trained_whole_has_no_live_reference(
    save_base: Any, make_recipe: Any, load: Callable[..., Policy]
) -> None:
    save_base("llama")
    policy = load(make_recipe())
    assert not policy.has_live_reference
    assert all(p.requires_grad and p.dtype == torch.float32 for p in policy.model.parameters())
    with pytest.raises(RunError, match="trained whole"), policy.reference():
        pass


def test_reference_tensors_do_not_depend_on_the_new_adapter_but_on_the_old_one(
    save_base: Any, save_sft: Any, make_recipe: Any, load: Callable[..., Policy]
) -> None:
    save_base("llama")
    folder = save_sft()
    one = load(make_recipe(folder, lora={"start": "new", "target_modules": ["q_proj"]}))
    other = load(make_recipe(folder, lora={"start": "new", "r": 2, "modules_to_save": ["lm_head"]}))
    disturb(other)
    first, second = dict(one.reference_tensors()), dict(other.reference_tensors())
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any("reference.scaling" in name for name in first)
    base = dict(load(make_recipe(lora={"r": 4})).reference_tensors())
    assert set(base) == {name for name in first if ".reference." not in name}


def test_trainable_state_round_trips_and_a_foreign_one_is_refused(
    save_base: Any, make_recipe: Any, load: Callable[..., Policy]
) -> None:
    save_base("llama")
    policy = load(make_recipe(lora={"r": 4, "modules_to_save": ["lm_head"]}))
    disturb(policy)
    state = {name: tensor.clone() for name, tensor in policy.trainable_state().items()}
    trained = logits(policy.causal)
    disturb(policy)
    policy.load_trainable_state(state)
    assert torch.equal(logits(policy.causal), trained)
    with pytest.raises(RunError, match="of another model"):
        policy.load_trainable_state({})
    with pytest.raises(RunError, match="of another model"):
        policy.load_trainable_state(state | {next(iter(state)): torch.zeros(1)})


def test_a_run_loads_again_as_it_was_trained(
    tmp_path: Path, save_base: Any, tokenizer: Any, make_recipe: Any, load: Callable[..., Policy]
) -> None:
    base = save_base("llama")
    for name, sections in {"whole": {}, "adapter": {"lora": {"r": 4}}}.items():
        policy = load(make_recipe(**sections))
        disturb(policy)
        policy.export(tmp_path / name, tokenizer)
        run = load_run(tmp_path / name, torch.device("cpu"), torch.float32)
        assert run.kind == policy.kind
        assert not run.trainable_state()
        assert torch.equal(logits(run.causal), logits(policy.causal))
    assert torch.equal(reference_logits(run), logits(base))

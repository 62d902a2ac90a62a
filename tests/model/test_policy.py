"""Policy and reference in one model, and snapshots of the trained parameters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_samples import disturb, logits, reference_logits

from dpoctl.errors import RunError
from dpoctl.model.export import export_model
from dpoctl.model.load import load_run
from dpoctl.model.policy import Policy, Snapshot

STARTS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4},
    "list": {"r": 4, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "head": {"r": 4, "target_modules": ["q_proj", "lm_head"]},
    "saved head": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved embedding and head": {"r": 4, "modules_to_save": ["embed_tokens", "lm_head"]},
    "saved norm": {"r": 4, "modules_to_save": ["norm"]},
    "embedding": {"r": 4, "target_modules": ["embed_tokens", "q_proj"]},
}


@pytest.mark.parametrize("lora", STARTS.values(), ids=STARTS.keys())
@pytest.mark.parametrize("tied", [False, True])
def test_the_reference_is_the_starting_policy_after_training(
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
        make_recipe(
            model={"dtype": "bfloat16"}, lora=STARTS["saved embedding and head"] | {"target_modules": "all-linear"}
        )
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


def test_mode_and_weights_are_restored_after_the_reference_and_after_an_error(
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
    with pytest.raises(RunError, match=r"^a model that is trained whole contains no reference$"), policy.reference():
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


def test_trainable_state_is_restored_and_that_of_another_model_is_refused(
    save_base: Any, make_recipe: Any, load: Callable[..., Policy]
) -> None:
    save_base("llama")
    policy = load(make_recipe(lora={"r": 4, "modules_to_save": ["lm_head"]}))
    disturb(policy)
    state = {name: tensor.clone() for name, tensor in policy.trainable_state().items()}
    trained = logits(policy.causal)
    disturb(policy)
    policy.load_state(state)
    assert torch.equal(logits(policy.causal), trained)
    first, message = next(iter(state)), "the checkpoint belongs to another model: "
    with pytest.raises(RunError, match=rf"^{message}only one of the two has '.*' \({len(state)} such weights\)$"):
        policy.load_state({})
    with pytest.raises(
        RunError, match=rf"^{message}'{first}' has shape \[1\] in the checkpoint and \[.*\] in the model$"
    ):
        policy.load_state(state | {first: torch.zeros(1)})


def test_a_finished_run_computes_as_it_was_trained(
    tmp_path: Path, save_base: Any, tokenizer: Any, make_recipe: Any, load: Callable[..., Policy]
) -> None:
    base = save_base("llama")
    for name, sections in {"whole": {}, "adapter": {"lora": {"r": 4}}}.items():
        policy = load(make_recipe(**sections))
        disturb(policy)
        export_model(policy, tmp_path / name, tokenizer)
        run = load_run(tmp_path / name, torch.device("cpu"), torch.float32)
        assert run.kind == policy.kind
        assert not run.trainable_state()
        assert torch.equal(logits(run.causal), logits(policy.causal))
    assert torch.equal(reference_logits(run), logits(base))


FLOAT32: dict[str, Any] = {"model": {"dtype": "float32"}}
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora": {"r": 4}},
    "lora with whole modules": {"lora": {"r": 4, "modules_to_save": ["lm_head", "embed_tokens"]}},
    "4 bits": {"lora": {"r": 4}, "quantization": {"load_in_4bit": True}},
}


def snapshot_logits(policy: Policy, snapshot: Snapshot) -> torch.Tensor:
    with snapshot.swapped_in():
        return logits(policy.causal)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_snapshot_computes_as_the_policy_did_and_restores_it(
    kind: str, tied: bool, save_base: Any, make_recipe: Any, load: Callable[..., Policy]
) -> None:
    save_base("llama", tie_word_embeddings=tied)
    policy = load(make_recipe(**FLOAT32, **KINDS[kind]))
    start, snapshot = logits(policy.causal), Snapshot(policy)
    disturb(policy)
    trained = logits(policy.causal)
    addresses = {name: tensor.data_ptr() for name, tensor in policy.trainable_state().items()}
    assert (trained - start).abs().max() > 0.05
    assert torch.equal(snapshot_logits(policy, snapshot), start)
    assert torch.equal(logits(policy.causal), trained)
    assert addresses == {name: tensor.data_ptr() for name, tensor in policy.trainable_state().items()}


@pytest.mark.parametrize("start", ["new", "continue"])
def test_over_an_sft_adapter_a_snapshot_starts_as_that_adapter(
    start: str, save_base: Any, save_sft: Any, make_recipe: Any, load: Callable[..., Policy]
) -> None:
    save_base("llama")
    policy = load(make_recipe(save_sft(), **FLOAT32, lora={"start": start}))
    first, snapshot = logits(policy.causal), Snapshot(policy)
    disturb(policy)
    with policy.reference():
        reference = logits(policy.causal)
    torch.testing.assert_close(snapshot_logits(policy, snapshot), reference, rtol=0, atol=1e-5)
    assert torch.equal(snapshot_logits(policy, snapshot), first)


def test_a_snapshot_moves_towards_the_policy(save_base: Any, make_recipe: Any, load: Callable[..., Policy]) -> None:
    save_base("llama")
    policy = load(make_recipe(**FLOAT32, lora={"r": 4}))
    snapshot = Snapshot(policy)
    before = {name: tensor.clone() for name, tensor in snapshot.state().items()}
    disturb(policy)
    snapshot.move(0.6)
    for name, tensor in policy.trainable_state().items():
        torch.testing.assert_close(snapshot.state()[name], 0.6 * tensor + 0.4 * before[name], rtol=1e-6, atol=1e-7)
    snapshot.move(1.0)
    assert torch.equal(snapshot_logits(policy, snapshot), logits(policy.causal))


def test_gradients_are_those_of_the_policy_when_a_snapshot_ran_before_backward(
    save_base: Any, make_recipe: Any, load: Callable[..., Policy]
) -> None:
    save_base("llama")
    policy = load(make_recipe(**FLOAT32))
    snapshot, ids = Snapshot(policy), torch.tensor([[5, 6, 7]])
    disturb(policy)

    def gradients(between: bool) -> list[torch.Tensor]:
        policy.model.zero_grad()
        loss = policy.causal(input_ids=ids, labels=ids).loss
        if between:
            snapshot_logits(policy, snapshot)
        loss.backward()
        return [p.grad.clone() for p in policy.causal.parameters() if p.grad is not None]

    assert all(torch.equal(one, two) for one, two in zip(gradients(False), gradients(True), strict=True))


def test_an_error_inside_restores_the_policy(save_base: Any, make_recipe: Any, load: Callable[..., Policy]) -> None:
    save_base("llama")
    policy = load(make_recipe(**FLOAT32))
    snapshot = Snapshot(policy)
    disturb(policy)
    trained = logits(policy.causal)
    with pytest.raises(IndexError), snapshot.swapped_in():
        logits(policy.causal, torch.tensor([[10**6]]))
    assert torch.equal(logits(policy.causal), trained)


def test_the_state_of_a_snapshot_is_restored_and_that_of_another_model_is_refused(
    save_base: Any, make_recipe: Any, load: Callable[..., Policy]
) -> None:
    save_base("llama")
    policy = load(make_recipe(**FLOAT32, lora={"r": 4}))
    snapshot = Snapshot(policy)
    disturb(policy)
    snapshot.move(0.5)
    moved, state = snapshot_logits(policy, snapshot), {n: t.clone() for n, t in snapshot.state().items()}
    snapshot.move(0.5)
    snapshot.load_state(state)
    assert torch.equal(snapshot_logits(policy, snapshot), moved)
    with pytest.raises(RunError, match=r"^the checkpoint belongs to another model: only one"):
        snapshot.load_state({})

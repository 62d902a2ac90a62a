"""A copy of what is trained, computed with and put away again."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_samples import disturb, logits

from dpoctl.errors import RunError
from dpoctl.model.policy import Policy
from dpoctl.model.snapshot import Snapshot

FLOAT32: dict[str, Any] = {"model": {"dtype": "float32"}}
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora": {"r": 4}},
    "lora with whole modules": {"lora": {"r": 4, "modules_to_save": ["lm_head", "embed_tokens"]}},
    "4 bits": {"lora": {"r": 4}, "quantization": {"load_in_4bit": True}},
}


def snapshot_logits(policy: Policy, snapshot: Snapshot) -> torch.Tensor:
    with snapshot.in_place():
        return logits(policy.causal)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_snapshot_computes_as_the_policy_did_and_leaves_it_as_it_is(
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


def test_it_moves_towards_the_policy_by_a_share(save_base: Any, make_recipe: Any, load: Callable[..., Policy]) -> None:
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


def test_an_error_inside_puts_the_policy_back(save_base: Any, make_recipe: Any, load: Callable[..., Policy]) -> None:
    save_base("llama")
    policy = load(make_recipe(**FLOAT32))
    snapshot = Snapshot(policy)
    disturb(policy)
    trained = logits(policy.causal)
    with pytest.raises(IndexError), snapshot.in_place():
        logits(policy.causal, torch.tensor([[10**6]]))
    assert torch.equal(logits(policy.causal), trained)


def test_its_state_comes_back_and_a_foreign_one_is_refused(
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
    with pytest.raises(RunError, match="no reference of this model"):
        snapshot.load_state({})

"""Sharing a prompt changes nothing: log-probabilities and gradients are those of separate padded rows."""

from collections.abc import Callable

import pytest
import torch
from memory_store import MemoryStore, by_hand, random_dialogue, random_pairs
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from dpoctl.core.batch import Batch
from dpoctl.core.collator import collate
from dpoctl.core.logps import Scorer
from dpoctl.data.tokenize import Example
from dpoctl.losses import Scores
from dpoctl.losses.pairwise import Sigmoid
from dpoctl.model.attention import Layout
from dpoctl.model.probe import ProbeResult, probe

ARCHITECTURES = ["llama", "mistral", "qwen3", "gemma3_text", "mixtral"]
Build = Callable[..., PreTrainedModel]


def run(model: PreTrainedModel, examples: list[Example], layout: Layout) -> tuple[Batch, torch.Tensor]:
    batch = collate(examples, layout, pad_token_id=3)
    return batch, batch.sum_per_response(Scorer(model, model, ProbeResult(layout, True, ""))(batch))


def gradients(model: PreTrainedModel, batch: Batch, logps: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    Sigmoid()(Scores(logps, batch.outline, torch.zeros_like(logps))).sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trained])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shared_layout_is_separate_rows(architecture: str, dtype: torch.dtype, tiny_model: Build) -> None:
    examples = random_pairs(5, seed=1)
    # RMSNorm, rotary tables and router softmax stay in float32 inside transformers, whatever the weights are.
    exact = dtype == torch.float64

    def build() -> PreTrainedModel:
        model = tiny_model(architecture).to(dtype)
        if exact and architecture == "mixtral":
            model.set_experts_implementation("eager")  # the grouped product knows no float64
        return model

    with torch.no_grad():
        truth = by_hand(build(), examples)
    results = {}
    for layout in ("shared", "padded"):
        model = build()
        batch, logps = run(model, examples, layout)
        assert relative(logps.detach(), truth) < (1e-6 if exact else 1e-5)
        assert float((logps.detach() - truth).abs().max() / truth.abs().max()) < 1e-5
        results[layout] = gradients(model, batch, logps)
    assert relative(results["shared"], results["padded"]) < (1e-6 if exact else 1e-5)


def test_float64_where_the_model_allows_it_is_exact_to_1e_9(tiny_model: Build) -> None:
    # GPT-2 computes in the dtype of its weights from end to end.
    examples, results, scored = random_pairs(6, seed=2), {}, {}
    for layout in ("shared", "padded"):
        model = tiny_model("gpt2", n_positions=512, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).double()
        batch, logps = run(model, examples, layout)
        scored[layout], results[layout] = logps.detach(), gradients(model, batch, logps)
    assert relative(scored["shared"], scored["padded"]) < 1e-12
    assert relative(results["shared"], results["padded"]) < 1e-9


def test_scores_of_conversations_cover_every_assistant_stretch(tiny_llama: PreTrainedModel) -> None:
    import numpy as np

    examples = [random_dialogue(np.random.default_rng(seed)) for seed in range(4)]
    with torch.no_grad():
        truth = by_hand(tiny_llama, examples)
        batch, logps = run(tiny_llama, examples, "shared")
    torch.testing.assert_close(logps, truth, rtol=1e-5, atol=1e-5)
    assert batch.outline.num_tokens.tolist() == MemoryStore(examples).num_tokens.tolist()


def test_long_rows_respect_a_sliding_window(tiny_model: Build) -> None:
    model, examples = tiny_model("mistral", sliding_window=5), random_pairs(4, seed=3)
    with torch.no_grad():
        truth = by_hand(model, examples)
        _, logps = run(model, examples, "shared")
        torch.testing.assert_close(logps, truth, rtol=1e-5, atol=1e-5)
        wider = by_hand(tiny_model("mistral", sliding_window=400), examples)
    assert (wider - truth).abs().max() > 1e-2, "the window must matter for this test to say anything"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_checkpointing_recomputes_the_same(checkpointing: bool, tiny_llama: PreTrainedModel) -> None:
    examples = random_pairs(3)
    plain = gradients(tiny_llama, *run(tiny_llama, examples, "shared"))
    tiny_llama.train()
    if checkpointing:
        tiny_llama.gradient_checkpointing_enable({"use_reentrant": False})
    assert torch.equal(gradients(tiny_llama, *run(tiny_llama, examples, "shared")), plain)


@pytest.mark.parametrize("targets", ["all-linear", ["lm_head"], ["q_proj", "lm_head"]])
def test_an_adapter_on_the_head_is_not_ignored(targets: str | list[str], tiny_llama: PreTrainedModel) -> None:
    peft_model = get_peft_model(tiny_llama, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    examples = random_pairs(3)
    causal = peft_model.get_base_model()
    with torch.no_grad():
        truth = by_hand(causal, examples)
        with peft_model.disable_adapter():
            base = by_hand(causal, examples)
    assert (truth - base).abs().max() > 1e-2
    verdict = probe(causal, max_length=64)
    assert (verdict.layout, verdict.own_head) == ("shared", True)
    batch = collate(examples, "shared")
    logps = batch.sum_per_response(Scorer(peft_model, causal, verdict)(batch))
    torch.testing.assert_close(logps.detach(), truth, rtol=1e-5, atol=1e-4)
    logps.sum().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in peft_model.parameters() if p.requires_grad)


def test_frozen_head_s_stored_gradient_is_autograd_s(
    tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpoctl.model import head, linear_head

    monkeypatch.setitem(linear_head.BLOCK, "cpu", (5, 100))
    hidden, targets = torch.randn(23, 64), torch.randint(0, 384, (23,))
    weights = torch.randn(23)

    def gradient(trainable: bool) -> torch.Tensor:
        tiny_llama.requires_grad_(trainable)
        leaf = hidden.clone().requires_grad_()
        (head.Head(tiny_llama).logps(leaf, targets) @ weights).backward()
        assert leaf.grad is not None
        return leaf.grad

    torch.testing.assert_close(gradient(False), gradient(True), rtol=1e-5, atol=1e-6)

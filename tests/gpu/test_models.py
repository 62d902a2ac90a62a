"""Whole models on the device: the layout that is chosen, the kernel that is taken, and how far apart two routes are."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import numpy as np
import pytest
import torch
from gpu_stage import Stage
from memory_store import random_pairs
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from dpoctl.core.collator import collate
from dpoctl.core.logps import Scorer, per_response
from dpoctl.model import attention_cuda
from dpoctl.model.fused_lora import fuse_lora
from dpoctl.model.lora import cast_trainable_to_float32
from dpoctl.model.memory import set_gradient_checkpointing
from dpoctl.model.modules import keep_activations_in
from dpoctl.model.policy import Policy
from dpoctl.model.probe import probe

pytestmark = pytest.mark.gpu


def with_lora(model: PreTrainedModel) -> torch.nn.Module:
    model.requires_grad_(False)
    adapted = get_peft_model(
        cast(Any, model), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    cast_trainable_to_float32(model, torch.bfloat16)
    fuse_lora(model)
    return adapted


def autocast(stage: Stage) -> AbstractContextManager[object]:
    return torch.autocast(stage.device.type, torch.bfloat16)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("shape", ["1b", "8b"])
def test_prompts_are_shared_and_nothing_leaks(stage: Stage, shape: str, kind: str) -> None:
    """The probe edits one answer's tokens: no other row may change by a bit."""
    model = stage.build(shape, torch.float32 if kind == "full" else torch.bfloat16)
    model.config.use_cache = False
    if kind == "lora":
        with_lora(model)
    else:
        keep_activations_in(model, torch.bfloat16)
    with autocast(stage):
        verdict = probe(model, max_length=2048)
    assert (verdict.layout, verdict.own_head) == ("shared", True), verdict.reason


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_layer_attends_in_one_kernel_call(stage: Stage, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_kernel_calls(monkeypatch)
    score(stage, stage.build("1b", torch.float32 if kind == "full" else torch.bfloat16), kind)
    layers = stage.config("1b").num_hidden_layers
    assert calls == ([] if stage.rehearsal else [torch.bfloat16] * layers)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_shared_rows_and_separate_rows_have_equal_gradients(stage: Stage, kind: str) -> None:
    """In float32, where only the route differs."""
    model = stage.build("1b", torch.float32, num_hidden_layers=4 if not stage.rehearsal else 2)
    found = [score(stage, model, kind, layout=layout, dtype=torch.float32) for layout in ("shared", "padded")]
    for ours, true in zip(*found, strict=True):
        assert float((ours - true).norm()) <= 2e-3 * float(true.norm())


def test_recomputed_layers_give_the_same_bits(stage: Stage) -> None:
    model = stage.build("1b", num_hidden_layers=4 if not stage.rehearsal else 2)
    adapted = with_lora(model)
    policy = Policy(model=adapted, causal=model, dtype=torch.bfloat16, kind="lora", active=("default",))
    plain = gradients(stage, adapted, model)
    set_gradient_checkpointing(policy.causal, 1)
    again = gradients(stage, adapted, model)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_the_head_agrees_with_the_model_s_logits(stage: Stage) -> None:
    model = stage.build("1b", num_hidden_layers=2)
    examples = random_pairs(4)
    batch = collate(examples, "padded").to(stage.device)
    with autocast(stage), torch.no_grad():
        ours = Scorer(model, model, verdict("padded"))(batch)
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.float()
    rows = logits.flatten(0, 1)[batch.score_pos].log_softmax(-1)
    true = rows.gather(-1, batch.score_tgt[:, None]).squeeze(-1)
    assert float((ours - true).abs().max()) < 0.05


def count_kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtypes of the queries of each call."""
    calls: list[torch.dtype] = []
    attend = attention_cuda.attend

    def watched(query: Tensor, *rest: Any, **options: Any) -> Tensor:
        calls.append(query.dtype)
        return attend(query, *rest, **options)

    monkeypatch.setattr(attention_cuda, "attend", watched)
    return calls


def verdict(layout: str) -> Any:
    from dpoctl.model.probe import ProbeResult

    return ProbeResult(cast(Any, layout), True, "")


def score(
    stage: Stage, model: PreTrainedModel, kind: str, *, layout: str = "shared", dtype: torch.dtype = torch.bfloat16
) -> list[Tensor]:
    """Log-probabilities of some pairs, and the gradients of their sum."""
    model.config.use_cache = False
    adapted: torch.nn.Module = model
    if kind == "lora" and not any("lora_" in name for name, _ in model.named_parameters()):
        adapted = with_lora(model)
    elif kind == "full" and dtype == torch.bfloat16:
        keep_activations_in(model, dtype)
    return gradients(stage, adapted, model, layout=layout, dtype=dtype)


def gradients(
    stage: Stage,
    model: torch.nn.Module,
    causal: PreTrainedModel,
    *,
    layout: str = "shared",
    dtype: torch.dtype = torch.bfloat16,
) -> list[Tensor]:
    examples = random_pairs(6)
    batch = collate(examples, cast(Any, layout)).to(stage.device)
    if layout == "padded":
        causal.set_attn_implementation("sdpa")
    scorer = Scorer(model, causal, verdict(layout)).train()
    model.zero_grad()
    with autocast(stage) if dtype == torch.bfloat16 else nullcontext():
        logps = per_response(batch, scorer(batch)).logps
    weights = torch.from_numpy(np.linspace(-1, 1, len(logps))).to(logps)
    (logps * weights).sum().backward()
    trained = [p.grad.detach().clone() for p in model.parameters() if p.grad is not None]
    return [logps.detach(), *trained]

"""The probe gives every known architecture its layout, results in it are exact, and broken attention is rejected."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, BY_TYPE, Architecture, table
from memory_store import random_pairs
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.models.qwen3_5 import modeling_qwen3_5

from dpoctl.core.collator import collate
from dpoctl.core.logps import Scorer
from dpoctl.data.tokenize import Example
from dpoctl.model import attention
from dpoctl.model.attention import Layout
from dpoctl.model.probe import ProbeResult, backbone, probe

Build = Callable[..., PreTrainedModel]
DOCS = Path(__file__).parents[2] / "docs" / "architectures.md"
EXAMPLES = random_pairs(4, seed=1)
WEIGHTS = torch.tensor([0.7, -1.3, 0.2, 1.1, -0.4, 0.9, -1.0, 0.5])


def responses(examples: list[Example]) -> list[tuple[Tensor, Tensor]]:
    """Return the tokens of each prompt with one response, and the flags of those that are scored."""
    return [
        (torch.tensor([*e.shared, *suffix]), torch.tensor([*e.shared_scored, *flags]))
        for e in examples
        for suffix, flags in zip(e.suffixes, e.suffixes_scored, strict=True)
    ]


def separate_logps(model: PreTrainedModel) -> Tensor:
    """Return the log-probability of every response under the unchanged model, one row at a time."""
    logps = []
    for ids, scored in responses(EXAMPLES):
        rows = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
        logps.append(rows.gather(1, ids[1:, None])[:, 0][scored[1:]].sum())
    return torch.stack(logps)


def layout_logps(model: PreTrainedModel, verdict: ProbeResult) -> Tensor:
    batch = collate(EXAMPLES, verdict.layout, pad_token_id=3)
    return batch.sum_per_response(Scorer(model, model, verdict)(batch))


def gradient(model: PreTrainedModel, logps: Tensor) -> Tensor:
    (logps * WEIGHTS).sum().backward()
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])


def relative(ours: Tensor, true: Tensor) -> float:
    return float((ours - true).norm() / true.norm())


def assert_exact(build: Callable[[], PreTrainedModel], verdict: ProbeResult) -> None:
    unchanged, model = build(), build()
    true, ours = separate_logps(unchanged), layout_logps(model, verdict)
    assert relative(ours.detach(), true.detach()) < 1e-6
    assert relative(gradient(model, ours), gradient(unchanged, true)) < 5e-6


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.model_type)
def test_the_layout_of_an_architecture_and_its_results(architecture: Architecture) -> None:
    verdict = probe(architecture.build(), max_length=64)
    assert (verdict.layout, verdict.own_head) == (architecture.layout, True), verdict.reason
    assert_exact(architecture.build, verdict)


@pytest.mark.parametrize("layout", ["shared", "masked", "packed", "padded"])
def test_a_model_that_supports_all_layouts_computes_the_same_in_each(layout: Layout) -> None:
    assert_exact(BY_TYPE["llama"].build, ProbeResult(layout, True, ""))


def test_gradient_checkpointing_gives_the_same_gradients_under_a_mask() -> None:
    plain, recomputed = (BY_TYPE["stablelm"].build().train() for _ in range(2))
    recomputed.gradient_checkpointing_enable({"use_reentrant": False})
    verdict = ProbeResult("masked", True, "")
    first, second = (gradient(model, layout_logps(model, verdict)) for model in (plain, recomputed))
    assert torch.equal(first, second)


def test_the_table_in_the_docs_is_current() -> None:
    assert table() in DOCS.read_text(encoding="utf-8"), "put the output of `python tests/architectures.py` there"


def test_layers_with_state_are_packed_if_their_kernels_reset_it(monkeypatch: pytest.MonkeyPatch) -> None:
    build = BY_TYPE["qwen3_5_text"].build
    without = probe(build(), max_length=64)
    assert (without.layout, "carry state" in without.reason) == ("padded", True)

    monkeypatch.setattr(modeling_qwen3_5, "torch_chunk_gated_delta_rule", by_sequence(
        modeling_qwen3_5.torch_chunk_gated_delta_rule, dim=1
    ))  # fmt: skip
    leaking = probe(build(), max_length=64)
    assert leaking.layout == "padded", "its convolution still mixes neighbouring sequences"

    monkeypatch.setattr(modeling_qwen3_5, "causal_conv1d_fn", by_sequence(modeling_qwen3_5.causal_conv1d_fn, dim=2))
    verdict = probe(build(), max_length=64)
    assert verdict.layout == "packed"
    assert_exact(build, verdict)


def by_sequence(function: Callable[..., Any], dim: int) -> Callable[..., Any]:
    """Run a recurrence over each sequence of a packed row separately, as the optional kernels do."""

    def run(*args: Any, cu_seqlens: Tensor | None = None, seq_idx: Tensor | None = None, **options: Any) -> Any:
        options.pop("cu_seq_lens_q", None)
        if cu_seqlens is not None:
            lengths = cu_seqlens.diff().tolist()
        elif seq_idx is not None:
            lengths = seq_idx[0].unique_consecutive(return_counts=True)[1].tolist()
        else:
            return function(*args, **options)
        tokens = sum(lengths)

        def part(value: Any, number: int) -> Any:
            is_long = isinstance(value, Tensor) and value.dim() > dim and value.shape[dim] == tokens
            return value.split(lengths, dim)[number] if is_long else value

        parts = [
            function(*(part(a, n) for a in args), **{name: part(a, n) for name, a in options.items()})
            for n in range(len(lengths))
        ]
        if isinstance(parts[0], tuple):
            return torch.cat([one[0] for one in parts], dim), None
        return torch.cat(parts, dim)

    return run


def test_attention_that_leaks_between_responses_is_rejected(
    tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leaking(module, query, key, value, mask=None, *, layout=None, **kwargs):  # type: ignore[no-untyped-def]
        merged = attention.Segments(tuple((start, shared, (sum(rest),)) for start, shared, rest in layout.records))
        return attention.shared_prefix_attention(module, query, key, value, mask, layout=merged, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, attention.SHARED_PREFIX, leaking)
    verdict = probe(tiny_llama, max_length=64)
    assert verdict.layout == "masked", "the model's own attention does not leak"
    assert verdict.reason == (
        "each prompt is computed once for all its responses, under a dense mask: "
        "a change to one response changed the output of others"
    )


def test_a_mask_that_leaks_between_responses_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaking(parts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        hidden = torch.ones(parts.shape[-1], parts.shape[-1]).triu(1).bool()
        return torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(dtype).min).expand(len(parts), 1, -1, -1)

    assert probe(BY_TYPE["stablelm"].build(), max_length=64).layout == "masked"
    monkeypatch.setattr(attention, "_dense_mask", leaking)
    assert probe(BY_TYPE["stablelm"].build(), max_length=64).layout == "padded"


def test_an_attention_window_excludes_the_masked_layout() -> None:
    # The first response is between the prompt and the second: their distance in columns is larger than in positions.
    assert probe(BY_TYPE["gpt_neo"].build(window_size=256), max_length=64).layout == "padded"


def test_the_backbone_of_a_text_tower_with_the_prefix_of_its_multimodal_model() -> None:
    model = BY_TYPE["llama4_text"].build()
    assert backbone(model) is model.model


def test_attention_that_ignores_its_window_is_rejected(tiny_model: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    def windowless(*args, sliding_window=None, **kwargs):  # type: ignore[no-untyped-def]
        return attention.shared_prefix_attention(*args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, attention.SHARED_PREFIX, windowless)
    verdict = probe(tiny_model("mistral", sliding_window=8), max_length=64)
    assert verdict.layout == "padded"
    assert verdict.reason.startswith("each response is a padded row with its own copy of the prompt: its log-prob")


def test_an_unknown_transform_of_the_logits_is_noticed(tiny_llama: PreTrainedModel) -> None:
    forward = tiny_llama.lm_head.forward
    original = tiny_llama.forward

    def doubled(*args, **kwargs):  # type: ignore[no-untyped-def]
        output = original(*args, **kwargs)
        output.logits = output.logits * 2
        return output

    tiny_llama.forward = doubled  # type: ignore[method-assign]
    verdict = probe(tiny_llama, max_length=64)
    assert (verdict.layout, verdict.own_head) == ("padded", False)
    assert tiny_llama.lm_head.forward == forward


def test_the_model_is_restored(tiny_llama: PreTrainedModel) -> None:
    model = get_peft_model(tiny_llama, LoraConfig(r=2, target_modules="all-linear"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    probe(model.get_base_model(), max_length=64)
    assert model.get_base_model().training
    assert model.get_base_model().config._attn_implementation == "sdpa"
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())

"""Every architecture of the table gets the layout that the table says, and in it computes what it computes alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, BY_TYPE, Architecture, table
from memory_store import random_pairs
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.qwen3_5 import modeling_qwen3_5

from dpoctl.core.collator import collate
from dpoctl.core.logps import Scorer
from dpoctl.data.tokenize import Example
from dpoctl.model.layouts import Layout
from dpoctl.model.probe import Verdict, probe

DOCS = Path(__file__).parents[2] / "docs" / "architectures.md"
EXAMPLES = random_pairs(4, seed=1)
WEIGHTS = torch.tensor([0.7, -1.3, 0.2, 1.1, -0.4, 0.9, -1.0, 0.5])


def responses(examples: list[Example]) -> list[tuple[Tensor, Tensor]]:
    """Tokens of each response behind its prompt, and which of them are scored."""
    return [
        (torch.tensor([*e.shared, *suffix]), torch.tensor([*e.shared_scored, *flags]))
        for e in examples
        for suffix, flags in zip(e.suffixes, e.suffixes_scored, strict=True)
    ]


def alone(model: PreTrainedModel) -> Tensor:
    """Log-probabilities of every response by the untouched model, a row at a time."""
    logps = []
    for ids, scored in responses(EXAMPLES):
        rows = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
        logps.append(rows.gather(1, ids[1:, None])[:, 0][scored[1:]].sum())
    return torch.stack(logps)


def in_layout(model: PreTrainedModel, verdict: Verdict) -> Tensor:
    batch = collate(EXAMPLES, verdict.layout, pad_token_id=3)
    return batch.sum_per_response(Scorer(model, model, verdict)(batch))


def gradient(model: PreTrainedModel, logps: Tensor) -> Tensor:
    (logps * WEIGHTS).sum().backward()
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])


def relative(ours: Tensor, true: Tensor) -> float:
    return float((ours - true).norm() / true.norm())


def assert_exact(build: Callable[[], PreTrainedModel], verdict: Verdict) -> None:
    untouched, model = build(), build()
    true, ours = alone(untouched), in_layout(model, verdict)
    assert relative(ours.detach(), true.detach()) < 1e-6
    assert relative(gradient(model, ours), gradient(untouched, true)) < 5e-6


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.model_type)
def test_an_architecture_gets_its_layout_and_computes_in_it_what_it_computes_alone(architecture: Architecture) -> None:
    verdict = probe(architecture.build(), max_length=64)
    assert (verdict.layout, verdict.own_head) == (architecture.layout, True), verdict.reason
    assert_exact(architecture.build, verdict)


@pytest.mark.parametrize("layout", ["shared", "masked", "packed", "padded"])
def test_a_model_that_can_do_all_layouts_computes_the_same_in_each(layout: Layout) -> None:
    assert_exact(BY_TYPE["llama"].build, Verdict(layout, True, ""))


def test_gradient_checkpointing_recomputes_the_same_under_a_mask() -> None:
    plain, recomputed = (BY_TYPE["stablelm"].build().train() for _ in range(2))
    recomputed.gradient_checkpointing_enable({"use_reentrant": False})
    verdict = Verdict("masked", True, "")
    first, second = (gradient(model, in_layout(model, verdict)) for model in (plain, recomputed))
    assert torch.equal(first, second)


def test_the_table_in_the_docs_is_that_of_the_tests() -> None:
    assert table() in DOCS.read_text(encoding="utf-8"), "put the output of `python tests/architectures.py` there"


def test_state_does_not_hinder_packing_where_kernels_start_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    build = BY_TYPE["qwen3_5_text"].build
    without = probe(build(), max_length=64)
    assert (without.layout, "carry state" in without.reason) == ("padded", True)

    monkeypatch.setattr(modeling_qwen3_5, "torch_chunk_gated_delta_rule", by_sequence(
        modeling_qwen3_5.torch_chunk_gated_delta_rule, dim=1
    ))  # fmt: skip
    leaking = probe(build(), max_length=64)
    assert leaking.layout == "padded", "its convolution still runs over from one sequence into the next"

    monkeypatch.setattr(modeling_qwen3_5, "causal_conv1d_fn", by_sequence(modeling_qwen3_5.causal_conv1d_fn, dim=2))
    verdict = probe(build(), max_length=64)
    assert verdict.layout == "packed"
    assert_exact(build, verdict)


def by_sequence(function: Callable[..., Any], dim: int) -> Callable[..., Any]:
    """Do what the optional kernels do: run a recurrence over each sequence of a packed row by itself."""

    def run(*args: Any, cu_seqlens: Tensor | None = None, seq_idx: Tensor | None = None, **options: Any) -> Any:
        options.pop("cu_seq_lens_q", None)
        if cu_seqlens is not None:
            lengths = cu_seqlens.diff().tolist()
        elif seq_idx is not None:
            lengths = seq_idx[0].unique_consecutive(return_counts=True)[1].tolist()
        else:
            return function(*args, **options)
        rows = sum(lengths)

        def cut(value: Any, number: int) -> Any:
            is_long = isinstance(value, Tensor) and value.dim() > dim and value.shape[dim] == rows
            return value.split(lengths, dim)[number] if is_long else value

        parts = [
            function(*(cut(a, n) for a in args), **{name: cut(a, n) for name, a in options.items()})
            for n in range(len(lengths))
        ]
        if isinstance(parts[0], tuple):
            return torch.cat([part[0] for part in parts], dim), None
        return torch.cat(parts, dim)

    return run

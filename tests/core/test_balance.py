"""The load-balancing loss of experts: that of transformers for each row, whatever the layout and the micro-batches."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from memory_store import random_pairs
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from dpoctl.core.collator import collate
from dpoctl.core.logps import Scorer
from dpoctl.data.tokenize import Example
from dpoctl.errors import UsageError
from dpoctl.model.attention import Layout
from dpoctl.model.probe import ProbeResult
from dpoctl.model.routers import require_routers


def demonstrations(number: int) -> list[Example]:
    """Rows of several lengths with one answer each."""
    pairs = random_pairs(number)
    return [
        replace(one, suffixes=one.suffixes[:1], suffixes_scored=one.suffixes_scored[:1], pairs=np.zeros((0, 2), int))
        for one in pairs
    ]


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize(("layout", "own_head"), [("shared", True), ("padded", True), ("padded", False)])
def test_it_is_the_sum_of_what_transformers_finds_for_each_row(
    layout: Layout, own_head: bool, model_type: str, tiny_model: Any
) -> None:
    model, examples = tiny_model(model_type), demonstrations(3)
    expected = 0.0
    for one in examples:
        ids = torch.from_numpy(np.concatenate([one.shared, one.suffixes[0]]))[None]
        logits = model(input_ids=ids, output_router_logits=True).router_logits
        experts = logits[0].shape[-1]
        expected += load_balancing_loss_func(logits, experts, model.config.num_experts_per_tok).item()

    scorer = Scorer(model, model, ProbeResult(layout, own_head, ""), balances=True).train()
    scorer(collate(examples, layout, pad_token_id=3))
    assert scorer.balance is not None
    assert scorer.balance.item() == pytest.approx(expected, rel=1e-5)
    scorer.balance.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for name, p in model.named_parameters() if "gate" in name)


def test_a_model_without_routers_is_refused(tiny_model: Any) -> None:
    with pytest.raises(UsageError, match="a LlamaForCausalLM has no routers that transformers balances"):
        require_routers(tiny_model("llama"))

"""The work of a step: counted FLOPs and live bytes stay what they are, and near the least that the maths needs.

No clock is read, so this can stand in CI. The recorded figures are of the packages in constraints.txt; whoever changes
them on purpose writes the figures down again.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from flops import counted, seen_keys
from memory_store import random_pairs
from peft import LoraConfig, get_peft_model
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from dpoctl.core.collator import collate
from dpoctl.core.logps import Scorer
from dpoctl.data.tokenize import Example
from dpoctl.losses import Scores
from dpoctl.losses.pairwise import Sigmoid
from dpoctl.model import linear_head
from dpoctl.model.fused_lora import fuse_lora
from dpoctl.model.probe import ProbeResult

LAYERS, HIDDEN, INNER, WIDTH, WORDS, RANK = 2, 64, 96, 32, 384, 4


@dataclass(frozen=True)
class Mode:
    """A way to take a step, what it costs beyond the least, and what was recorded of it.

    Attributes:
        lora: train an adapter, or everything.
        kept: elements of the head's probabilities that may be kept.
        passes: further products of the head with the scored rows.
        flops: recorded.
        peak_bytes: recorded.
    """

    lora: bool
    kept: int
    passes: int
    flops: int
    peak_bytes: int


MODES = {
    "full, probabilities kept": Mode(False, 1 << 28, 0, 524_248_576, 11_706_800),
    "full, probabilities computed again": Mode(False, 0, 1, 559_588_864, 11_175_220),
    "lora": Mode(True, 1 << 28, 0, 389_187_072, 9_459_275),
}


def least(examples: list[Example], *, lora: bool) -> tuple[int, int, int]:
    """FLOPs of a step that nothing can do without, of attention forward among them, and of one product of the head."""
    tokens = scored = area = 0
    for example in examples:
        shared, lengths = len(example.shared), [len(suffix) for suffix in example.suffixes]
        tokens += shared + sum(lengths)
        scored += int(example.shared_scored.sum()) + sum(lengths)
        area += shared * (shared + 1) // 2 + sum(n * shared + n * (n + 1) // 2 for n in lengths)
    weights = LAYERS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * WIDTH + 3 * HIDDEN * INNER)
    linear, attention, head = 2 * weights * tokens, 4 * LAYERS * HIDDEN * area, 2 * HIDDEN * WORDS * scored
    if not lora:
        return 3 * (linear + attention + head), attention, head
    sides = 2 * 2 * HIDDEN + 2 * (HIDDEN + WIDTH) + 3 * (HIDDEN + INNER)
    return 2 * linear + 3 * attention + 2 * head + 6 * RANK * LAYERS * sides * tokens, attention, head


def step(model: PreTrainedModel, examples: list[Example], *, lora: bool) -> Any:
    """One forward and backward under a counter."""
    top: Any = model
    if lora:
        top = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
        fuse_lora(model)
    scorer, batch = Scorer(top, model, ProbeResult("shared", True, "")), collate(examples, "shared")
    with counted() as work:
        logps = batch.sum_per_response(scorer(batch))
        Sigmoid()(Scores(logps, batch.outline, torch.zeros_like(logps))).sum().backward()
    return work


@pytest.mark.parametrize("name", MODES)
def test_a_step_does_the_work_that_was_recorded_and_hardly_more_than_the_least(
    name: str, tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    mode, examples = MODES[name], random_pairs(24, seed=5)
    monkeypatch.setattr(linear_head, "KEPT_ELEMENTS", mode.kept)
    work = step(tiny_llama, examples, lora=mode.lora)
    minimum, attention, head = least(examples, lora=mode.lora)
    # The kernel computes its scores a second time in backward: half of what attention costs forward.
    allowed = minimum + attention // 2 + mode.passes * head
    assert work.flops <= 1.05 * allowed, f"{work.flops / allowed:.3f}"
    assert work.flops == pytest.approx(mode.flops, rel=0.02)
    assert work.peak_bytes == pytest.approx(mode.peak_bytes, rel=0.02)


def test_bytes_do_not_grow_with_the_vocabulary_times_the_prompt(tiny_model: Any) -> None:
    """What a longer prompt adds is no more where the vocabulary is larger: activations, and no logits."""

    def peak(vocabulary: int, length: int) -> int:
        (example,) = random_pairs(1)
        longer = torch.arange(length).numpy() % 300 + 4
        pair = Example(longer, longer < 0, example.suffixes, example.suffixes_scored, example.pairs)
        found: int = step(tiny_model("llama", vocab_size=vocabulary), [pair], lora=True).peak_bytes
        return found

    small, large = (peak(vocabulary, 512) - peak(vocabulary, 128) for vocabulary in (1024, 8192))
    assert large <= 1.02 * small


@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (3, 7)])
def test_causal_attention_is_counted_as_causal(queries: int, keys: int) -> None:
    seen = sum(key <= query + keys - queries for query in range(queries) for key in range(keys))
    assert seen_keys(queries, keys, causal=True) == seen
    assert seen_keys(queries, keys, causal=False) == queries * keys


def test_the_counter_sees_attention_forward_and_backward() -> None:
    heads, width, length = 2, 8, 16
    query, key, value = (torch.randn(1, heads, length, width, requires_grad=True) for _ in range(3))
    with counted() as causal:
        scaled_dot_product_attention(query, key, value, is_causal=True).sum().backward()
    with counted() as whole:
        scaled_dot_product_attention(query, key, value).sum().backward()
    # Two products forward; the scores again and four products backward.
    assert whole.flops == 7 * 2 * heads * length * length * width
    assert causal.flops * 2 * length == whole.flops * (length + 1)


def test_the_counter_s_peak_is_of_what_is_alive_at_once() -> None:
    start = torch.ones(1000)
    with counted() as work:
        one = start + 1
        two = one + 1
        del one
        three = two + 1
        del two
        four = three.view(10, 100) + 1
    assert four.numel() == 1000
    assert work.peak_bytes == 2 * 4000

"""NEFTune: the noise of transformers, as large as a row's own length says, in every layout."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from memory_store import random_pairs
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.neftune import activate_neftune

from dpoctl.core.collator import collate
from dpoctl.core.logps import Scorer
from dpoctl.data.tokenize import Example
from dpoctl.model.attention import Layout
from dpoctl.model.probe import ProbeResult

ALPHA = 5.0


def demonstrations(number: int) -> list[Example]:
    """Rows of several lengths with one answer each."""
    pairs = random_pairs(number)
    return [
        replace(one, suffixes=one.suffixes[:1], suffixes_scored=one.suffixes_scored[:1], pairs=np.zeros((0, 2), int))
        for one in pairs
    ]


def embeddings(model: PreTrainedModel, call: Any) -> Tensor:
    """What the first layer gets in a forward."""
    seen: list[Tensor] = []
    handle = model.model.layers[0].register_forward_pre_hook(
        lambda _module, inputs, kwargs: seen.append(inputs[0] if inputs else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    call()
    handle.remove()
    return seen[0].detach()


def test_of_one_row_it_is_the_noise_of_transformers(tiny_llama: PreTrainedModel) -> None:
    batch = collate(demonstrations(1), "padded")
    scorer = Scorer(tiny_llama, tiny_llama, ProbeResult("padded", True, ""), noise_alpha=ALPHA).train()
    torch.manual_seed(0)
    ours = embeddings(tiny_llama, lambda: scorer(batch))
    handle = activate_neftune(tiny_llama, ALPHA)
    torch.manual_seed(0)
    theirs = embeddings(tiny_llama, lambda: tiny_llama(input_ids=batch.input_ids))
    handle.remove()
    assert (ours - theirs).abs().max() < 1e-6
    assert (theirs - tiny_llama.get_input_embeddings()(batch.input_ids)).abs().max() > 0.05


@pytest.mark.parametrize("layout", ["shared", "masked", "packed", "padded"])
def test_its_size_is_that_of_the_row_s_own_length_in_every_layout(layout: Layout, tiny_llama: PreTrainedModel) -> None:
    examples = demonstrations(4)
    batch = collate(examples, layout)
    scorer = Scorer(tiny_llama, tiny_llama, ProbeResult(layout, True, ""), noise_alpha=ALPHA).train()
    noisy = embeddings(tiny_llama, lambda: scorer(batch))
    noise = (noisy - tiny_llama.get_input_embeddings()(batch.input_ids)).abs().amax(-1)
    width = tiny_llama.config.hidden_size
    lengths = [len(one.shared) + len(one.suffixes[0]) for one in examples]
    assert len(set(lengths)) > 1
    rows = noise[0].split(lengths) if batch.segments else [row[:n] for row, n in zip(noise, lengths, strict=True)]
    for row, length in zip(rows, lengths, strict=True):
        bound = ALPHA / (length * width) ** 0.5
        assert 0.9 * bound < row.max() <= bound * 1.0001


def test_there_is_none_outside_of_training(tiny_llama: PreTrainedModel) -> None:
    batch = collate(demonstrations(2), "shared")
    noisy = Scorer(tiny_llama, tiny_llama, ProbeResult("shared", True, ""), noise_alpha=ALPHA)
    plain = Scorer(tiny_llama, tiny_llama, ProbeResult("shared", True, ""))
    expected = plain(batch).detach()
    assert torch.equal(noisy.eval()(batch), expected)
    with torch.no_grad():
        assert torch.equal(noisy.train()(batch), expected)
    assert not torch.equal(noisy.train()(batch), expected)

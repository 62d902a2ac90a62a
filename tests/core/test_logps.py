"""The Scorer's log-probabilities of tokens, and their sums by response."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from memory_store import random_dialogue, random_pairs
from transformers import PreTrainedModel

from dpoctl.core.batch import Batch
from dpoctl.core.collator import collate
from dpoctl.core.logps import Scorer, per_response
from dpoctl.data.tokenize import Example
from dpoctl.losses import Scores
from dpoctl.model import linear_head
from dpoctl.model.attention import Layout, use_attention
from dpoctl.model.head import Head, score_targets, select_logps
from dpoctl.model.probe import ProbeResult

Build = Callable[..., PreTrainedModel]
ROUTES = {"shared": ProbeResult("shared", True, ""), "padded": ProbeResult("padded", True, ""),
          "logits": ProbeResult("padded", False, ""), "shared logits": ProbeResult("shared", False, "")}  # fmt: skip
BOTH = frozenset({"head", "confidence"})


def lengths_only(prompt: int, *answers: int) -> Example:
    """A record of which the number of tokens matters, and no token."""
    return Example(
        shared=np.arange(prompt),
        shared_scored=np.zeros(prompt, dtype=bool),
        suffixes=tuple(np.arange(n) for n in answers),
        suffixes_scored=tuple(np.ones(n, dtype=bool) for n in answers),
        pairs=np.array([[0, 1]]),
    )


def run(model: PreTrainedModel, examples: list[Example], verdict: ProbeResult) -> tuple[Batch, Scores]:
    batch = collate(examples, verdict.layout, pad_token_id=3)
    return batch, per_response(batch, Scorer(model, model, verdict, confidence=True)(batch), BOTH)


def test_log_probabilities_are_those_of_the_next_token() -> None:
    rows = torch.tensor([[0.2, 0.3, 0.5], [0.1, 0.2, 0.7], [0.6, 0.3, 0.1], [0.25, 0.25, 0.5]]).log()
    logps = select_logps(rows[1:3], torch.tensor([2, 0]))
    assert float(logps.sum()) == pytest.approx(-0.867501, abs=1e-6)
    assert float(logps.mean()) == pytest.approx(-0.433750, abs=1e-6)


@pytest.mark.parametrize(("answer", "mean"), [([0, 1], 0.225942), ([1, 2], -1.440161)])
def test_confidence_is_the_logarithm_of_wpo_s_weight(answer: list[int], mean: float) -> None:
    rows = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]]).log()
    # Logits are log-probabilities up to a constant a row, however large.
    for shift in (0.0, 40.0):
        _, confidence = score_targets(rows + shift, torch.tensor(answer)).unbind(1)
        assert float(confidence.mean()) == pytest.approx(mean, abs=1e-5)
    _, uniform = score_targets(torch.zeros(4, 50), torch.arange(4)).unbind(1)
    assert uniform.tolist() == pytest.approx([0.0] * 4, abs=1e-6)


def test_half_precision_logits_are_scored_in_float32() -> None:
    logits = torch.randn(5, 300, dtype=torch.float64).bfloat16()
    scored = score_targets(logits, torch.arange(5))
    assert scored.dtype == torch.float32
    torch.testing.assert_close(scored.double(), score_targets(logits.double(), torch.arange(5)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("trainable", [False, True])
def test_asking_for_confidence_changes_neither_log_probabilities_nor_gradients(
    trainable: bool, tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(linear_head.BLOCK, "cpu", (5, 100))
    tiny_llama.requires_grad_(trainable)
    hidden, targets, weights = torch.randn(23, 64), torch.randint(0, 384, (23,)), torch.randn(23)

    def scored(confidence: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        leaf = hidden.clone().requires_grad_()
        out = Head(tiny_llama, confidence=confidence).logps(leaf, targets)
        logps = out[:, 0] if confidence else out
        # A loss that multiplies by the confidence must not send a gradient through it.
        (logps @ (weights * (out[:, 1].exp() if confidence else 1.0))).backward()
        assert leaf.grad is not None
        return logps.detach(), leaf.grad, out.detach()

    plain, gradient, _ = scored(False)
    logps, weighted, out = scored(True)
    assert torch.equal(logps, plain)
    torch.testing.assert_close(out, score_targets(tiny_llama.lm_head(hidden), targets).detach(), rtol=1e-5, atol=1e-5)
    # The gradient of a row is that of its log-probability, times the factor on it.
    torch.testing.assert_close(weighted, gradient * out[:, 1:].exp(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_scores_confidence_and_heads_alike(route: str, tiny_model: Build) -> None:
    rng = np.random.default_rng(0)
    examples = [*random_pairs(4, seed=4), random_dialogue(rng)]
    model = tiny_model("llama")
    with torch.no_grad():
        _, scores = run(model, examples, ROUTES[route])
        confidence, heads = by_hand(tiny_model("llama"), examples)
    assert scores.confidence is not None
    assert scores.head_logps is not None
    torch.testing.assert_close(scores.confidence, confidence, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores.head_logps, heads, rtol=1e-5, atol=1e-4)


def by_hand(model: PreTrainedModel, examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Confidence and head sums from the probabilities of the untouched model, one unpadded row at a time."""
    confidence, heads = [], []
    for example in examples:
        tokens = []
        for suffix, flags in zip(example.suffixes, example.suffixes_scored, strict=True):
            ids = torch.tensor([*example.shared, *suffix])
            scored = torch.tensor([*example.shared_scored, *flags])[1:]
            with use_attention(model, "sdpa"):
                p = model(input_ids=ids[None]).logits[0, :-1].double().softmax(-1)
            own = p.gather(1, ids[1:, None])[:, 0]
            confidence.append((own / p.square().sum(-1)).log()[scored].mean())
            tokens.append(own.log()[scored])
        shortest = min(map(len, tokens))
        heads += [each[:shortest].sum() for each in tokens]
    return torch.stack(confidence).float(), torch.stack(heads).float()


@pytest.mark.parametrize("layout", ["shared", "masked", "packed", "padded"])
def test_heads_end_where_the_record_s_shortest_response_does(layout: Layout) -> None:
    batch = collate([lengths_only(4, 5, 3), lengths_only(2, 1, 2, 4)], layout)
    chosen, rejected = [-1.0, -2.0, -0.5, -0.5, -1.0], [-1.0, -1.0, -1.0]
    logps = torch.tensor([*chosen, *rejected, -1.0, -2.0, -4.0, -8.0, -16.0, -32.0, -64.0], requires_grad=True)
    scores = per_response(batch, logps, {"head"})
    assert scores.logps.tolist() == [-5.0, -3.0, -1.0, -6.0, -120.0]
    assert scores.head_logps is not None
    assert scores.head_logps.tolist() == [-3.5, -3.0, -1.0, -2.0, -8.0]
    scores.head_logps.sum().backward()
    assert logps.grad is not None
    assert logps.grad.tolist() == [1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 0, 1, 0, 0, 0]


def test_tokens_that_responses_share_belong_to_the_head_of_each() -> None:
    shared = Example(
        shared=np.arange(5),
        shared_scored=np.array([False, False, False, True, True]),
        suffixes=(np.arange(1), np.arange(3)),
        suffixes_scored=(np.ones(1, dtype=bool), np.ones(3, dtype=bool)),
        pairs=np.array([[0, 1]]),
    )
    batch = collate([shared], "shared")
    scores = per_response(batch, torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0, -32.0]), {"head"})
    assert scores.logps.tolist() == [-7.0, -59.0]
    assert scores.head_logps is not None
    assert scores.head_logps.tolist() == [-7.0, -11.0]


def test_what_is_not_needed_is_not_there(tiny_llama: PreTrainedModel) -> None:
    batch = collate(random_pairs(2), "shared")
    scored = Scorer(tiny_llama, tiny_llama, ProbeResult("shared", True, ""))(batch)
    assert scored.shape == batch.score_tgt.shape
    scores = per_response(batch, scored)
    assert (scores.head_logps, scores.confidence) == (None, None)
    assert scores.token_logps is not None
    assert len(scores.token_logps) == int(batch.outline.num_tokens.sum())

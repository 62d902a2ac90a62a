"""The linear head: values and gradients are those of autograd, with exponentials kept or computed again."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flops import counted
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpoctl.model import linear_head
from dpoctl.model.head import Head, score_targets, select_logps
from dpoctl.model.linear_head import LinearHead, is_plain

ROWS, WIDTH, VOCABULARY = 23, 16, 50


def make_inputs(*, bias: bool, dtype: torch.dtype = torch.float64) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    module = nn.Linear(WIDTH, VOCABULARY, bias=bias, dtype=dtype)
    hidden = torch.randn(ROWS, WIDTH, dtype=dtype) * 3
    return module, hidden, torch.randint(0, VOCABULARY, (ROWS,)), torch.randn(ROWS, dtype=dtype)


def logps_and_gradients(
    score: Callable[[Tensor], Tensor], module: nn.Linear, hidden: Tensor, weights: Tensor
) -> tuple[Tensor, list[Tensor | None]]:
    """Return log-probabilities, and the gradients of hidden states, weight and bias."""
    module.zero_grad()
    leaf = hidden.clone().requires_grad_()
    logps = score(leaf)
    (logps @ weights.to(logps.dtype)).backward()
    return logps.detach(), [leaf.grad, *(p.grad for p in module.parameters())]


@pytest.mark.parametrize("kept", [1 << 20, 0], ids=["kept", "computed again"])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(("bias", "scale"), [(False, 1.0), (True, 0.3)])
def test_gradients_are_those_of_autograd(
    kept: int, trained: bool, bias: bool, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_head, "KEPT_ELEMENTS", kept)
    monkeypatch.setitem(linear_head.BLOCK, "cpu", (5, 7))
    module, hidden, targets, weights = make_inputs(bias=bias)
    module.requires_grad_(trained)
    logps, own = logps_and_gradients(lambda h: LinearHead(scale)(module, h, targets), module, hidden, weights)
    true_logps, true = logps_and_gradients(lambda h: select_logps(module(h) * scale, targets), module, hidden, weights)
    torch.testing.assert_close(logps, true_logps, rtol=1e-12, atol=1e-12)
    for mine, gradient in zip(own, true, strict=True):
        torch.testing.assert_close(mine, gradient, rtol=1e-11, atol=1e-11)


def test_keeping_and_computing_again_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    module, hidden, targets, weights = make_inputs(bias=True, dtype=torch.float32)
    results = []
    for kept in (1 << 20, 0):
        monkeypatch.setattr(linear_head, "KEPT_ELEMENTS", kept)
        results.append(logps_and_gradients(lambda h: LinearHead()(module, h, targets), module, hidden, weights))
    (logps, gradients), (again, others) = results
    assert torch.equal(logps, again)
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(gradients, others, strict=True))


@pytest.mark.parametrize(
    ("trained", "kept", "products"), [(False, 1 << 20, 2), (True, 1 << 20, 3), (True, 0, 4)],
    ids=["frozen", "kept", "computed again"],
)  # fmt: skip
def test_products_of_a_head(trained: bool, kept: int, products: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_head, "KEPT_ELEMENTS", kept)
    module, hidden, targets, weights = make_inputs(bias=False)
    module.requires_grad_(trained)
    with counted() as work:
        logps_and_gradients(lambda h: LinearHead()(module, h, targets), module, hidden, weights)
    assert work.flops == products * 2 * ROWS * WIDTH * VOCABULARY


def test_without_gradients_the_bits_are_the_same() -> None:
    module, hidden, targets, _ = make_inputs(bias=False, dtype=torch.float32)
    scored = LinearHead()(module, hidden.requires_grad_(), targets)
    with torch.no_grad():
        assert torch.equal(LinearHead()(module, hidden, targets), scored)


def test_extreme_logits_are_scored_exactly() -> None:
    module = nn.Linear(1, 3, bias=False)
    module.weight.data = torch.tensor([[1.0], [-1.0], [0.5]])
    hidden, targets = torch.tensor([[400.0], [-400.0], [0.0]]), torch.tensor([1, 0, 2])
    expected = torch.tensor([-800.0, -800.0, -1.0986123])
    torch.testing.assert_close(LinearHead()(module, hidden, targets), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kept", [1 << 20, 0], ids=["kept", "computed again"])
def test_a_maximum_that_grows_beyond_all_exponents_loses_no_precision(
    dtype: torch.dtype, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one token a block and much larger logits in each, earlier sums become zero; targets must stay exact."""
    monkeypatch.setattr(linear_head, "KEPT_ELEMENTS", kept)
    monkeypatch.setitem(linear_head.BLOCK, "cpu", (2, 1))
    module = nn.Linear(1, 4, bias=True, dtype=dtype)
    module.weight.data = torch.tensor([[1.0], [2.0], [3.0], [3.01]], dtype=dtype)
    hidden, targets = torch.tensor([[90.0], [-90.0], [400.0], [1.0]], dtype=dtype), torch.tensor([0, 3, 2, 1])
    weights = torch.tensor([1.0, -2.0, 0.5, 1.0], dtype=dtype)
    logps, own = logps_and_gradients(lambda h: LinearHead()(module, h, targets), module, hidden, weights)
    true_logps, true = logps_and_gradients(lambda h: select_logps(module(h), targets), module, hidden, weights)
    # A logit of 400 has an error of 2e-5 in float32, here and in autograd.
    near = {"rtol": 5e-3, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(logps, true_logps, **near)
    for mine, gradient in zip(own, true, strict=True):
        torch.testing.assert_close(mine, gradient, **near)


def test_a_probability_close_to_one_keeps_its_precision() -> None:
    """For p = 1 - 1e-10 the gradient is proportional to 1 - p, which float32 can represent."""
    module, *_, weights = make_inputs(bias=False)
    hidden, targets, weights = torch.eye(WIDTH, dtype=torch.float64), torch.arange(WIDTH), weights[:WIDTH]
    with torch.no_grad():
        module.weight[targets] += 22 * hidden
    true_logps, (true, *_) = logps_and_gradients(lambda h: select_logps(module(h), targets), module, hidden, weights)
    assert float(true_logps.max()) < -1e-12
    assert float(true_logps.min()) > -1e-6
    single = nn.Linear(WIDTH, VOCABULARY, bias=False)
    single.load_state_dict(module.state_dict())
    logps, (own, *_) = logps_and_gradients(lambda h: LinearHead()(single, h, targets), single, hidden.float(), weights)
    assert own is not None
    assert true is not None
    torch.testing.assert_close(logps.double(), true_logps, rtol=1e-3, atol=0.0)
    error = (own.double() - true).norm(dim=-1) / true.norm(dim=-1)
    assert float(error.max()) < 1e-3


def test_confidence_is_that_of_score_targets() -> None:
    module, hidden, targets, _ = make_inputs(bias=False, dtype=torch.float32)
    torch.testing.assert_close(
        LinearHead(confidence=True)(module, hidden, targets), score_targets(module(hidden), targets)
    )


def test_gradients_of_weights_are_summed_in_float32_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(linear_head.BLOCK, "cpu", (1, 3))
    module, hidden, targets, weights = make_inputs(bias=True, dtype=torch.float32)
    hidden = hidden.bfloat16()
    _, true = logps_and_gradients(lambda h: select_logps(module(h.float()), targets), module, hidden, weights)
    with torch.autocast("cpu", torch.bfloat16):
        _, own = logps_and_gradients(lambda h: LinearHead()(module, h, targets), module, hidden, weights)
    assert own[1] is not None
    assert true[1] is not None
    assert own[1].dtype == torch.float32
    assert float((own[1] - true[1]).norm() / true[1].norm()) < 2e-2


def test_only_an_unmodified_linear_layer_is_plain(tiny_llama: PreTrainedModel) -> None:
    assert is_plain(tiny_llama.get_output_embeddings())

    class Special(nn.Linear):
        pass

    assert not is_plain(Special(2, 3))
    hooked = nn.Linear(2, 3)
    hooked.register_forward_hook(lambda *_: None)
    assert not is_plain(hooked)
    sharded: Any = nn.Linear(2, 3)
    sharded.weight.data = torch.empty(0)
    assert not is_plain(sharded)


def test_a_soft_cap_goes_through_autograd(tiny_llama: PreTrainedModel) -> None:
    hidden, targets = torch.randn(9, 64), torch.randint(0, 384, (9,))
    tiny_llama.config.final_logit_softcapping = 0.5
    logits = 0.5 * torch.tanh(tiny_llama.lm_head(hidden) / 0.5)
    torch.testing.assert_close(Head(tiny_llama).logps(hidden, targets), select_logps(logits, targets))

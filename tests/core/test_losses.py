"""Every loss against numbers worked out by hand, and against what must hold for any of them."""

import math

import pytest
import torch

from dpoctl.core.losses import IPO, LOSSES, Hinge, PreferenceLoss, Scores, Sigmoid, TokenNLL, log_sigmoid

# Pair A: log-ratios 2 and -1, margin 3. Pair B: log-ratios -0.5 and 0.5, margin -1.
BATCH = Scores(
    logps=torch.tensor([-10.0, -14.0, -20.0, -18.0], dtype=torch.float64),
    num_tokens=torch.tensor([5, 8, 10, 6]),
    pairs=torch.tensor([[0, 1], [2, 3]]),
    ref_logps=torch.tensor([-12.0, -13.0, -19.5, -18.5], dtype=torch.float64),
)
WITHOUT_REFERENCE = Scores(BATCH.logps, BATCH.num_tokens, BATCH.pairs)


@pytest.mark.parametrize(
    ("loss", "pair_a", "pair_b"),
    [
        (Sigmoid(beta=0.1), 0.554355, 0.744397),
        (Sigmoid(beta=0.1, label_smoothing=0.1), 0.584355, 0.734397),
        (IPO(beta=0.1, average=False), 4.0, 36.0),
        (IPO(beta=0.1), 20.025625, 26.351111),
        (Hinge(beta=0.1), 0.7, 1.1),
    ],
)
def test_loss_of_each_pair_is_the_paper_s(loss: PreferenceLoss, pair_a: float, pair_b: float) -> None:
    assert loss(BATCH).tolist() == pytest.approx([pair_a, pair_b], abs=1e-6)


def test_reference_free_sigmoid_compares_the_policy_s_own_logps() -> None:
    loss = Sigmoid(beta=0.1, reference_free=True)
    assert not loss.needs_reference
    assert loss(WITHOUT_REFERENCE).tolist() == pytest.approx([0.513015, 0.798139], abs=1e-6)


@pytest.mark.parametrize(
    ("loss", "gradients"),
    [
        (Sigmoid(beta=0.1), [-0.042556, -0.052498]),
        (Sigmoid(beta=0.1, label_smoothing=0.1), [-0.032556, -0.042498]),
        (IPO(beta=0.1, average=False), [-4.0, -12.0]),
    ],
)
def test_gradient_with_respect_to_the_margin(loss: PreferenceLoss, gradients: list[float]) -> None:
    logps = BATCH.logps.clone().requires_grad_()
    loss(Scores(logps, BATCH.num_tokens, BATCH.pairs, BATCH.ref_logps)).sum().backward()
    assert logps.grad is not None
    assert logps.grad[[0, 2]].tolist() == pytest.approx(gradients, abs=1e-6)
    assert logps.grad[[1, 3]].tolist() == pytest.approx([-g for g in gradients], abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_equal_policy_and_reference_give_the_known_value_whatever_the_lengths(name: str) -> None:
    loss = LOSSES[name]()
    equal = Scores(BATCH.logps, BATCH.num_tokens, BATCH.pairs, BATCH.logps)
    assert loss(equal).tolist() == pytest.approx([loss.at_init()] * 2)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("margin", [-1e4, 1e4])
def test_extreme_margins_stay_finite_and_so_do_their_gradients(name: str, margin: float) -> None:
    logps = torch.tensor([margin, 0.0]).requires_grad_()
    value = LOSSES[name]()(Scores(logps, torch.tensor([3, 3]), torch.tensor([[0, 1]]), torch.zeros(2))).sum()
    value.backward()
    assert logps.grad is not None
    assert math.isfinite(value.item())
    assert logps.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_ranking_judges_every_pair_of_its_responses(name: str) -> None:
    ranking = Scores(
        logps=torch.tensor([-1.0, -2.0, -4.0]),
        num_tokens=torch.tensor([2, 3, 4]),
        pairs=torch.tensor([[0, 1], [0, 2], [1, 2]]),
        ref_logps=torch.tensor([-1.5, -1.0, -3.0]),
    )
    values = LOSSES[name]()(ranking)
    for number, pair in enumerate(ranking.pairs):
        alone = Scores(ranking.logps[pair], ranking.num_tokens[pair], torch.tensor([[0, 1]]), ranking.ref_logps[pair])
        assert values[number].item() == pytest.approx(LOSSES[name]()(alone).item())


def test_log_sigmoid_is_torch_s() -> None:
    x = torch.linspace(-200, 200, 801, dtype=torch.float64)
    assert torch.equal(log_sigmoid(x).isfinite(), torch.ones_like(x, dtype=torch.bool))
    torch.testing.assert_close(log_sigmoid(x), torch.nn.functional.logsigmoid(x))


def test_token_nll_is_one_value_a_scored_token() -> None:
    scores = Scores(torch.zeros(1), torch.tensor([3]), torch.zeros(0, 2), token_logps=torch.tensor([-0.5, -1.0, -3.0]))
    assert TokenNLL()(scores).tolist() == [0.5, 1.0, 3.0]


def test_losses_are_checked_without_torch() -> None:
    import subprocess
    import sys

    program = "import sys, dpoctl.core.losses; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0

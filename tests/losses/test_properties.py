"""What must hold for any loss of the catalogue, in any of its forms."""

import dataclasses
import math
import subprocess
import sys

import pytest
import torch
from loss_samples import BATCH, at_step, cast, having, of_margins, of_rankings, only, random_scores, with_equal_models

from dpoctl.losses import LOSSES, PreferenceLoss, Scores
from dpoctl.losses.base import log_sigmoid
from dpoctl.losses.listwise import PlackettLuce
from dpoctl.losses.pairwise import FDPO, IPO, WPO, Sigmoid
from dpoctl.losses.stepwise import BCOPair, BetaDPO
from dpoctl.losses.unpaired import KTO

VARIANTS: list[PreferenceLoss] = [
    *(loss() for loss in LOSSES.values()),
    Sigmoid(label_smoothing=0.2),
    Sigmoid(reference_free=True),
    IPO(average=False),
    KTO(desirable_weight=2.0),
    PlackettLuce(average=True),
    WPO(clamp=False),
    BCOPair(running_mean=False),
    FDPO(divergence="forward_kl"),
    FDPO(divergence="alpha", alpha=0.3),
    BetaDPO(parity="original"),
    *(BetaDPO(base=name) for name in ("ipo", "simpo", "hinge", "wpo", "ld_dpo")),
]
"""Every loss as it comes, and in the forms that compute something else."""

LOSS = pytest.mark.parametrize("loss", VARIANTS, ids=str)
OF_A_REFERENCE = [loss for loss in VARIANTS if loss.needs_reference and loss.at_init is not None]


@LOSS
def test_a_loss_is_frozen_and_has_the_keys_of_all(loss: PreferenceLoss) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        loss.beta = 1.0  # type: ignore[misc]
    assert loss.beta > 0
    assert loss.sft_weight >= 0
    assert {"beta", "sft_weight"} <= {field.name for field in dataclasses.fields(loss)}


@pytest.mark.parametrize("loss", OF_A_REFERENCE, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_equal_models_have_the_known_value_whatever_the_lengths(loss: PreferenceLoss, seed: int) -> None:
    scores = with_equal_models(random_scores(loss, seed))
    values = at_step(loss, scores)(scores)
    assert values.tolist() == pytest.approx([loss.at_init] * len(values))
    assert not loss.reward(scores).any()


def test_a_ranking_before_the_first_update_costs_the_log_of_its_orders() -> None:
    scores = of_rankings(*([0.0] * size for size in (2, 3, 4, 5)))
    assert LOSSES["plackett_luce"]()(scores).tolist() == pytest.approx(
        [math.log(math.factorial(k)) for k in (2, 3, 4, 5)]
    )
    assert LOSSES["s_dpo"]()(scores).tolist() == pytest.approx([math.log(k) for k in (2, 3, 4, 5)])


@LOSS
def test_gradients_are_those_of_finite_differences(loss: PreferenceLoss) -> None:
    scores = random_scores(loss)
    resolved = at_step(loss, scores)

    def values(logps: torch.Tensor, head_logps: torch.Tensor) -> torch.Tensor:
        return resolved(dataclasses.replace(scores, logps=logps, head_logps=head_logps))

    inputs = [scores.logps.requires_grad_()]
    inputs.append(scores.head_logps.requires_grad_("head" in loss.needs))  # type: ignore[union-attr]
    assert torch.autograd.gradcheck(values, inputs)


@LOSS
@pytest.mark.parametrize("size", [1e4, 1.0, 1e-6, 0.0])
@pytest.mark.parametrize("winner_is_better", [True, False])
def test_values_and_gradients_stay_finite(loss: PreferenceLoss, size: float, winner_is_better: bool) -> None:
    scores = cast(random_scores(loss), torch.float32)
    is_loser = torch.zeros(len(scores.logps)).index_fill(0, scores.pairs[:, 1], 1.0)
    far = is_loser if winner_is_better else 1 - is_loser
    logps = (-size * far).requires_grad_()
    for ref in (torch.zeros_like(far), -size * (1 - far)):
        extreme = dataclasses.replace(scores, logps=logps, ref_logps=ref, head_logps=logps, ref_head_logps=ref)
        values = at_step(loss, dataclasses.replace(extreme, logps=logps.detach()))(extreme)
        (gradient,) = torch.autograd.grad(values.sum(), logps)
        assert values.isfinite().all()
        assert gradient.isfinite().all()


@LOSS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(loss: PreferenceLoss, dtype: torch.dtype) -> None:
    half = cast(random_scores(loss), dtype)
    values, same = (at_step(loss, scores)(scores) for scores in (half, cast(half, torch.float32)))
    assert values.dtype == torch.float32
    assert torch.equal(values, same)


def test_gradients_reach_log_probabilities_in_half_precision() -> None:
    logps = BATCH.logps.bfloat16().requires_grad_()
    Sigmoid()(dataclasses.replace(BATCH, logps=logps)).sum().backward()
    assert logps.grad is not None
    assert logps.grad.dtype == torch.bfloat16
    assert logps.grad.all()


@pytest.mark.parametrize("loss", [loss for loss in VARIANTS if not loss.couples_batch], ids=str)
def test_a_loss_that_couples_nothing_judges_each_record_by_itself(loss: PreferenceLoss) -> None:
    scores = random_scores(loss)
    assert at_step(loss, scores) == loss
    torch.testing.assert_close(torch.cat([loss(only(scores, [record])) for record in range(4)]), loss(scores))


@pytest.mark.parametrize("loss", [loss for loss in VARIANTS if loss.couples_batch], ids=str)
def test_a_loss_that_couples_the_batch_does_not_mind_the_order_of_the_records(loss: PreferenceLoss) -> None:
    if isinstance(loss, BetaDPO):
        loss = dataclasses.replace(loss, filter_ratio=1e-9)
    scores = random_scores(loss)
    moved = only(scores, [3, 1, 0, 2])
    torch.testing.assert_close(at_step(loss, scores)(scores).sum(), at_step(loss, moved)(moved).sum())


@pytest.mark.parametrize(
    "loss", [loss for loss in VARIANTS if loss.item == "pairs" and not loss.couples_batch], ids=str
)
def test_a_ranking_judges_every_pair_of_its_responses(loss: PreferenceLoss) -> None:
    pairs = random_scores(loss)
    ranking = having(pairs, pairs=torch.tensor([[0, 1], [0, 2], [1, 2]]))
    for number, pair in enumerate(ranking.pairs):
        one = having(pairs, pairs=pair[None])
        assert loss(ranking)[number].item() == pytest.approx(loss(one).item())


@pytest.mark.parametrize(
    ("loss", "missing"),
    [
        ("ld_dpo", "head_logps"),
        ("wpo", "confidence"),
        ("aot", "ref_logps"),
    ],
)
def test_scores_without_what_a_loss_needs_are_refused(loss: str, missing: str) -> None:
    scores = random_scores(LOSSES[loss]())
    with pytest.raises(ValueError, match=f"needs {missing}"):
        LOSSES[loss]()(dataclasses.replace(scores, **{missing: None}))


def test_a_loss_of_log_probabilities_takes_no_notice_of_a_reference_that_others_need() -> None:
    without = Scores(BATCH.logps, BATCH.outline)
    for loss in (loss for loss in VARIANTS if not loss.needs_reference):
        assert torch.equal(loss(BATCH), loss(without))
        assert torch.equal(loss.reward(BATCH), loss.reward(without))


def test_a_ranking_of_two_is_a_pair() -> None:
    scores = random_scores(Sigmoid())
    for loss in (PlackettLuce(beta=0.3), PlackettLuce(beta=0.3, average=True), LOSSES["s_dpo"](beta=0.3)):
        torch.testing.assert_close(loss(scores), Sigmoid(beta=0.3)(scores))


def test_responses_whose_order_nobody_told_are_not_compared() -> None:
    # The best of three, and two that it beats: the choice of the best among all, and no other.
    partial = having(of_rankings([2, 0.5, -1]), pairs=torch.tensor([[0, 1], [0, 2]]))
    assert PlackettLuce(beta=0.1)(partial).tolist() == pytest.approx([0.956098], abs=1e-6)


def test_pairs_and_rankings_know_their_records() -> None:
    assert of_rankings([1, 0], [2, 1, 0], [1, 0]).outline.records.tolist() == [0, 0, 1, 1, 1, 2, 2]


def test_log_sigmoid_is_torch_s() -> None:
    x = torch.linspace(-200, 200, 801, dtype=torch.float64)
    torch.testing.assert_close(log_sigmoid(x), torch.nn.functional.logsigmoid(x))
    assert log_sigmoid(torch.tensor([-1e4, 1e4])).tolist() == [-1e4, 0]


def test_a_margin_that_is_a_tie_costs_as_much_either_way() -> None:
    assert Sigmoid()(of_margins([0.0])).item() == pytest.approx(math.log(2))


def test_losses_are_checked_without_torch() -> None:
    program = (
        "import sys; from dpoctl.losses import LOSSES; [loss() for loss in LOSSES.values()];"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0

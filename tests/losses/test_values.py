"""Every loss against numbers worked out by hand."""

import math
from dataclasses import replace

import pytest
import torch
from loss_samples import BATCH, having, of_margins, of_rankings, outline

from dpoctl.losses import LOSSES, PreferenceLoss, Scores, TargetNLL
from dpoctl.losses.listwise import SDPO, PlackettLuce
from dpoctl.losses.pairwise import (
    CPO,
    DPOP,
    FDPO,
    IPO,
    LDDPO,
    ORPO,
    RDPO,
    WPO,
    DiscoPOP,
    EXOPair,
    Hinge,
    Robust,
    Sigmoid,
    SigmoidNorm,
    SimPO,
)
from dpoctl.losses.stepwise import AOT, AOTUnpaired, BCOPair, BCOPairAtStep, BetaDPO
from dpoctl.losses.unpaired import KTO, APODown, APOZero, KTOAtStep, NCAPair, SPPOHard

# Records of KTO: both of the batch's winners, or both of its losers, before a response to another prompt.
DESIRABLE = having(BATCH, labels=torch.tensor([1, 1]))
UNDESIRABLE = replace(
    having(BATCH, labels=torch.tensor([0, 0])),
    logps=BATCH.logps[[1, 0, 3, 2]],
    ref_logps=BATCH.ref_logps[[1, 0, 3, 2]],
)
# A ranking, and a pair: the records of a batch need not be of one size.
RANKINGS = of_rankings([2, 0.5, -1], [2, -1])

# Tokens of the winner -1 -2 -.5 -.5 -1, of the loser -1 -1 -1; under the reference -1.2 -2 -.6 -.7 -1.5, -.9 -1.1 -.8.
HEADS = Scores(
    logps=torch.tensor([-5.0, -3.0], dtype=torch.float64),
    outline=outline([5, 3], [[0, 1]]),
    ref_logps=torch.tensor([-6.0, -2.8], dtype=torch.float64),
    head_logps=torch.tensor([-3.5, -3.0], dtype=torch.float64),
    ref_head_logps=torch.tensor([-3.8, -2.8], dtype=torch.float64),
)

ROWS: list[tuple[PreferenceLoss, Scores, list[float]]] = [
    (Sigmoid(beta=0.1), BATCH, [0.554355, 0.744397]),
    (Sigmoid(beta=0.1), of_margins([0, 10, 20]), [0.693147, 0.313262, 0.126928]),
    (Sigmoid(beta=0.1), of_margins([6]), [0.437488]),
    (Sigmoid(beta=0.1, reference_free=True), BATCH, [0.513015, 0.798139]),
    (Sigmoid(beta=0.1, label_smoothing=0.1), BATCH, [0.584355, 0.734397]),
    (Robust(beta=0.1, label_smoothing=0.1), BATCH, [0.516855, 0.756897]),
    (Hinge(beta=0.1), BATCH, [0.7, 1.1]),
    (Hinge(beta=0.1), of_margins([0, 10, 20, 6]), [1, 0, 0, 0.4]),
    (IPO(beta=0.1, average=False), BATCH, [4, 36]),
    (IPO(beta=0.1), BATCH, [20.025625, 26.351111]),
    (IPO(beta=0.1), of_margins([6]), [1]),
    (BetaDPO(beta=0.1), BATCH, [0.554355, 0.744397]),
    (SigmoidNorm(beta=5.0), BATCH, [0.069936, 1.081037]),
    (RDPO(beta=0.1, alpha=0.05), BATCH, [0.620957, 0.644397]),
    (DPOP(beta=0.1, penalty=5.0), BATCH, [0.554355, 0.883382]),
    (DPOP(beta=0.1, penalty=50.0), BATCH, [0.554355, 2.671645]),
    (SimPO(beta=2.0, gamma_beta_ratio=0.5), BATCH, [1.701413, 0.313262]),
    (CPO(beta=0.1), BATCH, [0.513015, 0.798139]),
    # The odds ratio alone: 0.1 log(1 + exp(0.295473)) and 0.1 log(1 + exp(-1.094344)).
    (ORPO(beta=0.1), BATCH, [0.0851757, 0.0288751]),
    (KTOAtStep(beta=0.1, z0=0.5), DESIRABLE, [0.462570, 0.524979]),
    (KTOAtStep(beta=0.1, z0=0.5), UNDESIRABLE, [0.462570, 0.5]),
    (KTOAtStep(beta=0.1, z0=0.5, desirable_weight=2.0, undesirable_weight=3.0), DESIRABLE, [0.925140, 1.049958]),
    (KTOAtStep(beta=0.1, z0=0.5, desirable_weight=2.0, undesirable_weight=3.0), UNDESIRABLE, [1.387710, 1.5]),
    # Mismatched log-ratios -1 and 0.5: their mean is below 0, so z0 is 0.
    (KTO(beta=0.1), DESIRABLE, [0.450166, 0.512497]),
    # Mismatched log-ratios 2 and -0.5: z0 is 0.75.
    (KTO(beta=0.1), UNDESIRABLE, [0.456361, 0.493750]),
    (PlackettLuce(beta=0.1), RANKINGS, [1.577055, 0.554355]),
    (PlackettLuce(beta=0.1, average=True), RANKINGS, [0.7885277, 0.554355]),
    (APOZero(beta=0.1), BATCH, [0.925187, 1.024995]),
    (APODown(beta=0.1), BATCH, [0.975391, 1.012482]),
    (LDDPO(beta=0.1, alpha=1.0), HEADS, [0.634946]),
    (LDDPO(beta=0.1, alpha=0.5), HEADS, [0.651550]),
    (LDDPO(beta=0.1, alpha=0.0), HEADS, [0.668460]),
    (WPO(beta=0.1), BATCH, [0.111922, 0.135989]),
    # Weights exp(0.2) and exp(-1.7), the first of them clamped by default.
    (WPO(beta=0.1), replace(BATCH, confidence=torch.tensor([0.3, -0.1, -0.2, -1.5])), [0.554355, 0.135989]),
    (WPO(beta=0.1, clamp=False), replace(BATCH, confidence=torch.tensor([0.3, -0.1, 0, 0])), [0.677091, 0.744397]),
    (EXOPair(beta=0.1, label_smoothing=1e-3), BATCH, [2.258199, 2.935004]),
    (NCAPair(beta=0.1), BATCH, [1.319407, 1.411919]),
    (BCOPair(beta=0.1, running_mean=False), BATCH, [1.242536, 1.436919]),
    (BCOPair(beta=0.1), BATCH, [1.242069, 1.437075]),
    (BCOPairAtStep(beta=0.1, delta=0.025), BATCH, [1.242069, 1.437075]),
    (SPPOHard(beta=0.1), BATCH, [25, 60.5]),
    (AOT(beta=0.1), BATCH, [0.744397, 0.554355]),
    (AOTUnpaired(beta=0.1), BATCH, [0.668460, 0.620957]),
    (DiscoPOP(beta=0.1, tau=0.05), BATCH, [0.740357, 0.787402]),
    (FDPO(beta=0.1, divergence="forward_kl"), BATCH, [0.572316, 0.746614]),
    (FDPO(beta=0.1, divergence="js"), BATCH, [0.635589, 0.718460]),
    (FDPO(beta=0.1, divergence="alpha"), BATCH, [0.573243, 0.744945]),
    (SDPO(beta=0.1), RANKINGS, [0.956098, 0.554355]),
]


@pytest.mark.parametrize(("loss", "scores", "values"), ROWS, ids=lambda value: str(value)[:60])
def test_the_values_are_the_paper_s(loss: PreferenceLoss, scores: Scores, values: list[float]) -> None:
    assert loss(scores).tolist() == pytest.approx(values, abs=1e-6)


def test_every_loss_of_the_catalogue_has_a_row() -> None:
    assert {kind for kind in LOSSES.values() if not any(isinstance(loss, kind) for loss, _, _ in ROWS)} == set()


@pytest.mark.parametrize(
    ("loss", "gradients"),
    [
        (Sigmoid(beta=0.1), [-0.042556, -0.052498]),
        (Sigmoid(beta=0.1, label_smoothing=0.1), [-0.032556, -0.042498]),
        (Robust(beta=0.1, label_smoothing=0.1), [-0.055056, -0.064998]),
        (IPO(beta=0.1, average=False), [-4, -12]),
    ],
)
def test_gradient_with_respect_to_the_margin(loss: PreferenceLoss, gradients: list[float]) -> None:
    logps = BATCH.logps.clone().requires_grad_()
    loss(replace(BATCH, logps=logps)).sum().backward()
    assert logps.grad is not None
    assert logps.grad[[0, 2]].tolist() == pytest.approx(gradients, abs=1e-6)
    assert logps.grad[[1, 3]].tolist() == pytest.approx([-g for g in gradients], abs=1e-6)


@pytest.mark.parametrize(("loss", "gradient"), [(Sigmoid(beta=0.1), -0.035434), (Hinge(beta=0.1), -0.1), (IPO(), 2)])
def test_gradient_at_a_margin_of_six(loss: PreferenceLoss, gradient: float) -> None:
    scores = of_margins([6])
    logps = scores.logps.requires_grad_()
    loss(scores).sum().backward()
    assert logps.grad is not None
    assert logps.grad[0].item() == pytest.approx(gradient, abs=1e-6)


@pytest.mark.parametrize(
    ("loss", "at_init"),
    [
        (Sigmoid(label_smoothing=0.3), math.log(2)),
        (Sigmoid(reference_free=True), None),
        (Robust(), math.log(2)),
        (Hinge(), 1),
        (IPO(beta=0.1), 25),
        (IPO(beta=0.01), 2500),
        (BetaDPO(base="hinge"), 1),
        (BetaDPO(base={"type": "ipo", "average": False}, beta=0.01), 2500),
        (SigmoidNorm(), math.log(2)),
        (RDPO(), None),
        (DPOP(), math.log(2)),
        (SimPO(), None),
        (CPO(), None),
        (ORPO(), None),
        (KTO(), 0.5),
        (KTO(desirable_weight=1.5, undesirable_weight=1.5), 0.75),
        (KTO(desirable_weight=1.5), None),
        (PlackettLuce(), None),
        (APOZero(), 1),
        (APODown(), 1),
        (LDDPO(), math.log(2)),
        (WPO(), None),
        (EXOPair(label_smoothing=1e-3), 2.761231),
        (NCAPair(), 1.386294),
        (BCOPair(), 1.386294),
        (SPPOHard(beta=1e-3), 500000),
        (SPPOHard(beta=0.1), 50),
        (AOT(), math.log(2)),
        (AOTUnpaired(), math.log(2)),
        (DiscoPOP(), 0.846574),
        (FDPO(), math.log(2)),
        (SDPO(), None),
    ],
    ids=lambda value: str(value)[:60],
)
def test_the_value_before_the_first_update_is_known(loss: PreferenceLoss, at_init: float | None) -> None:
    assert loss.at_init == (None if at_init is None else pytest.approx(at_init, abs=1e-6))


@pytest.mark.parametrize(
    ("loss", "rewards"),
    [
        (Sigmoid(beta=0.1), [0.2, -0.1, -0.05, 0.05]),
        (Sigmoid(beta=0.1, reference_free=True), [-1, -1.4, -2, -1.8]),
        (BetaDPO(beta=0.1), [0.2, -0.1, -0.05, 0.05]),
        (BetaDPO(beta=0.1, base="cpo"), [-1, -1.4, -2, -1.8]),
        (SigmoidNorm(beta=5.0), [2, -0.625, -0.25, 5 / 12]),
        (SimPO(beta=2.0), [-4, -3.5, -4, -6]),
        (CPO(beta=0.1), [-1, -1.4, -2, -1.8]),
        (ORPO(beta=0.1), [-0.2, -0.175, -0.2, -0.3]),
    ],
    ids=lambda value: str(value)[:60],
)
def test_the_reward_that_is_logged(loss: PreferenceLoss, rewards: list[float]) -> None:
    assert loss.reward(BATCH).tolist() == pytest.approx(rewards)


def test_the_reward_of_discounted_tails_is_discounted() -> None:
    # The winner's tail is 0.7 of its log-ratio of 1.
    assert LDDPO(beta=0.1, alpha=0.5).reward(HEADS).tolist() == pytest.approx([0.065, -0.02])


@pytest.mark.parametrize(
    ("loss", "values"),
    [(Sigmoid(beta=0.1), [2.554355, 2.744397]), (CPO(), [2.513015, 2.798139]), (ORPO(), [2.085176, 2.028875])],
)
def test_a_loss_with_its_likelihood_term(loss: PreferenceLoss, values: list[float]) -> None:
    likelihood = TargetNLL()(BATCH) / BATCH.num_tokens[BATCH.pairs[:, 0]]
    assert (loss(BATCH) + likelihood).tolist() == pytest.approx(values, abs=1e-6)

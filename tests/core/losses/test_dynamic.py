"""beta-DPO: its beta, its filter and its memory, against numbers worked out by hand and the statistics of its draws."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from loss_samples import BATCH, of_margins, random_scores

from dpoctl.core.losses import IPO, LOSSES, BetaDPO, Loss, Memory, Scores, Sigmoid, SimPO
from dpoctl.core.losses.dynamic import SettledBetaDPO

KEEP_ALL = 1e-9
"""A filter ratio that leaves nothing out, and is not refused as 0 is beside an alpha of 0."""
STEADY = {"gap_mean": 2.0, "gap_std": 1.0, "updates": 50.0}


def settle(loss: BetaDPO, scores: Scores, memory: Memory | None = None, step: int = 1) -> tuple[SettledBetaDPO, Memory]:
    settled, memory = loss.settle(scores, memory or {}, step=step, seed=0)
    assert isinstance(settled, SettledBetaDPO)
    return settled, memory


def figures(loss: Loss, scores: Scores) -> dict[str, float]:
    return {name: float(total) / count for name, (total, count) in loss.metrics(scores).items()}


@pytest.mark.parametrize(
    ("given", "before", "gaps", "figured", "mean"),
    [
        pytest.param({}, (0, 0), [1, 2, 3, 4], (0.235, 4, 0.25, 0.129099), 0.449832, id="cold"),
        pytest.param(
            {"filter_ratio": 0.2}, (2, 1), [0, 1.5, 2, 2.5, 10], (0.0628, 4, 2.12, 1.291472), 0.647587, id="steady"
        ),
        pytest.param(
            {"filter_ratio": 0.2, "gap_scale": "reward"},
            (0.2, 0.1),
            [0, 1.5, 2, 2.5, 10],
            (0.09628, 4, 0.212, 0.1291472),
            0.624552,
            id="steady, in rewards",
        ),
        pytest.param({}, (50, 5), [1, 2, 3, 4], (0.001, 4, 45.25, 4.629099), 0.691898, id="clamped"),
        pytest.param({"alpha": 0.0}, (2, 1), [1, 2, 3, 4], (0.1, 4, 2.05, 1.029099), 0.577477, id="plain DPO"),
    ],
)
def test_a_step_uses_the_beta_of_the_paper(
    given: dict[str, Any], before: tuple[float, float], gaps: list[float], figured: tuple[float, ...], mean: float
) -> None:
    loss = BetaDPO(beta=0.1, debias=False, **{"filter_ratio": KEEP_ALL} | given)
    scores = of_margins(gaps)
    settled, memory = settle(loss, scores, {"gap_mean": before[0], "gap_std": before[1], "updates": 7.0})
    names = ("beta_used", "mask_count", "gap_mean", "gap_std")
    assert figures(settled, scores) == pytest.approx(dict(zip(names, figured, strict=True)), abs=1e-6)
    assert memory == pytest.approx({"gap_mean": figured[2], "gap_std": figured[3], "updates": 8}, abs=1e-6)
    assert settled(scores).mean().item() == pytest.approx(mean, abs=1e-6)


def test_the_highest_beta_is_a_limit_too() -> None:
    settled, _ = settle(BetaDPO(debias=False, filter_ratio=0.0, beta_max=0.2), of_margins([1, 2, 3, 4]))
    assert settled.beta_used == 0.2


def test_a_pair_that_is_left_out_has_no_gradient_and_the_others_are_divided_by_their_number_in_the_step() -> None:
    # Eight pairs on two ranks, two of the first rank's left out: its mean must not weigh as much as the second's.
    scores = of_margins(range(8))
    scores.logps.requires_grad_()
    share = torch.tensor([0, 0, 1, 1, 1, 1, 1, 1]) * 8 / 6
    loss = SettledBetaDPO(beta_used=0.15, share=share, gap_mean=0.0, gap_std=1.0)
    mean = loss(scores).sum() / 8
    assert mean.item() == pytest.approx(0.418863, abs=1e-6)
    (gradient,) = torch.autograd.grad(mean, scores.logps)
    assert (gradient[::2] != 0).tolist() == [False, False] + [True] * 6


def test_equal_models_keep_every_pair_and_the_beta_of_the_recipe() -> None:
    for loss in (BetaDPO(), BetaDPO(debias=False), BetaDPO(parity="original")):
        scores, memory = of_margins([0.0] * 10), {}
        for step in range(3):
            settled, memory = settle(loss, scores, memory, step)
            assert figures(settled, scores) == {"beta_used": 0.1, "mask_count": 10, "gap_mean": 0, "gap_std": 0}
            assert settled(scores).tolist() == pytest.approx([math.log(2)] * 10)


def test_gaps_of_rounding_alone_leave_beta_where_it_is() -> None:
    settled, _ = settle(BetaDPO(), of_margins([1e-6, -1e-6, 2e-6, 0]))
    assert settled.beta_used == pytest.approx(0.1, abs=1e-6)
    assert settled.share.count_nonzero() == 3


def test_a_step_of_one_pair_is_kept_and_changes_no_memory() -> None:
    for memory in ({}, STEADY):
        settled, after = settle(BetaDPO(), of_margins([5.0]), memory)
        assert after == memory
        assert settled.beta_used == 0.1
        assert settled(of_margins([5.0])).item() == pytest.approx(Sigmoid()(of_margins([5.0])).item())


def test_corrected_moments_are_those_of_the_gaps_from_the_first_step_on() -> None:
    gaps = [1.0, 2.0, 3.0, 4.0]
    memory: Memory = {}
    for step in range(5):
        settled, memory = settle(BetaDPO(), of_margins(gaps), memory, step)
        assert settled.gap_mean == pytest.approx(2.5)
        assert settled.gap_std == pytest.approx(np.std(gaps, ddof=1))
        # 0.1, 0.19, ... of them are in the moving mean itself.
        assert memory["gap_mean"] == pytest.approx(2.5 * (1 - 0.9 ** (step + 1)))


@pytest.mark.parametrize(
    ("pairs", "ratio", "kept"), [(10, 0.9, 1), (2, 0.9, 1), (5, 0.2, 4), (32, 0.2, 25), (3, 0.0, 3)]
)
def test_the_number_of_kept_pairs(pairs: int, ratio: float, kept: int) -> None:
    settled, _ = settle(BetaDPO(filter_ratio=ratio), of_margins(range(pairs)))
    assert settled.share.count_nonzero() == kept
    assert settled.share.sum().item() == pytest.approx(pairs)
    assert settled.share.max().item() == pytest.approx(pairs / kept)


def test_draws_depend_on_the_seed_and_the_step_and_on_nothing_else() -> None:
    loss, scores = BetaDPO(filter_ratio=0.5), of_margins(np.linspace(-2, 2, 64))

    def kept(step: int, seed: int) -> tuple[bool, ...]:
        settled, _ = loss.settle(scores, STEADY, step=step, seed=seed)
        assert isinstance(settled, SettledBetaDPO)
        return tuple((settled.share > 0).tolist())

    first = kept(1, 0)
    torch.manual_seed(5)
    torch.rand(3)
    assert kept(1, 0) == first
    assert len({kept(step, seed) for step in range(4) for seed in range(4)}) == 16


def test_weights_decide_how_often_a_pair_is_drawn() -> None:
    # exp(-z^2 / 2) of these is 0.5, 0.3 and 0.2.
    z = np.sqrt(-2 * np.log([0.5, 0.3, 0.2]))
    generator = np.random.default_rng(0)
    loss = BetaDPO(filter_ratio=0.3)
    share = np.mean([loss._draw(z, generator) for _ in range(20_000)], axis=0)
    assert share == pytest.approx([0.839286, 0.675, 0.485714], abs=0.01)


def test_outliers_are_drawn_as_seldom_as_the_gaussian_says() -> None:
    generator = np.random.default_rng(0)
    loss = BetaDPO()
    z = generator.normal(size=(2_000, 32))
    # The moments of a batch are close to those that the gaps are drawn with; here they are the very ones.
    kept = np.array([loss._draw(row, generator) for row in z])
    place = (np.abs(z) / 0.5).astype(int)
    share = [kept[place == half].mean() for half in range(7)]
    assert share == pytest.approx([0.909, 0.852, 0.704, 0.464, 0.217, 0.067, 0.014], abs=0.02)


def test_weights_beyond_float32_are_still_compared_but_in_the_original() -> None:
    # Cold: z = 5.8, 13.6, 21.3, 29.0; the last weight is 6e-184.
    cold = {"debias": False, "filter_ratio": 0.25}
    scores = of_margins([4, 3, 2, 1])
    drawn = [settle(BetaDPO(**cold), scores, step=step)[0].share.tolist() for step in range(20)]
    assert all(share[0] == 0 for share in drawn)
    original = settle(BetaDPO(parity="original", filter_ratio=0.25), scores)[0]
    # The weights of gaps 4 and 3 are both 0 there: it takes one of them all the same.
    assert original.share.count_nonzero() == 3
    assert (original.gap_mean, original.gap_std) == pytest.approx((0.25, 0.129099), abs=1e-6)


def test_the_memory_survives_a_checkpoint_bit_by_bit() -> None:
    loss, scores = BetaDPO(), random_scores(BetaDPO())
    straight: Memory = {}
    resumed: Memory = {}
    for step in range(6):
        here, straight = settle(loss, scores, straight, step)
        there, resumed = settle(loss, scores, json.loads(json.dumps(resumed)), step)
        assert straight == resumed
        assert here.beta_used == there.beta_used


def test_evaluation_takes_the_base_loss_at_the_beta_of_the_recipe() -> None:
    loss = BetaDPO(beta=0.2, base={"type": "ipo", "average": False}, sft_weight=0.5)
    for one in (loss, settle(loss, BATCH)[0]):
        assert one.at_eval() == IPO(beta=0.2, average=False, sft_weight=0.5)
        assert torch.equal(one.reward(BATCH), 0.2 * BATCH.log_ratios)


def test_any_loss_of_a_pair_can_have_its_beta_moved() -> None:
    bases = [name for name, kind in LOSSES.items() if kind.item == "pairs" and not kind.couples_batch]
    assert {"sigmoid", "ipo", "hinge", "simpo", "ld_dpo"} <= set(bases)
    for name in bases:
        base = LOSSES[name]()
        loss = BetaDPO(beta=base.beta, alpha=0.05, filter_ratio=0.25, base=name)
        scores = random_scores(base)
        settled, _ = settle(loss, scores)
        kept = settled.share > 0
        gaps = (scores.differences(base.reward(scores)) / base.beta).double()
        assert settled.beta_used == pytest.approx(base.beta * (1 + 0.05 * float(gaps[kept].mean() - gaps.mean())))
        expected = LOSSES[name](beta=settled.beta_used)(scores)[kept].mean()
        assert settled(scores).mean().item() == pytest.approx(expected.item())
        assert (loss.needs, loss.needs_reference, loss.at_init()) == (base.needs, base.needs_reference, base.at_init())


def test_the_gap_of_a_loss_without_reference_is_that_of_its_own_reward() -> None:
    # Per token: -2 and -1.75, -2 and -3.
    settled, _ = settle(BetaDPO(beta=2.0, base="simpo", filter_ratio=0.0), BATCH)
    assert settled.gap_mean == pytest.approx((-0.25 + 1) / 2)
    assert settled.beta_used == pytest.approx(2.0)
    assert settled(BATCH).tolist() == pytest.approx(SimPO(beta=2.0)(BATCH).tolist())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"base": "kto"}, "base: expected one of sigmoid, robust, .*, got 'kto'"),
        ({"base": "beta_dpo"}, "got 'beta_dpo'"),
        ({"base": {"average": True}}, "base: expected one of .*, got None"),
        ({"base": {"type": "ipo", "averag": True}}, "base.averag: "),
        ({"base": {"type": "sigmoid", "label_smoothing": 0.7}}, "base.label_smoothing: .*less than 0.5"),
        ({"base": {"type": "sigmoid", "beta": 0.7}}, "base.beta: beta stands beside base"),
        ({"base": {"type": "sigmoid", "sft_weight": 0.7}}, "base.sft_weight: sft_weight stands beside base"),
        ({"base": {"type": "f_dpo", "divergence": "js", "alpha": 0.5}}, "alpha does nothing"),
        ({"alpha": 0.0, "filter_ratio": 0.0}, "both 0, which is the base loss itself"),
        ({"alpha": 0.0, "beta_max": 0.3}, "alpha: 0 leaves nothing to do for beta_max;"),
        ({"alpha": 0.0, "beta_min": 0.01, "gap_scale": "reward"}, "nothing to do for beta_min, gap_scale;"),
        ({"beta": 1e-4}, "beta must be between"),
        ({"beta_max": 0.05}, "beta must be between"),
        ({"parity": "original", "debias": True}, "parity: original has its own debias"),
        ({"parity": "original", "momentum": 0.5, "base": "ipo"}, "has its own momentum, base;"),
        ({"parity": "original", "gap_scale": "reward"}, "has its own gap_scale;"),
        ({"parity": "original", "beta_max": 0.3, "beta_min": 0.01}, "has its own beta_min, beta_max;"),
    ],
)
def test_what_is_no_base_or_would_do_nothing_is_refused_in_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        BetaDPO(**given)
    assert "\n" not in str(refused.value)

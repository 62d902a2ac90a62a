"""Losses that depend on the whole step: their statistics and memory, and beta-DPO's beta, filter and draws."""

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from loss_samples import BATCH, at_step, having, of_margins, only, random_scores

from dpoctl.losses import LOSSES, Loss, Memory, PreferenceLoss, Scores
from dpoctl.losses.pairwise import IPO, Sigmoid, SimPO
from dpoctl.losses.stepwise import AOTUnpaired, BCOPair, BetaDPO, BetaDPOAtStep
from dpoctl.losses.unpaired import KTO

LABELLED = having(BATCH, labels=torch.tensor([1, 0]))


def test_kto_compares_with_the_mean_of_the_mismatched_responses_of_the_step() -> None:
    # The mismatched log-ratios are -1 and 5.
    scores = replace(LABELLED, logps=torch.tensor([-10.0, -14, -20, -13.5], dtype=torch.float64))
    loss, memory = KTO(beta=0.1).for_step(scores, {}, step=3, seed=0)
    assert memory == {}
    assert loss.metrics(scores) == {"kl": (2.0, 1)}
    expected = torch.tensor([-0.1 * (2 - 2), -0.1 * (2 - -0.5)], dtype=torch.float64).sigmoid()
    torch.testing.assert_close(loss(scores), expected)


def test_kto_does_not_compare_with_less_than_the_reference() -> None:
    # The mismatched log-ratios are -1 and 0.5.
    assert at_step(KTO(), LABELLED).metrics(LABELLED) == {"kl": (0.0, 1)}


def test_kto_has_the_same_values_for_a_part_of_the_step_as_for_the_whole() -> None:
    scores = random_scores(KTO())
    loss = at_step(KTO(), scores)
    parts = [loss(only(scores, [0])), loss(only(scores, [1, 2])), loss(only(scores, [3]))]
    torch.testing.assert_close(torch.cat(parts), loss(scores))


def test_no_gradient_flows_into_the_mismatched_responses_of_kto() -> None:
    logps = torch.tensor([-10.0, -9.0, -20.0, -13.5], requires_grad=True)
    scores = replace(LABELLED, logps=logps, ref_logps=torch.full_like(logps, -12))
    (gradient,) = torch.autograd.grad(KTO()(scores).sum(), logps)
    # A desirable response is to rise, an undesirable one to fall.
    assert gradient.sign().tolist() == [-1, 0, 1, 0]


def test_bco_remembers_the_mean_reward_of_all_steps_so_far() -> None:
    loss = BCOPair(beta=0.1)
    memory: Memory = {}
    seen: list[float] = []
    for step, records in enumerate([[0], [1, 2], [3, 0, 1]]):
        scores = only(random_scores(loss), records)
        now, memory = loss.for_step(scores, json.loads(json.dumps(memory)), step=step, seed=0)
        seen += loss.reward(scores).tolist()
        mean = sum(seen) / len(seen)
        assert now.metrics(scores) == {"delta": (pytest.approx(mean), 1)}
        assert memory == {"count": len(seen), "mean": pytest.approx(mean)}
        won, lost = scores.split(loss.reward(scores))
        torch.testing.assert_close(now(scores), torch.log1p((mean - won).exp()) + torch.log1p((lost - mean).exp()))


def test_bco_without_a_running_mean_remembers_nothing() -> None:
    loss = BCOPair(running_mean=False)
    assert loss.for_step(BATCH, {}, step=0, seed=0) == (loss, {})


def test_aot_unpaired_compares_winners_with_the_losers_of_other_prompts() -> None:
    # Winners 2 and -0.5 against losers -1 and 0.5: in order, -0.5 against -1 and 2 against 0.5.
    crossed = having(BATCH, pairs=torch.tensor([[0, 3], [2, 1]]))
    assert AOTUnpaired()(crossed).tolist() == AOTUnpaired()(BATCH).tolist()
    assert Sigmoid()(crossed).tolist() != Sigmoid()(BATCH).tolist()


@pytest.mark.parametrize("loss", [KTO(), BCOPair(), AOTUnpaired(beta=0.1)], ids=str)
def test_evaluation_is_by_the_statistics_of_the_evaluated_step(loss: PreferenceLoss) -> None:
    scores = random_scores(loss)
    assert at_step(loss.at_eval(), scores)(scores).tolist() == pytest.approx(loss.at_eval()(scores).tolist())


KEEP_ALL = 1e-9
"""A filter ratio that leaves nothing out, and is not refused as 0 is beside an alpha of 0."""
STEADY = {"gap_mean": 2.0, "gap_std": 1.0, "updates": 50.0}


def step_of(loss: BetaDPO, scores: Scores, memory: Memory | None = None, step: int = 1) -> tuple[BetaDPOAtStep, Memory]:
    now, memory = loss.for_step(scores, memory or {}, step=step, seed=0)
    assert isinstance(now, BetaDPOAtStep)
    return now, memory


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
    now, memory = step_of(loss, scores, {"gap_mean": before[0], "gap_std": before[1], "updates": 7.0})
    names = ("beta_used", "mask_count", "gap_mean", "gap_std")
    assert figures(now, scores) == pytest.approx(dict(zip(names, figured, strict=True)), abs=1e-6)
    assert memory == pytest.approx({"gap_mean": figured[2], "gap_std": figured[3], "updates": 8}, abs=1e-6)
    assert now(scores).mean().item() == pytest.approx(mean, abs=1e-6)


def test_the_highest_beta_is_a_limit_too() -> None:
    now, _ = step_of(BetaDPO(debias=False, filter_ratio=0.0, beta_max=0.2), of_margins([1, 2, 3, 4]))
    assert now.beta_used == 0.2


def test_a_pair_that_is_left_out_has_no_gradient_and_the_others_are_divided_by_their_number_in_the_step() -> None:
    # Eight pairs on two ranks, two of the first rank's left out: its mean must not weigh as much as the second's.
    scores = of_margins(range(8))
    scores.logps.requires_grad_()
    share = torch.tensor([0, 0, 1, 1, 1, 1, 1, 1]) * 8 / 6
    loss = BetaDPOAtStep(beta_used=0.15, share=share, gap_mean=0.0, gap_std=1.0)
    mean = loss(scores).sum() / 8
    assert mean.item() == pytest.approx(0.418863, abs=1e-6)
    (gradient,) = torch.autograd.grad(mean, scores.logps)
    assert (gradient[::2] != 0).tolist() == [False, False] + [True] * 6


def test_equal_models_keep_every_pair_and_the_beta_of_the_recipe() -> None:
    for loss in (BetaDPO(), BetaDPO(debias=False), BetaDPO(parity="original")):
        scores, memory = of_margins([0.0] * 10), {}
        for step in range(3):
            now, memory = step_of(loss, scores, memory, step)
            assert figures(now, scores) == {"beta_used": 0.1, "mask_count": 10, "gap_mean": 0, "gap_std": 0}
            assert now(scores).tolist() == pytest.approx([math.log(2)] * 10)


def test_gaps_of_rounding_alone_leave_beta_where_it_is() -> None:
    now, _ = step_of(BetaDPO(), of_margins([1e-6, -1e-6, 2e-6, 0]))
    assert now.beta_used == pytest.approx(0.1, abs=1e-6)
    assert now.share.count_nonzero() == 3


def test_a_step_of_one_pair_is_kept_and_changes_no_memory() -> None:
    for memory in ({}, STEADY):
        now, after = step_of(BetaDPO(), of_margins([5.0]), memory)
        assert after == memory
        assert now.beta_used == 0.1
        assert now(of_margins([5.0])).item() == pytest.approx(Sigmoid()(of_margins([5.0])).item())


def test_corrected_moments_are_those_of_the_gaps_from_the_first_step_on() -> None:
    gaps = [1.0, 2.0, 3.0, 4.0]
    memory: Memory = {}
    for step in range(5):
        now, memory = step_of(BetaDPO(), of_margins(gaps), memory, step)
        assert now.gap_mean == pytest.approx(2.5)
        assert now.gap_std == pytest.approx(np.std(gaps, ddof=1))
        # 0.1, 0.19, ... of them are in the moving mean itself.
        assert memory["gap_mean"] == pytest.approx(2.5 * (1 - 0.9 ** (step + 1)))


@pytest.mark.parametrize(
    ("pairs", "ratio", "kept"), [(10, 0.9, 1), (2, 0.9, 1), (5, 0.2, 4), (32, 0.2, 25), (3, 0.0, 3)]
)
def test_the_number_of_kept_pairs(pairs: int, ratio: float, kept: int) -> None:
    now, _ = step_of(BetaDPO(filter_ratio=ratio), of_margins(range(pairs)))
    assert now.share.count_nonzero() == kept
    assert now.share.sum().item() == pytest.approx(pairs)
    assert now.share.max().item() == pytest.approx(pairs / kept)


def test_draws_depend_on_the_seed_and_the_step_and_on_nothing_else() -> None:
    loss, scores = BetaDPO(filter_ratio=0.5), of_margins(np.linspace(-2, 2, 64))

    def kept(step: int, seed: int) -> tuple[bool, ...]:
        now, _ = loss.for_step(scores, STEADY, step=step, seed=seed)
        assert isinstance(now, BetaDPOAtStep)
        return tuple((now.share > 0).tolist())

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
    drawn = [step_of(BetaDPO(**cold), scores, step=step)[0].share.tolist() for step in range(20)]
    assert all(share[0] == 0 for share in drawn)
    original = step_of(BetaDPO(parity="original", filter_ratio=0.25), scores)[0]
    # The weights of gaps 4 and 3 are both 0 there: it takes one of them all the same.
    assert original.share.count_nonzero() == 3
    assert (original.gap_mean, original.gap_std) == pytest.approx((0.25, 0.129099), abs=1e-6)


def test_the_memory_survives_a_checkpoint_bit_by_bit() -> None:
    loss, scores = BetaDPO(), random_scores(BetaDPO())
    straight: Memory = {}
    resumed: Memory = {}
    for step in range(6):
        here, straight = step_of(loss, scores, straight, step)
        there, resumed = step_of(loss, scores, json.loads(json.dumps(resumed)), step)
        assert straight == resumed
        assert here.beta_used == there.beta_used


def test_evaluation_takes_the_base_loss_at_the_beta_of_the_recipe() -> None:
    loss = BetaDPO(beta=0.2, base={"type": "ipo", "average": False}, sft_weight=0.5)
    for one in (loss, step_of(loss, BATCH)[0]):
        assert one.at_eval() == IPO(beta=0.2, average=False, sft_weight=0.5)
        assert torch.equal(one.reward(BATCH), 0.2 * BATCH.log_ratios)


def test_any_loss_of_a_pair_can_have_its_beta_moved() -> None:
    bases = [name for name, kind in LOSSES.items() if kind.item == "pairs" and not kind.couples_batch]
    assert {"sigmoid", "ipo", "hinge", "simpo", "ld_dpo"} <= set(bases)
    for name in bases:
        base = LOSSES[name]()
        loss = BetaDPO(beta=base.beta, alpha=0.05, filter_ratio=0.25, base=name)
        scores = random_scores(base)
        now, _ = step_of(loss, scores)
        kept = now.share > 0
        gaps = (scores.differences(base.reward(scores)) / base.beta).double()
        assert now.beta_used == pytest.approx(base.beta * (1 + 0.05 * float(gaps[kept].mean() - gaps.mean())))
        expected = LOSSES[name](beta=now.beta_used)(scores)[kept].mean()
        assert now(scores).mean().item() == pytest.approx(expected.item())
        assert (loss.needs, loss.needs_reference, loss.at_init) == (base.needs, base.needs_reference, base.at_init)


def test_the_gap_of_a_loss_without_reference_is_that_of_its_own_reward() -> None:
    # Per token: -2 and -1.75, -2 and -3.
    now, _ = step_of(BetaDPO(beta=2.0, base="simpo", filter_ratio=0.0), BATCH)
    assert now.gap_mean == pytest.approx((-0.25 + 1) / 2)
    assert now.beta_used == pytest.approx(2.0)
    assert now(BATCH).tolist() == pytest.approx(SimPO(beta=2.0)(BATCH).tolist())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"base": "kto"}, "base: expected one of sigmoid, robust, .*, got 'kto'"),
        ({"base": "beta_dpo"}, "got 'beta_dpo'"),
        ({"base": {"average": True}}, "base: expected one of .*, got None"),
        ({"base": {"type": "ipo", "averag": True}}, "base.averag: "),
        ({"base": {"type": "sigmoid", "label_smoothing": 0.7}}, "base.label_smoothing: .*less than 0.5"),
        ({"base": {"type": "sigmoid", "beta": 0.7}}, "base.beta: write beta beside base"),
        ({"base": {"type": "sigmoid", "sft_weight": 0.7}}, "base.sft_weight: write sft_weight beside base"),
        ({"base": {"type": "f_dpo", "divergence": "js", "alpha": 0.5}}, "alpha does nothing"),
        ({"alpha": 0.0, "filter_ratio": 0.0}, "both 0, which is the base loss itself"),
        ({"alpha": 0.0, "beta_max": 0.3}, "^beta_max has no effect with alpha: 0; remove it, or set alpha above 0$"),
        (
            {"alpha": 0.0, "beta_min": 0.01, "gap_scale": "reward"},
            "^beta_min and gap_scale have no effect .*; remove them,",
        ),
        ({"beta": 1e-4}, r"^beta \(0\.0001\) must be at least beta_min \(0\.001\)$"),
        ({"beta_max": 0.05}, r"^beta \(0\.1\) must be at least beta_min \(0\.001\) and at most beta_max \(0\.05\)$"),
        (
            {"parity": "original", "debias": True},
            "^debias cannot be set with parity: original, which uses its own value; remove it, or set parity: ours$",
        ),
        (
            {"parity": "original", "momentum": 0.5, "base": "ipo"},
            "^momentum and base cannot .* own values; remove them,",
        ),
        ({"parity": "original", "gap_scale": "reward"}, "^gap_scale cannot be set with parity: original"),
        ({"parity": "original", "beta_max": 0.3, "beta_min": 0.01}, "^beta_min and beta_max cannot be set with"),
    ],
)
def test_what_is_no_base_or_would_do_nothing_is_refused_in_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        BetaDPO(**given)
    assert "\n" not in str(refused.value)

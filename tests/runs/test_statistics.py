"""Statistics of an evaluation: against statsmodels and scipy, by hand, and on evaluations with a planted truth."""

import math
from typing import Any

import numpy as np
import pytest

from dpoctl.runs.statistics import (
    Calibration,
    Estimate,
    corrected,
    difference_p_value,
    length_controlled,
    mean,
    minimum_detectable,
    ratio,
    share,
    t_p_value,
    t_quantile,
    wilson_interval,
)

TWO_EACH = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
WINS = [1, 0, 1, 1, 0.5, 0, 1, 0.5, 1, 1, 0, 1]
LENGTHS = [5, -3, 8, 1, -7, 2, 4, -1, 9, -6]
VOTES = [1, 0, 1, 0, 0, 1, 0.5, 1, 1, 0.5]


def test_means_are_those_of_statsmodels_with_clustered_errors() -> None:
    # OLS on a constant with a clustered covariance and Student's t.
    found = mean(WINS, TWO_EACH)
    assert (found.value, found.error) == (pytest.approx(2 / 3), pytest.approx(0.12360331))
    assert found.interval == pytest.approx((0.34893425, 0.98439909))
    assert found.method == "t interval, errors clustered by prompt"
    assert difference_p_value(WINS, TWO_EACH) == pytest.approx(0.00295755, rel=1e-5)
    # Answers that repeat each other are no further evidence.
    alone = mean(WINS[::2], range(6))
    assert mean(np.repeat(WINS[::2], 7), np.repeat(range(6), 7).tolist()).error == pytest.approx(alone.error)


def test_ratios_are_those_of_statsmodels() -> None:
    # WLS of x / y on a constant with the weights y, a clustered covariance and Student's t.
    found = ratio([3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8], TWO_EACH[:8])
    assert (found.value, found.error) == (pytest.approx(31 / 37), pytest.approx(0.22244082))
    assert found.interval == pytest.approx((0.12993187, 1.5457438))


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.70620474), (2, 4.30265273), (5, 2.57058184), (30, 2.04227246), (500, 1.96471984)]
)
def test_quantiles_of_students_t_are_those_of_scipy(freedom: int, quantile: float) -> None:
    assert t_quantile(0.975, freedom) == pytest.approx(quantile, rel=1e-8)


@pytest.mark.parametrize(
    ("t", "freedom", "p"), [(2.0, 10, 0.07338803), (0.3, 3, 0.78376329), (-8.0, 4, 0.0013239), (0.0, 7, 1.0)]
)
def test_p_values_of_students_t_are_those_of_scipy(t: float, freedom: int, p: float) -> None:
    assert t_p_value(t, freedom) == pytest.approx(p, rel=1e-5)


def test_no_difference_and_a_single_prompt_have_no_p_value_to_speak_of() -> None:
    assert difference_p_value([0.0, 0.0], [1, 2]) == 1
    assert difference_p_value([3.0, 5.0], [1, 1]) == 1
    assert difference_p_value([2.0, 2.0], [1, 2]) == 0
    assert mean([1.0, 2.0], [0, 0]).named("m") == {"m": 1.5}


def test_a_share_of_independent_votes_has_wilsons_interval() -> None:
    votes = [1] * 700 + [0] * 300
    found = share(votes, range(1000))
    assert found.interval == pytest.approx(wilson_interval(0.7, 1000))
    assert found.method == "Wilson interval of the effective number of prompts, errors clustered by prompt"
    # Records of one pair each, and some without any.
    counted = share(votes + [0] * 50, range(1050), [1] * 1000 + [0] * 50)
    assert (counted.error, counted.interval) == (found.error, found.interval)


def test_votes_of_the_same_prompt_widen_wilsons_interval_as_worked_out_by_hand() -> None:
    # Residuals by prompt 2/3, -1/3, -1/3: se^2 = 3/2 (2/3) / 36 = 1/36. Of independent votes 2/9 / 5 = 2/45.
    # t(5) = 2.570582 and t(2) = 4.302653: 6 (2/45) 36 (2.570582 / 4.302653)^2 = 3.426583 independent votes.
    found = share([1, 1, 0, 1, 1, 0], ["a", "a", "b", "b", "c", "c"])
    assert found.error == pytest.approx(1 / 6)
    assert found.interval == pytest.approx(wilson_interval(2 / 3, 3.426583), abs=1e-6)
    # The same as two pairs in each of three records.
    assert share([2, 1, 1], range(3), [2, 2, 2]).interval == pytest.approx(found.interval)
    # Copies are no evidence: they may not narrow it.
    low, high = share(WINS[::2], range(6)).interval or (0, 1)
    lower, higher = share(WINS[::2] * 20, [*range(6)] * 20).interval or (0, 1)
    assert lower < low < high < higher


def test_votes_that_all_agree_leave_an_interval() -> None:
    # The chance of ten of ten is 0.025 at the lower end, and that of none of four at the upper one.
    assert share([1.0] * 10, range(10)).interval == pytest.approx((0.6915029, 1.0), abs=1e-6)
    assert share([1.0] * 10, [0, 1] * 5).interval == pytest.approx((0.1581139, 1.0), abs=1e-6)
    assert share([0.0] * 4, range(4)).interval == pytest.approx((0.0, 0.6023646), abs=1e-6)
    # Four of four come up by chance one time in eight: no difference from one half is shown.
    low, _ = share([1.0] * 4, range(4)).interval or (1.0, 1.0)
    assert low < 0.5
    halves = share([0.5] * 10, range(10))
    assert halves.value == 0.5
    assert halves.interval is not None
    assert halves.interval[0] < 0.3 < 0.7 < halves.interval[1]
    assert share([1.0, 1.0], [0, 0]).interval == pytest.approx((0.025, 1.0))


def test_the_logistic_regression_is_statsmodels_glm_where_data_are_many() -> None:
    # sm.GLM(y, [1, tanh(d / d.std())], Binomial()) on 400 copies: 1 / (1 + exp(-0.24722475)), error 0.03339502.
    found = length_controlled(VOTES * 400, LENGTHS * 400, range(4000))
    assert found.value == pytest.approx(0.56149330, abs=5e-5)
    assert found.error == pytest.approx(0.03339502 * 0.5614933 * 0.4385067, rel=1e-3)


def test_without_lengths_the_regression_is_firths_share() -> None:
    # Jeffreys' prior adds half a win and half a loss.
    assert length_controlled([1, 1, 1, 0], [3, 3, 3, 3], range(4)).value == pytest.approx(3.5 / 5)
    assert length_controlled([1] * 9, [0] * 9, range(9)).value == pytest.approx(9.5 / 10)


def test_a_judge_of_lengths_alone_gives_a_length_controlled_half() -> None:
    rng = np.random.default_rng(3)
    lengths = rng.normal(15, 40, 120)
    wins = (lengths > 0).astype(float)
    assert share(wins, range(120)).interval[0] > 0.5  # type: ignore[index]
    found = length_controlled(wins, lengths, range(120))
    assert found.interval is not None
    assert found.interval[0] < 0.5 < found.interval[1]
    assert abs(found.value - 0.5) < (found.error or 0)
    # If each answer is longer, nothing tells length from quality.
    longer = length_controlled(np.ones(50), np.abs(lengths[:50]) + 1, range(50))
    assert longer.interval is not None
    assert longer.interval[0] < 0.5


def test_the_minimum_detectable_difference_is_2_8_errors() -> None:
    found = Estimate(0.6, 0.05, (0.5, 0.7), "")
    assert minimum_detectable(found, [0, 1], [0, 1]) == pytest.approx(0.05 * (1.959964 + 0.8416212), rel=1e-6)
    assert minimum_detectable(Estimate(1.0, 0.0, None, ""), [1] * 25, range(25)) == pytest.approx(0.1 * 2.8015852)


def test_a_judges_errors_are_taken_out_as_in_the_paper() -> None:
    calibration = Calibration(sensitivity=0.9, specificity=0.7, positives=100, negatives=80)
    found = corrected(Estimate(0.6, None, None, ""), 200, calibration)
    assert found.value == pytest.approx((0.6 + 0.7 - 1) / (0.7 + 0.9 - 1))
    # By hand, with z = 1.96: p, q0, q1 become 0.598115, 0.695122, 0.892157, theta 0.499314, and its error 0.077327.
    assert found.interval == pytest.approx((0.34143, 0.64455), abs=2e-5)
    assert corrected(Estimate(0.2, 0.01, None, ""), 200, calibration).value == 0
    assert not Calibration(0.5, 0.5, 10, 10).is_informative
    assert not Calibration(1.0, 1.0, 10, 0).is_informative


def simulated(rng: np.random.Generator, prompts: int, per_prompt: int, rate: float) -> tuple[Any, Any, Any]:
    """Votes with ties, lengths, and prompts of which some favour the policy."""
    clusters = np.repeat(np.arange(prompts), per_prompt)
    chances = rng.beta(4 * rate, 4 * (1 - rate), prompts)[clusters]
    wins = (rng.random(len(clusters)) < chances).astype(float)
    wins[rng.random(len(clusters)) < 0.2] = 0.5
    return wins, clusters.tolist(), 0.8 * rate + 0.1


@pytest.mark.parametrize(("prompts", "per_prompt", "rate"), [(40, 3, 0.6), (100, 1, 0.5), (30, 2, 0.85)])
def test_intervals_of_200_evaluations_cover_the_planted_win_rate(prompts: int, per_prompt: int, rate: float) -> None:
    rng = np.random.default_rng(prompts)
    covered = 0
    for _ in range(200):
        wins, clusters, truth = simulated(rng, prompts, per_prompt, rate)
        low, high = share(wins, clusters).interval or (0, 1)
        covered += low <= truth <= high
    assert 180 <= covered <= 198


def test_intervals_of_200_evaluations_cover_the_planted_win_rate_between_equal_lengths() -> None:
    rng = np.random.default_rng(5)
    covered = 0
    for _ in range(200):
        lengths = rng.normal(20, 30, 100)
        chances = 1 / (1 + np.exp(-(0.4 + 2 * np.tanh(lengths / 30))))
        wins = (rng.random(100) < chances).astype(float)
        low, high = length_controlled(wins, lengths, range(100)).interval or (0, 1)
        covered += low <= 1 / (1 + math.exp(-0.4)) <= high
    assert 180 <= covered <= 198


def test_intervals_of_200_evaluations_cover_the_truth_behind_a_judge_that_errs() -> None:
    rng = np.random.default_rng(6)
    covered = 0
    for _ in range(200):
        truth = rng.random(150) < 0.65
        votes = np.where(rng.random(150) < np.where(truth, 0.85, 0.75), truth, ~truth).astype(float)
        right = rng.random(60) < np.repeat([0.85, 0.75], 30)
        calibration = Calibration(float(right[:30].mean()), float(right[30:].mean()), 30, 30)
        low, high = corrected(share(votes, range(150)), 150, calibration).interval or (0, 1)
        covered += low <= 0.65 <= high
    assert 180 <= covered <= 198

import math
import random

import pytest

from dpoctl.runs.health import Expectation, Health

LN2 = math.log(2)


def train(step, loss=0.5, **metrics):
    return {"step": step, "loss": loss, "grad_norm": 1.0, **metrics}


def watched(expected, *rows):
    health = Health(expected)
    for row in rows:
        health.watch(row)
    return health


def codes(expected, *rows):
    return [symptom.code for symptom in watched(expected, *rows).symptoms]


def test_a_healthy_run_has_no_symptoms():
    expected = Expectation(100, warmup_steps=10, at_init=LN2)
    rows = [
        {"step": 0, "eval_loss": LN2, "eval_samples/median_length": 20.0},
        *(train(s, LN2 - s / 200, **{"rewards/chosen": 0.1, "rewards/accuracies": 0.8}) for s in range(10, 101, 10)),
        {"step": 100, "eval_loss": 0.4, "eval_samples/median_length": 24.0},
    ]
    assert codes(expected, *rows) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, "nan"])
def test_a_number_that_is_none_is_named(value):
    health = Health(Expectation(10))
    (symptom,) = health.watch(train(3, value))
    assert symptom.code == "not_finite"
    assert str(symptom).startswith("step 3: loss is not finite")


def test_a_wrong_first_evaluation_is_named():
    expected = Expectation(10, at_init=LN2)
    assert codes(expected, {"step": 0, "eval_loss": 0.75}) == ["wrong_start"]
    assert codes(expected, {"step": 0, "eval_loss": 0.695}) == []
    assert codes(expected, {"step": 5, "eval_loss": 0.75}) == []


def test_a_loss_that_does_not_move_is_named_with_its_cause():
    expected = Expectation(100, warmup_steps=10, at_init=LN2)
    still = [train(step, LN2 - 1e-4) for step in range(10, 60, 10)]
    assert codes(expected, *still) == ["stuck"]
    assert codes(expected, *(row | {"grad_norm": 0.0} for row in still)) == ["stuck"]
    few = [train(step, LN2 - 1e-5) for step in range(1, 9)]
    short = Expectation(8, warmup_steps=1, at_init=LN2)
    assert codes(short, *few) == []
    assert codes(short, *(row | {"grad_norm": 0.0} for row in few)) == ["stuck"]
    health = watched(expected, *(row | {"grad_norm": 0.0} for row in still))
    assert "gradient is zero" in health.symptoms[0].message
    assert "too small" in watched(expected, *still).symptoms[0].message


def test_a_loss_may_stand_still_during_warm_up_and_move_now_and_then():
    expected = Expectation(100, warmup_steps=30, at_init=LN2)
    assert codes(expected, *(train(step, LN2) for step in (10, 20, 30, 40))) == []
    assert codes(expected, *(train(step, LN2 - 0.01 * (step == 60)) for step in (50, 60, 70, 80))) == []


def test_chosen_answers_that_become_less_likely_are_named_in_nats():
    rows = [{"step": step, "eval_logps/chosen": logps} for step, logps in ((0, -120.0), (10, -125.0), (20, -150.0))]
    health = watched(Expectation(100), *rows)
    assert [(s.code, s.step) for s in health.symptoms] == [("chosen_falling", 20)]
    assert "30.0 nats" in health.symptoms[0].message
    # Long answers vary more: the same fall is a smaller share of them.
    assert codes(Expectation(100), *(row | {"eval_logps/chosen": row["eval_logps/chosen"] - 300} for row in rows)) == []


def test_without_evaluation_the_steps_show_that_chosen_answers_fall():
    falling = [train(step, **{"logps/chosen": -100.0 - step + step % 3}) for step in range(10, 130, 10)]
    health = watched(Expectation(1000), *falling)
    assert [symptom.code for symptom in health.symptoms] == ["chosen_falling"]
    assert "99.9 % interval" in health.symptoms[0].message
    assert codes(Expectation(1000), *falling[:9]) == []


@pytest.mark.parametrize("seed", range(20))
def test_steps_of_uneven_rows_are_no_trend(seed):
    rng = random.Random(seed)
    rows = [train(step, **{"logps/chosen": rng.gauss(-300, 60)}) for step in range(1, 61)]
    assert codes(Expectation(1000), *rows) == []


def test_a_policy_that_moves_without_a_change_of_the_loss_is_not_stuck():
    expected = Expectation(100, warmup_steps=10, at_init=LN2)
    still = [train(step, LN2 - 1e-4, **{"rewards/chosen": 0.2, "rewards/rejected": 0.2}) for step in range(20, 60, 10)]
    assert codes(expected, *still) == []
    assert codes(expected, *(row | {"rewards/chosen": 1e-4, "rewards/rejected": 0.0} for row in still)) == ["stuck"]


def test_a_perfect_accuracy_is_suspicious_early_and_welcome_late():
    def rows(*steps):
        return [train(step, **{"rewards/accuracies": 1.0}) for step in steps]

    assert codes(Expectation(1000, rows_per_step=8), *rows(10, 20, 30)) == ["perfect_early"]
    assert codes(Expectation(100, rows_per_step=8), *rows(10, 20, 30)) == []


def test_a_perfect_accuracy_on_few_pairs_is_chance():
    rows = [train(step, **{"rewards/accuracies": float(step != 1)}) for step in range(1, 27)]
    expected = Expectation(1000, rows_per_step=4)
    assert codes(expected, *rows[:25]) == []
    health = watched(expected, *rows)
    assert [symptom.step for symptom in health.symptoms] == [26]
    assert "the last 100 pairs" in health.symptoms[0].message


def test_texts_that_grow_are_named():
    def rows(error):
        lengths = ((0, 20), (10, 28), (20, 31))
        names = ("eval_samples/median_length", "eval_samples/median_length_se")
        return [{"step": step, **dict(zip(names, (float(n), error), strict=True))} for step, n in lengths]

    assert codes(Expectation(100), *rows(2.0)) == ["growing_texts"]
    assert codes(Expectation(100), *rows(4.0)) == []
    assert codes(Expectation(100), *({"step": s, "eval_samples/median_length": 20.0 + s} for s in (0, 15))) == []


def test_a_symptom_is_told_once_also_after_a_resume():
    expected = Expectation(10)
    health = watched(expected, train(1, "nan"))
    assert health.watch(train(2, math.nan)) == []
    assert [symptom.step for symptom in health.symptoms] == [1]

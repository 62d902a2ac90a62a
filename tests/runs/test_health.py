import math

import pytest

from dpoctl.runs.health import Expectation, Health

LN2 = math.log(2)


def train(step, loss=0.5, **metrics):
    return {"step": step, "loss": loss, "grad_norm": 1.0, **metrics}


def codes(expected, *rows):
    health = Health(expected)
    return [symptom.code for row in rows for symptom in health.watch(row)]


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
    health = Health(expected, [row | {"grad_norm": 0.0} for row in still])
    assert "gradient is zero" in health.symptoms[0].message
    assert "too small" in Health(expected, still).symptoms[0].message


def test_a_loss_may_stand_still_during_warm_up_and_move_now_and_then():
    expected = Expectation(100, warmup_steps=30, at_init=LN2)
    assert codes(expected, *(train(step, LN2) for step in (10, 20, 30, 40))) == []
    assert codes(expected, *(train(step, LN2 - 0.01 * (step == 60)) for step in (50, 60, 70, 80))) == []


def test_chosen_answers_that_become_less_likely_are_named_in_nats():
    rows = [{"step": step, "eval_logps/chosen": logps} for step, logps in ((0, -120.0), (10, -125.0), (20, -150.0))]
    health = Health(Expectation(100), rows)
    assert [(s.code, s.step) for s in health.symptoms] == [("chosen_falling", 20)]
    assert "30.0 nats" in health.symptoms[0].message
    # Long answers vary more: the same fall is a smaller share of them.
    assert codes(Expectation(100), *(row | {"eval_logps/chosen": row["eval_logps/chosen"] - 300} for row in rows)) == []


def test_without_evaluation_the_steps_show_that_chosen_answers_fall():
    falling = [train(step, **{"logps/chosen": -100.0 - step}) for step in (10, 20, 30, 40, 50, 60)]
    assert codes(Expectation(100), *falling) == ["chosen_falling"]
    assert codes(Expectation(100), *falling[:5]) == []


def test_a_perfect_accuracy_is_suspicious_early_and_welcome_late():
    def rows(*steps):
        return [train(step, **{"rewards/accuracies": 1.0}) for step in steps]

    assert codes(Expectation(1000), *rows(10, 20, 30)) == ["perfect_early"]
    assert codes(Expectation(100), *rows(10, 20, 30)) == []


def test_texts_that_grow_are_named():
    rows = [{"step": step, "eval_samples/median_length": float(n)} for step, n in ((0, 20), (10, 28), (20, 31))]
    assert codes(Expectation(100), *rows) == ["growing_texts"]


def test_answers_of_uneven_length_are_named():
    row = train(1, **{"lengths/chosen": 90.0, "lengths/rejected": 30.0})
    assert codes(Expectation(100), row) == ["length_decides"]
    assert "3.0 times" in Health(Expectation(100), [row]).symptoms[0].message


def test_a_symptom_is_told_once_also_after_a_resume():
    expected = Expectation(10)
    health = Health(expected, [train(1, "nan")])
    assert health.watch(train(2, math.nan)) == []
    assert [symptom.step for symptom in health.symptoms] == [1]

"""The best evaluation: strictly better, before which patience is counted."""

import json
import math
from pathlib import Path

import pytest

from dpoctl.errors import RunError
from dpoctl.runs.best import BestEvaluation, model_step, write_best


def after(values: list[float], mode: str = "max", min_delta: float = 0.0) -> BestEvaluation:
    best = BestEvaluation("eval_m", mode)  # type: ignore[arg-type]
    for number, value in enumerate(values):
        best.watch(10 * number, {"eval_m": value, "eval_loss": 0.0}, min_delta)
    return best


@pytest.mark.parametrize(
    ("values", "mode", "step", "waited"),
    [
        ([9.0, 1.0, 3.0, 2.0], "max", 20, 1),  # the first one is before training
        ([9.0, 3.0, 1.0, 2.0], "min", 20, 1),
        ([0.0, 1.0, 1.0, 1.0], "max", 10, 2),
        ([0.0, math.nan, 1.0, math.nan], "max", 20, 1),
        ([0.0, math.nan, math.inf], "max", None, 2),
        ([0.0], "max", None, 0),
    ],
)
def test_the_first_of_the_best_values_counts(values: list[float], mode: str, step: int | None, waited: int) -> None:
    best = after(values, mode)
    assert (best.step, best.waited) == (step, waited)


def test_small_gains_make_a_better_checkpoint_but_end_the_waiting_only_together() -> None:
    best = after([0.0, 1.0, 1.1, 1.2], min_delta=0.25)
    assert (best.step, best.value, best.waited) == (30, 1.2, 2)
    best.watch(40, {"eval_m": 1.3}, 0.25)
    assert (best.step, best.waited) == (40, 0)


def test_the_state_comes_back_unless_another_metric_is_watched() -> None:
    best = after([0.0, 1.0, 3.0, math.nan])
    same, other = BestEvaluation("eval_m", "max"), BestEvaluation("eval_m", "min")
    same.load_state(json.loads(json.dumps(best.state())))
    other.load_state(best.state())
    assert same == best
    assert other == BestEvaluation("eval_m", "min")


def test_a_metric_that_is_missing_is_an_error_that_says_what_there_is() -> None:
    with pytest.raises(RunError, match=r"the evaluation at step 5 has no 'eval_m'; use one of eval_loss$"):
        BestEvaluation("eval_m", "max").watch(5, {"eval_loss": 1.0, "eval_loss_se": 0.1})


def test_a_run_says_which_step_its_model_is_of(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "loss": 1}\n{"step": 30, "loss": 1}\n')
    assert model_step(tmp_path) == 30
    write_best(tmp_path, after([0.0, 1.0, 3.0, 2.0]))
    assert model_step(tmp_path) == 20
    write_best(tmp_path, None)
    assert model_step(tmp_path) == 30

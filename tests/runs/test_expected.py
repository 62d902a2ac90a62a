"""The metrics that a recipe expects, beside those of the run."""

from pathlib import Path

import pytest

from dpoctl.recipe import RecipeError, parse_recipe
from dpoctl.runs.expected import ExpectedMetric, compare, read_comparisons

ROWS = [
    {"step": 0, "eval_loss": 0.69},
    {"step": 2, "loss": 0.6},
    {"step": 4, "eval_loss": 0.5, "eval_rewards/accuracies": 0.7},
    {"step": 4, "eval_other_loss": "nan"},
]


def test_the_last_value_of_a_metric_is_compared_with_both_ends_of_its_range() -> None:
    ranges = {"eval_loss": [0.5, 0.54], "loss": [0.1, 0.5], "eval_other_loss": [0, 1], "eval_los": [0, 1]}
    loss, train, wrong, missing = compare(ranges, ROWS)
    assert loss == ExpectedMetric("eval_loss", 0.5, 0.54, 0.5, True)
    assert (train.value, train.is_met) == (0.6, False)
    assert (wrong.value, wrong.is_met) == (missing.value, missing.is_met) == (None, False)
    assert str(loss) == "eval_loss 0.5, expected 0.5 to 0.54: yes"
    assert str(missing) == "eval_los not measured, expected 0 to 1: NO"


def test_a_run_without_a_comparison_has_none(tmp_path: Path) -> None:
    assert read_comparisons(tmp_path) == []
    (tmp_path / "expected.json").write_text('[{"metric": "x"}]')
    assert read_comparisons(tmp_path) == []


GOOD = """\
method: dpo
model: {{model_name_or_path: some/model}}
data: {{train: [pairs.jsonl]{}}}
training: {{output_dir: runs/x, learning_rate: 5e-7, {}}}
expected: {}
"""
EVAL = (", eval: [heldout.jsonl]", "eval_steps: 5")


@pytest.mark.parametrize(
    ("data", "expected", "said"),
    [
        (EVAL, "{eval_loss: [2, 1]}", "two numbers, the smaller one first"),
        (EVAL, "{eval_loss: [1]}", "two numbers, the smaller one first"),
        (EVAL, "{eval_loss: 1}", "two numbers, the smaller one first"),
        (EVAL, "{eval_rewards/accuracy: [0, 1]}", "did you mean 'eval_rewards/accuracies'?"),
        (("", ""), "{eval_loss: [0, 1]}", "is never measured: there is no eval data"),
    ],
)
def test_an_expectation_that_nothing_can_meet_is_refused(data: tuple[str, str], expected: str, said: str) -> None:
    with pytest.raises(RecipeError, match="expected") as refused:
        parse_recipe(GOOD.format(*data, expected), "r", command="dpo")
    assert said in str(refused.value)


def test_metrics_of_training_of_sets_and_of_losses_can_be_expected() -> None:
    names = "{loss: [0, 1], eval_loss: [0, 1], eval_judge/kind: [0, 1], beta_used: [0, 1]}"
    assert len(parse_recipe(GOOD.format(*EVAL, names), "r", command="dpo").expected) == 4

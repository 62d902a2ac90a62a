"""What `eval` takes: samples where there is something to sample, a judge where there are samples."""

from typing import Any

import pytest
import yaml
from tiny_runs import merge

from dpoctl.recipe import RecipeError, parse_recipe
from dpoctl.recipe.consistency import resolved_yaml

BASE: dict[str, Any] = {
    "method": "dpo",
    "model": {"model_name_or_path": "some/model"},
    "data": {"train": ["pairs.jsonl"], "eval": ["heldout.jsonl"]},
    "training": {"output_dir": "runs/x", "learning_rate": 1e-6, "eval_steps": 10},
}
JUDGE = {"categories": {"harsh": ["reject"], "kind": ["accept"]}, "target": "harsh"}
WITHOUT_EVAL = {"data.eval": None, "training.eval_steps": None}


def parse(changes: dict[str, Any], *overrides: str) -> Any:
    text = yaml.safe_dump(merge(BASE, changes))
    return parse_recipe(text, "r.yaml", command="dpo", overrides=overrides)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"eval.judge": JUDGE}, "eval.judge has no effect: there are no samples"),
        ({"eval": {"samples": {"num": 0}, "judge": JUDGE}}, "eval.judge has no effect: there are no samples"),
        ({"eval.samples": {"num": 0, "seed": 1}}, "eval.samples.seed has no effect"),
        ({"eval.samples": {"num": 2, "prompts": ["hi"]}}, "eval.samples.num has no effect: prompts sets the number"),
        ({"eval.samples": {"temperature": 0, "per_prompt": 2}}, "eval.samples.per_prompt has no effect"),
        (WITHOUT_EVAL | {"eval.samples": {"num": 2}}, "eval.samples has no effect: there is no eval data"),
        (
            {"eval": {"samples": {}, "judge": JUDGE | {"target": "hars"}}},
            "eval.judge.target: expected a category (harsh, kind)",
        ),
        (
            {"eval": {"samples": {}, "judge": merge(JUDGE, {"categories.kind": ["Reject"]})}},
            "is a word of the category 'harsh' too; remove it",
        ),
        (
            {"eval": {"samples": {}, "judge": merge(JUDGE, {"categories.undecided": ["hm"]})}},
            "'undecided' is the name for texts without a category; use another name",
        ),
        ({"eval": {"samples": {}, "judge": merge(JUDGE, {"categories.kind": []})}}, "eval.judge.categories.kind"),
        ({"eval": {"samples": {}, "judge": {"target": "harsh"}}}, "missing key 'eval.judge.categories'"),
        ({"eval.samples": {"max_new_tokens": "128"}}, "eval.samples.max_new_tokens: expected a whole number"),
        ({"eval.samples": {"top_p": 0}}, "eval.samples.top_p: expected a number above 0"),
    ],
)
def test_what_would_do_nothing_or_decide_nothing_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as refused:
        parse(changes)
    assert any(said in problem.message for problem in refused.value.problems), refused.value.problems


def test_a_recipe_without_the_section_has_no_samples() -> None:
    assert parse({}).eval.samples is None


@pytest.mark.parametrize("samples", [{}, {"prompts": ["hi"]}, {"temperature": 0}, {"num": 3, "per_prompt": 2}])
def test_the_resolved_recipe_loads_back(samples: dict[str, Any]) -> None:
    recipe = parse({"eval": {"samples": samples, "judge": JUDGE}})
    again = parse_recipe(resolved_yaml(recipe), "r.yaml", command="dpo")
    assert again == recipe


def test_the_command_line_can_switch_samples_off() -> None:
    section = {"eval": {"samples": {"num": 4, "seed": 1}, "judge": JUDGE}}
    assert parse(section, "eval.samples.num=0").eval.samples.num == 0
    assert parse(section, "eval.samples=null").eval.samples is None

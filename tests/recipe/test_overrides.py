"""`--set`: which key it means, how its value is read, and what wins."""

from typing import Any

import pytest

from dpoctl.core.losses import LOSSES
from dpoctl.recipe import Recipe, RecipeError, parse_recipe
from dpoctl.recipe.document import read_document
from dpoctl.recipe.overrides import apply_overrides

RECIPE = """\
method: dpo
model: {model_name_or_path: some/model}
lora: {r: 8}
data: {train: [a.jsonl, {path: b.jsonl, weight: 2}]}
training: {output_dir: runs/x, learning_rate: 5e-7}
"""


def parse(*overrides: str) -> Recipe:
    return parse_recipe(RECIPE, "r.yaml", command="dpo", losses=LOSSES, overrides=overrides)


def at(recipe: Recipe, path: str) -> Any:
    value: Any = recipe.model_dump()
    for part in path.split("."):
        value = value[int(part)] if isinstance(value, list) else value[part]
    return value


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("training.learning_rate=1e-6", "training.learning_rate", 1e-6),
        ("learning_rate=1e-6", "training.learning_rate", 1e-6),
        ("dpo.loss.beta=0.05", "dpo.loss.beta", 0.05),
        ("beta=0.05", "dpo.loss.beta", 0.05),
        ("loss.beta=0.05", "dpo.loss.beta", 0.05),
        ("label_smoothing=0.1", "dpo.loss.label_smoothing", 0.1),
        ("dpo.loss={type: ipo, beta: 0.2}", "dpo.loss.type", "ipo"),
        ("dpo.loss.type=hinge", "dpo.loss.type", "hinge"),
        ("lora=null", "lora", None),
        ("lora.r=4", "lora.r", 4),
        ("r=4", "lora.r", 4),
        ("quantization.load_in_4bit=true", "quantization.load_in_4bit", True),
        ("output_dir=runs/a=b", "training.output_dir", "runs/a=b"),
        ("output_dir=no", "training.output_dir", "no"),
        ("output_dir='7'", "training.output_dir", "7"),
        ("target_modules=[q_proj, v_proj]", "lora.target_modules", ["q_proj", "v_proj"]),
        ("data.train=c.jsonl", "data.train.0.path", "c.jsonl"),
        ("data.train.1.weight=0.5", "data.train.1.weight", 0.5),
        ("data.train=[{path: c, column_map: {prompt: q}}]", "data.train.0.column_map.prompt", "q"),
        ("chat_template_kwargs.think=false", "data.chat_template_kwargs.think", False),
        ("max_grad_norm=", "training.max_grad_norm", None),
    ],
)
def test_an_override_reaches_its_key(override: str, path: str, value: Any) -> None:
    assert at(parse(override), path) == value


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("nonsense", "expected key=value"),
        ("=1", "expected key=value"),
        ("lerning_rate=1", "did you mean 'training.learning_rate'"),
        ("training.lerning_rate=1", "did you mean 'learning_rate'"),
        ("trainning.seed=1", "did you mean 'training'"),
        ("lr=1", "did you mean 'training.learning_rate'"),
        ("seed=x", "training.seed: expected a whole number"),
        ("seed=[1", "bracket"),
        ("seed=.inf", "not a finite number"),
        ("seed=*a", "aliases"),
        ("data.train.7.weight=1", "data.train has 2 items"),
        ("data.train.0.weight=1", "data.train[0] is 'a.jsonl', which has no keys"),
        ("method.x=1", "method is 'dpo', which has no keys"),
        ("label_smoothing=0.7", "below 0.5"),
    ],
)
def test_a_wrong_override_is_refused_by_its_number(override: str, said: str) -> None:
    with pytest.raises(RecipeError) as refused:
        parse("seed=1", override)
    text = str(refused.value)
    assert text.startswith("--set #2: error: ")
    assert said in text
    assert f"| {override}" in text


def test_an_ambiguous_leaf_lists_what_it_could_be() -> None:
    document = read_document("{}", "r.yaml")
    apply_overrides(document, ["path=x"], [("left", "path"), ("right", "path")])
    (problem,) = document.problems
    assert problem.message == "'path' could be any of left.path, right.path; write one in full"
    assert str(problem.place) == "--set #1"


def test_a_name_that_a_sample_setting_has_too_means_the_other_key() -> None:
    recipe = parse("seed=7", "type=ipo", "eval_steps=3", "eval_size=0.1", "num=2")
    assert (recipe.training.seed, recipe.dpo.loss["type"]) == (7, "ipo")
    assert recipe.eval.samples is not None
    assert (recipe.eval.samples.num, recipe.eval.samples.seed) == (2, 0)


def test_the_last_of_two_overrides_wins_over_the_recipe() -> None:
    assert parse("r=4", "lora.r=2").lora.r == 2  # type: ignore[union-attr]


def test_an_override_heals_a_wrong_value_of_the_file() -> None:
    wrong = RECIPE.replace("5e-7", "fast")
    recipe = parse_recipe(wrong, "r", command="dpo", losses=LOSSES, overrides=["learning_rate=1e-6"])
    assert recipe.training.learning_rate == 1e-6


def test_a_contradiction_made_by_an_override_is_said_at_the_override_or_at_its_key() -> None:
    with pytest.raises(RecipeError) as refused:
        parse("max_length=10", "max_prompt_length=10")
    assert [str(problem.place) for problem in refused.value.problems] == ["--set #2"]


def test_an_override_puts_aside_what_the_file_says_to_the_same_end() -> None:
    text = RECIPE.replace("learning_rate: 5e-7", "learning_rate: 5e-7, num_train_epochs: 3, eval_steps: 5").replace(
        "data: {", "data: {eval: [c.jsonl], "
    )
    overrides = ["max_steps=2", "data.eval=null"]
    recipe = parse_recipe(text, "r", command="dpo", losses=LOSSES, overrides=overrides)
    assert recipe.training.max_steps == 2
    assert "num_train_epochs" not in recipe.to_yaml()
    with pytest.raises(RecipeError, match="num_train_epochs would do nothing"):
        parse_recipe(text, "r", command="dpo", losses=LOSSES, overrides=["max_steps=2", "num_train_epochs=2"])

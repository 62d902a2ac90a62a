"""`--set`: which key it means, how its value is read, and what wins."""

from pathlib import Path
from typing import Any

import pytest

from dpoctl.recipe import Recipe, RecipeError, parse_recipe
from dpoctl.recipe.consistency import resolved_yaml
from dpoctl.recipe.document import apply_overrides, read_document

RECIPE = """\
method: dpo
model: {model_name_or_path: some/model}
lora: {r: 8}
data: {train: [a.jsonl, {path: b.jsonl, weight: 2}]}
training: {output_dir: runs/x, learning_rate: 5e-7}
"""


def parse(*overrides: str) -> Recipe:
    return parse_recipe(RECIPE, "r.yaml", command="dpo", overrides=overrides)


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
        ("data.train.7.weight=1", "data.train has 2 items, so there is no item 7 (the first is 0)"),
        ("data.train[0].wieght=1", "unknown key 'wieght', did you mean 'weight'?"),
        ("data.train[x]=1", "unknown key 'train[x]', did you mean 'train'?"),
        ("lora.target_modules=q_proj,v_proj", "got 'q_proj,v_proj', did you mean [q_proj, v_proj]?"),
        ("lora.target_modules=k_proj, o_proj", "got 'k_proj, o_proj', did you mean [k_proj, o_proj]?"),
        ("report_to=wandb,tensorboard", "got 'wandb,tensorboard', did you mean [wandb, tensorboard]?"),
        ("lora.modules_to_save=lm_head,embed_tokens", "did you mean [lm_head, embed_tokens]?"),
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
    assert problem.message == "'path' is ambiguous (left.path, right.path); write the full key"
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
    recipe = parse_recipe(wrong, "r", command="dpo", overrides=["learning_rate=1e-6"])
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
    recipe = parse_recipe(text, "r", command="dpo", overrides=overrides)
    assert recipe.training.max_steps == 2
    assert "num_train_epochs" not in resolved_yaml(recipe)
    with pytest.raises(RecipeError, match="num_train_epochs has no effect"):
        parse_recipe(text, "r", command="dpo", overrides=["max_steps=2", "num_train_epochs=2"])


@pytest.mark.parametrize(
    ("data", "override", "path", "value"),
    [
        ("{train: [a.jsonl, b.jsonl]}", "data.train[1].weight=2", "data.train.1.weight", 2.0),
        ("{train: [a.jsonl, b.jsonl]}", "train[0].format=hh", "data.train.0.format", "hh"),
        ("{train: a.jsonl}", "data.train[0].weight=2", "data.train.0.weight", 2.0),
        ("{train: [{path: a.jsonl}]}", "data.train[0].column_map.prompt=q", "data.train.0.column_map.prompt", "q"),
        ("{train: a.jsonl, eval: [b.jsonl]}", "data.eval.eval[0].split=test", "data.eval.eval.0.split", "test"),
        ("{train: a.jsonl, eval: b.jsonl}", "data.eval[0].split=test", "data.eval.eval.0.split", "test"),
        ("{train: a.jsonl, eval: {mine: b.jsonl}}", "data.eval.mine[0].split=test", "data.eval.mine.0.split", "test"),
        ("{train: [a.jsonl, b.jsonl]}", "data.train[1]=c.jsonl", "data.train.1.path", "c.jsonl"),
    ],
)
def test_the_form_in_which_messages_name_an_item_sets_it(data: str, override: str, path: str, value: Any) -> None:
    text = "\n".join(f"data: {data}" if line.startswith("data:") else line for line in RECIPE.splitlines())
    recipe = parse_recipe(text, "r.yaml", command="dpo", overrides=[override, *["eval_steps=5"] * ("eval" in data)])
    assert at(recipe, path) == value
    assert at(recipe, "data.train.0.path") == "a.jsonl"


@pytest.mark.parametrize(
    ("change", "key", "variable"),
    [
        ("model.model_name_or_path=${BASE}/x", "model.model_name_or_path", "${BASE}"),
        ("data.train=[a.jsonl, $DATA/x.jsonl]", "data.train[1]", "$DATA"),
        ("data.train=[{path: $DATA/x.jsonl}]", "data.train[0].path", "$DATA"),
        ("data.eval={mine: [$DATA/x.jsonl]}", "data.eval.mine[0]", "$DATA"),
        ("training.output_dir=runs/$USER", "training.output_dir", "$USER"),
        ("dpo.reference.path=$HOME/sft", "dpo.reference.path", "$HOME"),
    ],
)
def test_a_variable_of_the_shell_is_refused_by_name(change: str, key: str, variable: str) -> None:
    with pytest.raises(RecipeError) as refused:
        parse(change, *["eval_steps=5"] * ("eval" in change))
    (problem,) = refused.value.problems
    assert problem.message == (
        f"{key}: variables are not expanded in recipes, and {variable} is one; "
        "put it into double quotes, in which the shell expands it"
    )


def test_a_variable_in_the_file_is_told_at_its_place_and_a_dollar_elsewhere_is_text(tmp_path: Path) -> None:
    text = RECIPE.replace("a.jsonl", '"${DATA}/a.jsonl"')
    with pytest.raises(RecipeError, match=r'write its value, or set the key with --set data.train\[0\]="..."'):
        parse_recipe(text, "r.yaml", command="dpo")
    with pytest.raises(RecipeError, match=r"r.yaml:4:15: error: variables are not expanded in recipes, and .*DATA"):
        parse_recipe(text.replace('"', ""), "r.yaml", command="dpo")
    dollars = ["data.chat_template_kwargs={price: $FIVE}", "training.run_name=5$", "report_to=wandb"]
    assert parse(*dollars).data.chat_template_kwargs == {"price": "$FIVE"}
    (tmp_path / "$x.jsonl").touch()
    assert parse(f"data.train={tmp_path}/$x.jsonl").data.train[0].path.endswith("$x.jsonl")

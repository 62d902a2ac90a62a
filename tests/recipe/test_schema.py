"""Every key of the schema: suggested when misspelt, refused with its path when wrong; and back to YAML."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from dpoctl.losses import LOSSES
from dpoctl.recipe import Recipe, RecipeError, parse_recipe
from dpoctl.recipe.consistency import resolved_yaml
from dpoctl.recipe.data_section import Source
from dpoctl.recipe.document import read_document, write_yaml
from dpoctl.recipe.key_errors import hints, unwrap
from dpoctl.recipe.pair_generation import ContrastiveRecipe
from dpoctl.recipe.sampled_pairs import SampledRecipe

RECIPES = Path(__file__).parents[2] / "recipes"
# A specification of data to make stands there too.
SHIPPED = [file for file in sorted(RECIPES.glob("*.yaml")) if "training:" in file.read_text(encoding="utf-8")]
LEAST: dict[str, Any] = {
    "method": "dpo",
    "model": {"model_name_or_path": "some/model"},
    "data": {"train": [{"path": "pairs.jsonl"}]},
    "training": {"output_dir": "runs/x", "learning_rate": 1e-6},
}


def walk(model: type[BaseModel], above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    paths = []
    for name in model.model_fields:
        paths.append((*above, name))
        kind, _ = unwrap(hints(model)[name])
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            paths += walk(kind, (*above, name))
    return paths


KEYS = walk(Recipe)
SOURCE_KEYS = [("data", "train", "0", name) for name in Source.model_fields]


def least_with(path: tuple[str, ...], value: Any) -> str:
    """The least recipe with one more key."""
    data: dict[str, Any] = yaml.safe_load(yaml.safe_dump(LEAST))
    node: Any = data
    for part in path[:-1]:
        node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
    node[path[-1]] = value
    return write_yaml(data)


def problems(text: str) -> list[str]:
    with pytest.raises(RecipeError) as refused:
        parse_recipe(text, "r.yaml", command="dpo")
    return [problem.message for problem in refused.value.problems]


def test_the_walk_sees_every_section() -> None:
    assert {path[0] for path in KEYS} == set(Recipe.model_fields)
    assert len(KEYS) > 65


@pytest.mark.parametrize("path", KEYS + SOURCE_KEYS, ids=".".join)
def test_a_misspelling_of_every_key_is_answered_with_the_key(path: tuple[str, ...]) -> None:
    misspelt = path[-1] + path[-1][-1]
    said = problems(least_with((*path[:-1], misspelt), 1))
    assert any(f"unknown key {misspelt!r}, did you mean {path[-1]!r}?" in message for message in said), said


@pytest.mark.parametrize("path", KEYS + SOURCE_KEYS, ids=".".join)
def test_a_value_of_the_wrong_kind_is_refused_with_the_path_of_its_key(path: tuple[str, ...]) -> None:
    # No key takes a list of lists.
    dotted = ".".join(path).replace(".0", "[0]")
    said = problems(least_with(path, [[1]]))
    assert any(message.startswith(dotted) and ": expected " in message for message in said), said


def test_a_flag_is_no_number_and_no_text_is_converted() -> None:
    for value in (True, "64", 64.0):
        assert any(
            "global_batch_size" in line for line in problems(least_with(("training", "global_batch_size"), value))
        )


@pytest.mark.parametrize("value", [True, 1.0, 2, "1"])
def test_only_version_one_is_known(value: Any) -> None:
    assert any(line.startswith("version: expected 1") for line in problems(least_with(("version",), value)))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-7", 5e-7),
        ("1E3", 1000.0),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("007", 7),
        ("0x10", 16),
        ("0o17", 15),
        ("+3", 3),
        ("no", "no"),
        ("Yes", "Yes"),
        ("on", "on"),
        ("y", "y"),
        ("True", True),
        ("FALSE", False),
        ("tRue", "tRue"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("0b11", "0b11"),
        ("null", None),
        ("~", None),
        ("", None),
        ("'5e-7'", "5e-7"),
        ('"null"', "null"),
        ("1.2.3", "1.2.3"),
        ("e5", "e5"),
        (".", "."),
    ],
)
def test_plain_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    read = read_document(f"key: {text}\n", "r").data["key"]
    assert read == value
    assert type(read) is type(value)
    assert read_document(write_yaml({"key": value}), "r").data["key"] == value


@pytest.mark.parametrize(
    "text", ["5e-7", "0o17", "no", "1:30", "2024-01-01", "1e400", ".nan", "null", "a: b", "\t", "0x1"]
)
def test_a_text_is_quoted_where_either_yaml_would_read_something_else(text: str) -> None:
    written = write_yaml({"key": text})
    assert read_document(written, "r").data == {"key": text}
    assert yaml.safe_load(written) == {"key": text}


def test_shorthands_mean_what_they_stand_for() -> None:
    text = """
method: dpo
model: {model_name_or_path: m}
data: {train: a.jsonl, eval: [b.jsonl]}
training: {output_dir: o, learning_rate: 1, eval_steps: 5, report_to: tensorboard}
"""
    recipe = parse_recipe(text, "r", command="dpo")
    assert [source.path for source in recipe.data.train] == ["a.jsonl"]
    assert {name: [source.path for source in sources] for name, sources in recipe.data.eval.items()} == {
        "eval": ["b.jsonl"]
    }
    assert recipe.training.report_to == ["tensorboard"]
    named = parse_recipe(text.replace("[b.jsonl]", "{easy: c, hard: [d, e]}"), "r", command="dpo")
    assert {name: len(sources) for name, sources in named.data.eval.items()} == {"easy": 1, "hard": 2}


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["dpo.loss={type: ipo, beta: 0.3}"],
        ["dpo.loss={type: beta_dpo, base: {type: simpo, gamma_beta_ratio: 0.3}, beta: 2, beta_max: 9}"],
        ["dpo.loss={type: f_dpo, divergence: alpha, alpha: 0.3}"],
        ["dpo.loss=[{type: sigmoid, weight: 0.8}, {type: bco_pair, weight: 0.2}, {type: sft}]"],
        ["dpo.loss=[{type: sigmoid}, {type: sigmoid, beta: 0.3, sft_weight: 0.1}]", "dpo.loss.1.weight=0.5"],
        *([f"dpo.loss.type={name}"] for name in LOSSES),
        ["lora.start=continue"],
        ["data.eval={a: x, b: [{path: y, weight: 0.5}]}", "eval_steps=5"],
        ["eval_size=0.1", "eval_steps=5", "eval_on_start=false"],
        ["lora.r=4", "quantization.load_in_8bit=true", "warmup_steps=7", "optim=rmsprop", "max_steps=3"],
        ["model={from_scratch: {config: {model_type: llama, rope: 5e-7}, tokenizer: {vocab_size: 300}}}"],
        ["data.train=[{path: x, pairs: all, min_margin: 0.5, overlong: truncate, format_options: {dimension: safer}}]"],
        ["data.train=[{path: x, max_length: 64, metrics: mine}]", "data.overlong=truncate"],
        ["run_name='5e-7'", "report_to=[wandb, trackio]", "max_grad_norm=null"],
    ],
)
def test_a_resolved_recipe_loads_back_equal(overrides: list[str]) -> None:
    recipe = parse_recipe(write_yaml(LEAST), "r", command="dpo", overrides=overrides)
    assert parse_recipe(resolved_yaml(recipe), "resolved", command="dpo") == recipe


def test_the_loss_is_completed_with_its_defaults() -> None:
    recipe = parse_recipe(write_yaml(LEAST), "r", command="dpo")
    rest = {"label_smoothing": 0.0, "reference_free": False}
    assert recipe.dpo.loss == {"type": "sigmoid", "beta": 0.1, "sft_weight": 0.0, **rest}
    several = parse_recipe(
        write_yaml(LEAST),
        "r",
        command="dpo",
        overrides=["dpo.loss=[{type: hinge, weight: 2}, {type: sft}]"],
    )
    assert several.dpo.loss == [
        {"type": "hinge", "weight": 2.0, "beta": 0.1, "sft_weight": 0.0},
        {"type": "sft", "weight": 1.0},
    ]


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_the_shipped_recipes_load_back_equal(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    command = yaml.safe_load(text)["method"]
    recipe = parse_recipe(text, file.name, command=command)
    assert parse_recipe(resolved_yaml(recipe), "resolved", command=command) == recipe


def test_beta_dpo_is_shipped_in_its_published_settings() -> None:
    text = (RECIPES / "pythia28-hh-beta-dpo.yaml").read_text(encoding="utf-8")
    loss = parse_recipe(text, "r.yaml", command="dpo").dpo.loss
    assert isinstance(loss, dict)
    published = {"type": "beta_dpo", "beta": 0.1, "alpha": 0.6, "filter_ratio": 0.2, "momentum": 0.9}
    assert loss | published == loss
    # What the released code hard-codes besides.
    assert (loss["beta_min"], loss["beta_max"], loss["gap_scale"], loss["base"]) == (1e-3, None, "raw", "sigmoid")


def test_the_recipe_for_shp_leaves_out_close_votes_as_the_authors_of_dpo_do() -> None:
    data = parse_recipe((RECIPES / "pythia28-shp-dpo.yaml").read_text(encoding="utf-8"), "r.yaml", command="dpo").data
    assert [source.format_options for _, source in data.sources] == [{"min_score_ratio": 2}] * 2


def unbounded(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The whole numbers of a JSON schema that may have any size."""
    if isinstance(node, list):
        return [found for at, item in enumerate(node) for found in unbounded(item, (*path, at))]
    if not isinstance(node, dict):
        return []
    is_open = node.get("type") == "integer" and not node.keys() & {"maximum", "exclusiveMaximum", "const", "enum"}
    return [path] * is_open + [found for key, item in node.items() for found in unbounded(item, (*path, key))]


@pytest.mark.parametrize("model", [Recipe, ContrastiveRecipe, SampledRecipe])
def test_every_whole_number_has_a_greatest_value(model: type[BaseModel]) -> None:
    assert unbounded(model.model_json_schema()) == []


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("lora.r=1000000000000", "lora.r: expected at most 65,536, got 1000000000000"),
        ("training.max_steps=10000000000000", "training.max_steps: expected at most 1,000,000,000, got"),
        ("data.train=[{path: a.jsonl, weight: 1e7}]", "data.train[0].weight: expected at most 1,000, got 10000000.0"),
        ("eval.samples={max_new_tokens: 1000000}", "eval.samples.max_new_tokens: expected at most 65,536, got 1000000"),
        (
            "data.eval_size=10000000000",
            "a fraction between 0 and 1, or a whole number from 1 to 1,000,000,000, or null",
        ),
        ("data.eval={" + ", ".join(f"e{n}: [a.jsonl]" for n in range(300)) + "}", "at most 200 items, got 300"),
    ],
)
def test_a_number_that_no_machine_could_serve_is_refused(override: str, said: str) -> None:
    recipe = LEAST | {"lora": {"r": 4}}
    with pytest.raises(RecipeError) as refused:
        parse_recipe(write_yaml(recipe), "r.yaml", command="dpo", overrides=[override])
    assert said in str(refused.value)

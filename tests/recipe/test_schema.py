"""Every key of the schema: documented, suggested when misspelt, refused with its path when wrong; and back to YAML."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from dpoctl.core.losses import LOSSES
from dpoctl.data.formats import FORMATS
from dpoctl.recipe import Recipe, RecipeError, json_schema, load_recipe, parse_recipe
from dpoctl.recipe.document import read_document
from dpoctl.recipe.expect import hints, unwrap
from dpoctl.recipe.schema_data import Source
from dpoctl.recipe.writer import write_yaml

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
SCHEMA = json_schema(LOSSES)
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
        parse_recipe(text, "r.yaml", command="dpo", losses=LOSSES)
    return [problem.message for problem in refused.value.problems]


def test_the_walk_sees_every_section() -> None:
    assert {path[0] for path in KEYS} == set(Recipe.model_fields)
    assert len(KEYS) > 65


@pytest.mark.parametrize("path", KEYS + SOURCE_KEYS, ids=".".join)
def test_the_json_schema_documents_every_key(path: tuple[str, ...]) -> None:
    node = SCHEMA
    for part in path:
        node = _resolve(SCHEMA, node)
        node = node["items"] if part == "0" else node["properties"][part]
    assert len(node["description"]) > 5


def _resolve(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    """Follow references, and of alternatives take the one with keys."""
    while "properties" not in node and "items" not in node:
        options = [node] if "$ref" in node else node["anyOf"]
        options = [option for option in options if "$ref" in option or "items" in option]
        node = options[-1]
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[-1]]
    return node


@pytest.mark.parametrize("name", LOSSES)
def test_the_json_schema_documents_each_loss_with_its_own_keys(name: str) -> None:
    definitions = SCHEMA["$defs"]
    alone, listed = definitions[f"loss.{name}"], definitions[f"term.{name}"]
    assert set(alone["properties"]) == {"type", *(field.name for field in fields(LOSSES[name]))}
    assert set(listed["properties"]) == {"weight", *alone["properties"]}
    assert alone["properties"]["type"]["const"] == name
    assert alone["properties"]["beta"]["exclusiveMinimum"] == 0
    assert alone["properties"]["beta"]["default"] == LOSSES[name]().beta
    assert alone["required"] == ([] if name == "sigmoid" else ["type"])
    assert listed["required"] == ["type"]
    assert (alone["additionalProperties"], listed["additionalProperties"]) == (False, False)
    for described in (alone, listed, *alone["properties"].values(), *listed["properties"].values()):
        assert len(described["description"]) > 5


def test_the_json_schema_takes_a_loss_or_a_list_of_losses_with_weights() -> None:
    *alone, several = SCHEMA["$defs"]["DpoSection"]["properties"]["loss"]["anyOf"]
    assert alone == [{"$ref": f"#/$defs/loss.{name}"} for name in LOSSES]
    assert several["items"]["anyOf"] == [{"$ref": f"#/$defs/term.{name}"} for name in (*LOSSES, "sft")]
    assert set(SCHEMA["$defs"]["term.sft"]["properties"]) == {"type", "weight"}
    texts = {
        name: kind["properties"]["beta"]["description"] for name, kind in SCHEMA["$defs"].items() if "loss." in name
    }
    assert "the paper's tau" in texts["loss.ipo"].lower()
    assert texts["loss.robust"] == "Scale of the reward, per nat: higher keeps the policy closer to the reference."


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
    recipe = parse_recipe(text, "r", command="dpo", losses=LOSSES)
    assert [source.path for source in recipe.data.train] == ["a.jsonl"]
    assert {name: [source.path for source in sources] for name, sources in recipe.data.eval.items()} == {
        "eval": ["b.jsonl"]
    }
    assert recipe.training.report_to == ["tensorboard"]
    named = parse_recipe(text.replace("[b.jsonl]", "{easy: c, hard: [d, e]}"), "r", command="dpo", losses=LOSSES)
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
    recipe = parse_recipe(write_yaml(LEAST), "r", command="dpo", losses=LOSSES, overrides=overrides)
    assert parse_recipe(recipe.to_yaml(), "resolved", command="dpo", losses=LOSSES) == recipe


def test_the_loss_is_completed_with_its_defaults() -> None:
    recipe = parse_recipe(write_yaml(LEAST), "r", command="dpo", losses=LOSSES)
    rest = {"label_smoothing": 0.0, "reference_free": False}
    assert recipe.dpo.loss == {"type": "sigmoid", "beta": 0.1, "sft_weight": 0.0, **rest}
    several = parse_recipe(
        write_yaml(LEAST),
        "r",
        command="dpo",
        losses=LOSSES,
        overrides=["dpo.loss=[{type: hinge, weight: 2}, {type: sft}]"],
    )
    assert several.dpo.loss == [
        {"type": "hinge", "weight": 2.0, "beta": 0.1, "sft_weight": 0.0},
        {"type": "sft", "weight": 1.0},
    ]


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_the_shipped_recipes_load_back_equal(file: Path) -> None:
    command = yaml.safe_load(file.read_text(encoding="utf-8"))["method"]
    recipe = load_recipe(file, command=command, losses=LOSSES, formats=FORMATS)
    assert parse_recipe(recipe.to_yaml(), "resolved", command=command, losses=LOSSES) == recipe


def test_beta_dpo_is_shipped_in_its_published_settings() -> None:
    loss = load_recipe(RECIPES / "pythia28-hh-beta-dpo.yaml", command="dpo", losses=LOSSES).dpo.loss
    assert isinstance(loss, dict)
    published = {"type": "beta_dpo", "beta": 0.1, "alpha": 0.6, "filter_ratio": 0.2, "momentum": 0.9}
    assert loss | published == loss
    # What the released code hard-codes besides.
    assert (loss["beta_min"], loss["beta_max"], loss["gap_scale"], loss["base"]) == (1e-3, None, "raw", "sigmoid")

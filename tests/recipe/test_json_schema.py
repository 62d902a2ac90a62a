"""The JSON schema that editors get says what dpoctl says about a recipe."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpoctl.losses import LOSSES
from dpoctl.recipe import parse_recipe
from dpoctl.recipe.document import read_document
from dpoctl.recipe.json_schema import recipe_json_schema, set_modeline
from dpoctl.recipe.loader import known_paths
from dpoctl.recipe.schema import Recipe
from dpoctl.recipe.shipped import describe_recipe, shipped_recipes

SCHEMA = recipe_json_schema()
TYPES: dict[str, Any] = {
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "array": list,
    "object": dict,
    "null": type(None),
}
BOUNDS = {
    "minimum": lambda value, bound: value >= bound,
    "maximum": lambda value, bound: value <= bound,
    "exclusiveMinimum": lambda value, bound: value > bound,
    "exclusiveMaximum": lambda value, bound: value < bound,
    "minLength": lambda value, bound: len(value) >= bound,
    "minItems": lambda value, bound: len(value) >= bound,
    "const": lambda value, bound: value == bound,
    "enum": lambda value, bound: value in bound,
}


def is_valid(value: Any, schema: Any) -> bool:
    """Whether a value is valid, by as much of JSON Schema as pydantic writes for recipes."""
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema:
        return is_valid(value, SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]])
    if "anyOf" in schema and not any(is_valid(value, one) for one in schema["anyOf"]):
        return False
    kind = schema.get("type")
    if kind is not None and not is_a(value, kind):
        return False
    if not all(BOUNDS[key](value, bound) for key, bound in schema.items() if key in BOUNDS):
        return False
    if isinstance(value, list):
        return all(is_valid(item, schema.get("items", True)) for item in value)
    if isinstance(value, dict) and kind == "object":
        known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        return all(is_valid(item, known.get(key, others)) for key, item in value.items()) and set(
            schema.get("required", [])
        ) <= set(value)
    return True


def is_a(value: Any, kind: str) -> bool:
    """Whether a value has a type of JSON, in which true is no number."""
    return isinstance(value, TYPES[kind]) and not (isinstance(value, bool) and kind in ("integer", "number"))


@pytest.mark.parametrize("name", [name for name, file in shipped_recipes().items() if describe_recipe(file).trained])
def test_a_recipe_is_valid_and_one_with_a_misspelt_key_is_not(name: str) -> None:
    data = read_document(shipped_recipes()[name].read_text(encoding="utf-8"), name).data
    assert is_valid(data, SCHEMA)
    for section in ("model", "data", "training"):
        assert not is_valid(data | {section: data[section] | {"sead": 1}}, SCHEMA)
    assert not is_valid({key: value for key, value in data.items() if key != "training"}, SCHEMA)


LEAST: dict[str, Any] = {
    "method": "dpo",
    "model": {"model_name_or_path": "x"},
    "data": {"train": ["pairs.jsonl"]},
    "training": {"output_dir": "runs/x", "learning_rate": 1e-6},
}


@pytest.mark.parametrize(
    ("section", "value", "good"),
    [
        ("data", {"train": "pairs.jsonl"}, True),
        ("data", {"train": [{"path": "a"}, "b"]}, True),
        ("data", {"train": [{"split": "a"}]}, False),
        ("dpo", {"loss": {"type": "simpo", "gamma_beta_ratio": 0.3}}, True),
        ("dpo", {"loss": {"beta": 0.2}}, True),
        ("dpo", {"loss": {"type": "simpo", "gamma": 0.3}}, False),
        ("dpo", {"loss": {"type": "sigmoid", "weight": 2}}, False),
        ("dpo", {"loss": [{"type": "sigmoid", "weight": 2}, {"type": "sft"}]}, True),
        ("dpo", {"loss": []}, False),
        ("training", LEAST["training"] | {"report_to": "none"}, True),
        ("training", LEAST["training"] | {"report_to": ["wandb"]}, True),
        ("training", LEAST["training"] | {"report_to": ["mlflow"]}, False),
        ("training", LEAST["training"] | {"optim": "adamw_torch"}, True),
        ("training", LEAST["training"] | {"learning_rate": "fast"}, False),
        ("training", LEAST["training"] | {"global_batch_size": 0}, False),
        ("training", LEAST["training"] | {"seed": True}, False),
        ("lora", None, True),
        ("lora", {"target_modules": ["q_proj"]}, True),
        ("lora", {"r": 0}, False),
    ],
)
def test_the_schema_and_dpoctl_agree_on_values(section: str, value: Any, good: bool) -> None:
    data = LEAST | {section: value}
    assert is_valid(data, SCHEMA) == good
    if good:
        parse_recipe(yaml.safe_dump(data), "r", command="dpo")


def test_every_key_and_every_loss_is_in_it_with_its_text() -> None:
    loss = SCHEMA["$defs"]["DpoSection"]["properties"]["loss"]["anyOf"]
    assert [one["title"] for one in loss[:-1]] == list(LOSSES)
    for path in known_paths():
        if path[:2] == ("dpo", "loss") or not path:
            continue
        node: Any = SCHEMA
        for part in path:
            node = next(one for one in sections_of(node) if part in one["properties"])["properties"][part]
        assert node.get("description") or "$ref" in node, path
    assert set(SCHEMA["properties"]) == set(Recipe.model_fields)


def sections_of(node: dict[str, Any]) -> list[dict[str, Any]]:
    """The mappings that a schema allows."""
    if "$ref" in node:
        return sections_of(SCHEMA["$defs"][node["$ref"].rpartition("/")[2]])
    found = [one for part in node.get("anyOf", []) for one in sections_of(part)]
    return [node] if "properties" in node else found


def test_the_command_writes_it_and_begins_recipes_with_a_line_for_editors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dpoctl.cli.app import main

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dpoctl", "schema", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    assert json.loads(call()[1]) == SCHEMA
    Path("mine").mkdir()
    recipe = Path("mine/r.yaml")
    recipe.write_text(yaml.safe_dump(LEAST))
    for _ in range(2):
        assert call("-o", "recipe.schema.json", "--modeline", "mine/r.yaml")[0] == 0
        first, rest = recipe.read_text().split("\n", 1)
        assert first == "# yaml-language-server: $schema=../recipe.schema.json"
        assert rest == yaml.safe_dump(LEAST)
    assert json.loads(Path("recipe.schema.json").read_text()) == SCHEMA
    assert call("--modeline", "mine/r.yaml")[0] == 2
    code, _, err = call("-o", "other.json", "--modeline", "gone.yaml")
    assert (code, Path("other.json").exists()) == (2, False)
    assert re.match("error: there is no recipe 'gone.yaml'", err)


def test_the_line_for_editors_stands_once() -> None:
    once = set_modeline("method: dpo\n", Path("/a/s.json"), Path("/a/b"))
    assert once == "# yaml-language-server: $schema=../s.json\nmethod: dpo\n"
    assert set_modeline(once, Path("/a/s.json"), Path("/a")).count("yaml-language-server") == 1

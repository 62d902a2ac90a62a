"""The JSON schema of recipes, for editors: keys, types, bounds and texts are those of the schema in Python."""

import os
import re
from pathlib import Path
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from dpoctl.losses import LOSSES
from dpoctl.losses.base import loss_parameters
from dpoctl.recipe.library_names import OPTIM_ALIASES
from dpoctl.recipe.loss_section import DEFAULT, SFT
from dpoctl.recipe.schema import Recipe

DRAFT = "https://json-schema.org/draft/2020-12/schema"
MODELINE = "# yaml-language-server: $schema={}"
IS_MODELINE = re.compile(r"# yaml-language-server: \$schema=.*\n")
TEXT: dict[str, Any] = {"type": "string"}
SHORT_FORMS: dict[str, list[dict[str, Any]]] = {
    "source_path": [TEXT],
    "source_list": [TEXT],
    "eval_sets": [TEXT, {"type": "array"}, {"type": "null"}],
    "name_list": [TEXT, {"type": "null"}],
    "benchmark_task": [TEXT],
    "optim_name": [{"enum": sorted(OPTIM_ALIASES)}],
}
"""By the name of the function that reads it: other forms of a value, which become the one that the schema describes."""


class _Generator(GenerateJsonSchema):
    """Knows the short forms of values, which pydantic sees only as functions."""

    def function_before_schema(self, schema: core_schema.BeforeValidatorFunctionSchema) -> JsonSchemaValue:
        """Return the schema of a value, and of its short forms."""
        inner = super().function_before_schema(schema)
        short = SHORT_FORMS.get(getattr(schema["function"]["function"], "__name__", ""))
        return {"anyOf": [inner, *short]} if short else inner


def recipe_json_schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe for `sft` or `dpo`, with the hyperparameters of every loss."""
    schema = Recipe.model_json_schema(schema_generator=_Generator)
    one, several = _losses(with_weight=False), _losses(with_weight=True)
    loss = schema["$defs"]["DpoSection"]["properties"]["loss"]
    loss.pop("anyOf", None)
    loss["anyOf"] = [*one, {"type": "array", "minItems": 1, "items": {"anyOf": several}}]
    return {"$schema": DRAFT, "title": "A recipe of dpoctl", **{k: v for k, v in schema.items() if k != "title"}}


def set_modeline(recipe: str, schema: Path, folder: Path) -> str:
    """Return the text of a recipe with a first line that tells editors where its schema is.

    Args:
        recipe: The text.
        schema: The file of the schema.
        folder: The folder of the recipe, which the line names the schema from.
    """
    line = MODELINE.format(Path(os.path.relpath(schema, folder)).as_posix())
    return f"{line}\n{IS_MODELINE.sub('', recipe, count=1)}"


def _losses(*, with_weight: bool) -> list[dict[str, Any]]:
    """Return the schema of each loss; only a list has weights, and the likelihood as a loss."""
    found = []
    for name, loss in [*LOSSES.items(), *([(SFT, None)] if with_weight else [])]:
        schema = loss_parameters(loss, with_weight=with_weight).model_json_schema()
        properties = {"type": {"const": name}} | schema.get("properties", {})
        needed = [*schema.get("required", []), *(["type"] if with_weight or name != DEFAULT else [])]
        found.append({"title": name, "type": "object", "properties": properties, "additionalProperties": False})
        found[-1] |= {"required": needed} if needed else {}
    return found

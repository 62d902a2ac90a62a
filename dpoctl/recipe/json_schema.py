"""The recipe as a JSON schema, for editors that complete and check YAML."""

from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict, TypeAdapter

from dpoctl.recipe.schema import Recipe


def json_schema(losses: Mapping[str, Any]) -> dict[str, Any]:
    """Describe every key, its type, range, default and meaning.

    Args:
        losses: A loss by its name; their hyperparameters become the keys of `dpo.loss`.
    """
    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    parameters: dict[str, Any] = {"type": {"enum": list(losses), "description": "Which loss."}}
    for loss in losses.values():
        documented = TypeAdapter(loss, config=ConfigDict(use_attribute_docstrings=True)).json_schema()
        for name, described in documented.get("properties", {}).items():
            parameters.setdefault(name, described)
    section = schema["$defs"]["DpoSection"]["properties"]["loss"]
    section |= {"properties": parameters, "additionalProperties": False}
    return schema

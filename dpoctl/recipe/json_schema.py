"""The recipe as a JSON schema, for editors that complete and check YAML."""

import ast
import inspect
import textwrap
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from dpoctl.recipe.schema import Recipe
from dpoctl.recipe.validate import loss_parameters


def json_schema(losses: Mapping[str, Any]) -> dict[str, Any]:
    """Describe every key, its type, range, default and meaning.

    Args:
        losses: A loss by its name; their hyperparameters become the keys of `dpo.loss`.
    """
    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    parameters: dict[str, Any] = {"type": {"enum": list(losses), "description": "Which loss."}}
    for name, loss in losses.items():
        meanings = _attribute_docstrings(loss)
        for key, described in loss_parameters(loss).model_json_schema()["properties"].items():
            known = parameters.setdefault(key, described | {"description": meanings.get(key, "Of the losses")})
            known["description"] += f" [{name}]"
    section = schema["$defs"]["DpoSection"]["properties"]["loss"]
    section |= {"properties": parameters, "additionalProperties": False}
    return schema


def _attribute_docstrings(kind: type) -> dict[str, str]:
    """The text under each field of a class; pydantic reads it for its own classes only."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    return {
        field.target.id: text.value.value
        for field, text in pairwise(definition.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }

"""The recipe as a JSON schema, for editors that complete and check YAML."""

import ast
import inspect
import textwrap
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from typing import Any

from dpoctl.recipe.loss import SFT, loss_parameters
from dpoctl.recipe.schema import DpoSection, Recipe

DEFAULT = DpoSection().losses[0][1]["type"]
SFT_MEANING = "The mean negative log-likelihood of the tokens of preferred responses, as one of several losses."
WEIGHT_MEANING = "The weight of the loss in the sum of the list."


def json_schema(losses: Mapping[str, Any]) -> dict[str, Any]:
    """Describe every key, its type, range, default and meaning.

    Args:
        losses: A loss by its name; each becomes a mapping of its own that `dpo.loss` may be, or be a list of.
    """
    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    alone = {f"loss.{name}": _loss_schema(name, loss) for name, loss in losses.items()}
    listed = {f"term.{name}": _loss_schema(name, loss, in_list=True) for name, loss in losses.items()}
    listed[f"term.{SFT}"] = _loss_schema(SFT, None, in_list=True)
    schema["$defs"] |= alone | listed
    section = schema["$defs"]["DpoSection"]["properties"]["loss"]
    section["anyOf"] = [*_references(alone), {"type": "array", "minItems": 1, "items": {"anyOf": _references(listed)}}]
    return schema


def _references(definitions: Mapping[str, Any]) -> list[dict[str, str]]:
    return [{"$ref": f"#/$defs/{name}"} for name in definitions]


def _loss_schema(name: str, loss: Any, *, in_list: bool = False) -> dict[str, Any]:
    """The mapping that a loss is written as."""
    meanings = {} if loss is None else _attribute_docstrings(loss)
    described = loss_parameters(loss, with_weight=in_list).model_json_schema()["properties"]
    keys: dict[str, Any] = {"type": {"const": name, "description": "Which loss."}}
    for key, values in described.items():
        keys[key] = values | {"description": meanings.get(key, WEIGHT_MEANING)}
    return {
        "type": "object",
        "description": SFT_MEANING if loss is None else inspect.cleandoc(loss.__doc__),
        "properties": keys,
        "required": [] if name == DEFAULT and not in_list else ["type"],
        "additionalProperties": False,
    }


@cache
def _attribute_docstrings(kind: type) -> dict[str, str]:
    """The text under each field of a class and of its bases; pydantic reads it for its own classes only."""
    inherited = [_attribute_docstrings(base) for base in kind.__bases__ if hasattr(base, "__dataclass_fields__")]
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    own = {
        field.target.id: text.value.value
        for field, text in pairwise(definition.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }
    return {key: meaning for meanings in (*inherited, own) for key, meaning in meanings.items()}

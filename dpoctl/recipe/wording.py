"""Pydantic's errors in a recipe's words: what was expected, what was given, what was meant."""

from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

from dpoctl.recipe.document import Document
from dpoctl.recipe.expect import Path, choices, describe, hint_at, unwrap
from dpoctl.recipe.problems import Problem, dotted, shown
from dpoctl.recipe.scalars import read_scalar
from dpoctl.recipe.suggest import Suggester, closest
from dpoctl.recipe.writer import write_yaml


def explain(
    error: ErrorDetails, root: type[BaseModel], prefix: Path, document: Document, suggester: Suggester
) -> Problem:
    """Turn one error into a problem with a place.

    Args:
        error: As pydantic reports it.
        root: The model that was validated.
        prefix: Where that model stands in the recipe.
        document: The recipe, for places.
        suggester: For keys that are not known.
    """
    inner = tuple(error["loc"])
    path = (*prefix, *inner)
    if error["type"] == "extra_forbidden":
        return _unknown(inner, root, prefix, document, suggester)
    if error["type"] == "missing":
        return Problem(document.key_place(path[:-1]), _missing(inner, root, path), path)
    expected = error.get("ctx", {}).get("expected") if error["type"] == "expectation" else None
    hint = hint_at(root, inner)
    given = error["input"]
    message = f"{dotted(path)}: expected {expected or describe(hint)}, got {shown(given)}"
    return Problem(document.value_place(path), message + _advice(hint, given, inner, root), path)


def field_at(root: type[BaseModel], path: Path) -> FieldInfo | None:
    """The field of the schema at a path; None for what lies inside lists and free mappings."""
    if not path:
        return None
    model, _ = unwrap(hint_at(root, path[:-1]))
    if isinstance(model, type) and issubclass(model, BaseModel):
        return model.model_fields.get(str(path[-1]))
    return None


def _unknown(inner: Path, root: type[BaseModel], prefix: Path, document: Document, suggester: Suggester) -> Problem:
    section, key = (*prefix, *inner[:-1]), str(inner[-1])
    model, _ = unwrap(hint_at(root, inner[:-1]))
    siblings = list(model.model_fields)
    meant = suggester.meant(section, key, siblings)
    if meant is None:
        names = ", ".join(siblings)
        said = f"{dotted(section)} takes {names}" if section else f"a recipe has {names}"
    else:
        said = f"did you mean {str(meant[-1]) if meant[:-1] == section else dotted(meant)!r}?"
    path = (*section, key)
    return Problem(document.key_place(path), f"unknown key {shown(key)}, {said}", path, meant)


def _missing(inner: Path, root: type[BaseModel], path: Path) -> str:
    field = field_at(root, inner)
    example = field.examples[0] if field and field.examples else None
    written = write_yaml({path[-1]: example}, inline=True)[1:-1]
    return f"missing key {dotted(path)!r}, for example {written}"


def _advice(hint: Any, given: Any, inner: Path, root: type[BaseModel]) -> str:
    if isinstance(given, str):
        if match := closest(given, choices(hint)):
            return f", did you mean {match!r}?"
        kind, _ = unwrap(hint)
        if kind in (int, float) and _is_number(given):
            return "; remove the quotes"
    field = field_at(root, inner)
    if field is None or choices(hint) or unwrap(hint)[0] is bool:
        return ""
    if given is None and not field.is_required():
        return "; leave the key out for its default"
    example = field.examples[0] if field.examples else field.default
    if example is None or example is PydanticUndefined or isinstance(example, BaseModel):
        return ""
    return f"; for example {write_yaml({inner[-1]: example}, inline=True)[1:-1]}"


def _is_number(text: str) -> bool:
    try:
        return isinstance(read_scalar(text), int | float)
    except ValueError:
        return False

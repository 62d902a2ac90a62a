"""Error messages for wrong keys and values: the values that the schema expects, and the key that was probably meant."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

from dpoctl.recipe.diagnostics import Diagnostic, KeyPath, dotted, shown
from dpoctl.recipe.document import Document, read_scalar, write_yaml
from dpoctl.recipe.foreign_keys import remark_on, translate_key, translate_value, why_not_offered
from dpoctl.recipe.section import Expect

MAX_KEY_LENGTH = 64
MOST_LISTED = 20
MOST_CHOICES = 6
"""More values of a key are not listed beside the one that was probably meant."""
TYPE_NAMES = {bool: "true or false", str: "text", dict: "a mapping", int: "a whole number", float: "a number"}


def closest(text: str, candidates: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the candidate that is most similar to a text, the start of the text first; None if none is similar."""
    if len(text) > MAX_KEY_LENGTH:
        return None
    names = {name.lower(): name for name in candidates}
    matches = get_close_matches(text.lower(), list(names), n=3, cutoff=cutoff)
    # `adamw_torch` means `adamw`, although `adamw_8bit` has more letters in common with it.
    matches.sort(key=lambda name: not text.lower().startswith(f"{name}_"))
    return names[matches[0]] if matches else None


class Suggester:
    """Finds the key that was probably meant by an unknown one.

    Args:
        known: All keys of the schema.
    """

    def __init__(self, known: Sequence[KeyPath]) -> None:
        self.listed = set[KeyPath]()
        """Sections whose keys a message has listed."""
        self._known = set(known)
        self._leaves: dict[str, KeyPath] = {}
        for path in known:
            self._leaves.setdefault(str(path[-1]), path)

    def suggest(self, section: KeyPath, key: str, siblings: Sequence[str]) -> KeyPath | None:
        """Search the keys of the same section, then the keys of other tools, then all sections.

        Args:
            section: The section that has the unknown key.
            key: The unknown key.
            siblings: The known keys of the section.
        """
        if sibling := closest(key, siblings, cutoff=0.8):
            return (*section, sibling)
        theirs = translate_key(dotted(section), key)
        if theirs and (ours := tuple(theirs.split("."))) in self._known:
            return ours
        if key in self._leaves:
            return self._leaves[key]
        if why_not_offered(key):
            return None
        if sibling := closest(key, siblings):
            return (*section, sibling)
        anywhere = closest(key, self._leaves, cutoff=0.75)
        return self._leaves[anywhere] if anywhere else None


def explain(
    error: ErrorDetails, root: type[BaseModel], prefix: KeyPath, document: Document, suggester: Suggester
) -> Diagnostic:
    """Turn an error of pydantic into a diagnostic.

    Args:
        error: The error.
        root: The model that was validated.
        prefix: The path of that model in the recipe.
        document: The recipe as written.
        suggester: Finds what was meant by unknown keys.
    """
    inner = tuple(error["loc"])
    path = (*prefix, *inner)
    if error["type"] == "extra_forbidden":
        return _unknown(inner, root, prefix, document, suggester)
    if error["type"] == "missing":
        return Diagnostic.error(path, _missing(inner, root, path), document.key_place(path[:-1]))
    hint, given = hint_at(root, inner), error["input"]
    if error["type"] == "too_long":
        message = f"{dotted(path)}: expected at most {error['ctx']['max_length']} items, got {len(given)}"
        return Diagnostic.error(path, message, document.value_place(path))
    expected = f"at most {int(error['ctx']['le']):,}" if error["type"] == "less_than_equal" else describe(hint)
    remedy = _remedy(hint, given, inner, root)
    is_long = len(choices(hint)) > MOST_CHOICES and "did you mean" in remedy
    message = f"{dotted(path)}: {'' if is_long else f'expected {expected}, '}got {shown(given)}{remedy}"
    return Diagnostic.error(path, message, document.value_place(path))


def field_at(root: type[BaseModel], path: KeyPath) -> FieldInfo | None:
    """Return the field of the schema at a path; None inside lists and free mappings."""
    if not path:
        return None
    model, _ = unwrap(hint_at(root, path[:-1]))
    if isinstance(model, type) and issubclass(model, BaseModel):
        return model.model_fields.get(str(path[-1]))
    return None


@cache
def hints(model: type[BaseModel]) -> dict[str, Any]:
    """Return the types of a model's fields, with their metadata."""
    return get_type_hints(model, include_extras=True)


def unwrap(hint: Any) -> tuple[Any, list[Any]]:
    """Remove `Annotated` and `| None` from a type; return the rest, and the metadata."""
    metadata: list[Any] = []
    while True:
        if get_origin(hint) is Annotated:
            hint, *extra = get_args(hint)
            metadata += extra
            continue
        members = [member for member in get_args(hint) if member is not NoneType]
        if get_origin(hint) in (Union, UnionType) and len(members) == 1:
            hint = members[0]
            continue
        return hint, metadata


def hint_at(root: type[BaseModel], path: Sequence[str | int]) -> Any:
    """Return the type at a path of keys and list indices; None where the schema does not say."""
    hint: Any = root
    for part in path:
        kind, _ = unwrap(hint)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            hint = hints(kind).get(str(part))
        elif get_origin(kind) is list:
            hint = get_args(kind)[0]
        elif get_origin(kind) is dict:
            hint = get_args(kind)[1]
        else:
            return None
    return hint


def describe(hint: Any) -> str:
    """Describe the values of a type in words: `a number above 0`, `nf4 or fp4`."""
    words = _describe(*unwrap(hint))
    return f"{words}, or null" if NoneType in get_args(hint) else words


def choices(hint: Any) -> list[str]:
    """List the texts that a type allows; empty if it allows any text, or none."""
    kind, _ = unwrap(hint)
    if get_origin(kind) in (Union, UnionType):
        return [text for member in get_args(kind) for text in choices(member)]
    return [str(choice) for choice in get_args(kind)] if get_origin(kind) is Literal else []


def _unknown(
    inner: KeyPath, root: type[BaseModel], prefix: KeyPath, document: Document, suggester: Suggester
) -> Diagnostic:
    section, key = (*prefix, *inner[:-1]), str(inner[-1])
    model, _ = unwrap(hint_at(root, inner[:-1]))
    siblings = list(model.model_fields)
    meant = suggester.suggest(section, key, siblings)
    if meant is None:
        hint = _no_such_key(section, key, siblings, suggester)
    else:
        remark = remark_on(key)
        hint = f", did you mean {str(meant[-1]) if meant[:-1] == section else dotted(meant)!r}?"
        hint += f" ({remark})" if remark else ""
    path = (*section, key)
    return Diagnostic.error(path, f"unknown key {shown(key)}{hint}", document.key_place(path), meant=meant)


def _no_such_key(section: KeyPath, key: str, siblings: Sequence[str], suggester: Suggester) -> str:
    """Say what does the job of a key that is not like any other, or list the keys of its section, once."""
    if why := why_not_offered(key):
        return f": {why}"
    name = dotted(section) if section else "a recipe"
    if section in suggester.listed:
        return f" of {name}"
    suggester.listed.add(section)
    more = len(siblings) - MOST_LISTED
    others = f" and {more} more, which `dpoctl recipes --key {name}` explains" if more > 0 else ""
    return f"; the keys of {name} are {', '.join(siblings[:MOST_LISTED])}{others}"


def _missing(inner: KeyPath, root: type[BaseModel], path: KeyPath) -> str:
    field = field_at(root, inner)
    example = field.examples[0] if field and field.examples else None
    written = write_yaml({path[-1]: example}, inline=True)[1:-1]
    return f"missing key {dotted(path)!r}, for example {written}"


def _remedy(hint: Any, given: Any, inner: KeyPath, root: type[BaseModel]) -> str:
    if isinstance(given, str):
        key = next((str(part) for part in reversed(inner) if isinstance(part, str)), "")
        if theirs := translate_value(key, given.lower()):
            ours, remark = theirs
            return f", did you mean {ours!r}?" + (f" ({remark})" if remark else "")
        if "," in given and _is_in_list(hint, inner):
            return f", did you mean [{', '.join(part.strip() for part in given.split(','))}]?"
        if match := closest(given, choices(hint)):
            return f", did you mean {match!r}?"
        kind, _ = unwrap(hint)
        if kind in (int, float) and _is_number(given):
            return "; remove the quotes"
    field = field_at(root, inner)
    if field is None or choices(hint) or unwrap(hint)[0] is bool:
        return ""
    if given is None and not field.is_required():
        return "; remove the key to use its default"
    example = field.examples[0] if field.examples else field.default
    if example is None or example is PydanticUndefined or isinstance(example, BaseModel):
        return ""
    return f"; for example {write_yaml({inner[-1]: example}, inline=True)[1:-1]}"


def _is_in_list(hint: Any, inner: KeyPath) -> bool:
    """Whether a value could be a list, or was read as the one item of a list."""
    kind, _ = unwrap(hint)
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return isinstance(inner[-1], int) or any(get_origin(unwrap(member)[0]) is list for member in members)


def _is_number(text: str) -> bool:
    try:
        return isinstance(read_scalar(text), int | float)
    except ValueError:
        return False


def _describe(kind: Any, metadata: list[Any]) -> str:
    for extra in metadata:
        if isinstance(extra, Expect):
            return extra.words
    origin = get_origin(kind)
    if origin is Literal:
        return _either([str(choice) for choice in get_args(kind)])
    if origin is list:
        return f"a list, each item {describe(get_args(kind)[0])}"
    if origin in (Union, UnionType):
        return _either([describe(member) for member in get_args(kind) if member is not NoneType])
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return f"a mapping with keys such as {', '.join(list(kind.model_fields)[:3])}"
    if kind is str and any(isinstance(extra, MinLen) for extra in metadata):
        return "non-empty text"
    return TYPE_NAMES.get(origin or kind, "another value") + _bounds(metadata)


def _either(texts: list[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} or {texts[-1]}"


UNSAID = 100_000_000
"""A limit from which on it is named only to those who exceed it."""


def _bounds(metadata: list[Any]) -> str:
    words = []
    for extra in metadata:
        match extra:
            case Gt():
                words.append(f"above {extra.gt}")
            case Ge():
                words.append(f"of at least {extra.ge}")
            case Lt():
                words.append(f"below {extra.lt}")
            case Le(le=limit) if isinstance(limit, int | float) and limit < UNSAID:
                words.append(f"at most {limit}")
            case _:
                pass
    return f" {' and '.join(words)}" if words else ""

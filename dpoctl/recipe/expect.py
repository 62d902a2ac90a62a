"""What a key expects, in words: read off the type in the schema, so that it is written once."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel

Path = tuple[str | int, ...]
WORDS = {bool: "true or false", str: "text", dict: "a mapping", int: "a whole number", float: "a number"}


@dataclass(frozen=True)
class Expect:
    """The words for a type that has a wording of its own; put among the metadata of `Annotated`."""

    words: str


@cache
def hints(model: type[BaseModel]) -> dict[str, Any]:
    """The annotations of a model's fields, metadata included."""
    return get_type_hints(model, include_extras=True)


def unwrap(hint: Any) -> tuple[Any, list[Any]]:
    """Peel `Annotated` and `| None` off a type; return what is left, and the metadata."""
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
    """Find the type at a path of keys and list indices; None where the schema knows nothing."""
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
    """Say what a value of this type looks like: `a number above 0`, `one of nf4, fp4`, ..."""
    kind, metadata = unwrap(hint)
    nullable = NoneType in get_args(hint)
    for extra in metadata:
        if isinstance(extra, Expect):
            return extra.words
    if get_origin(kind) is Literal:
        words = _choices([str(choice) for choice in get_args(kind)])
    elif get_origin(kind) is list:
        words = f"a list, each {describe(get_args(kind)[0])}"
    elif get_origin(kind) in (Union, UnionType):
        words = _choices([describe(member) for member in get_args(kind) if member is not NoneType])
    elif isinstance(kind, type) and issubclass(kind, BaseModel):
        words = f"a mapping with keys such as {', '.join(list(kind.model_fields)[:3])}"
    else:
        words = WORDS.get(get_origin(kind) or kind, "another value") + _bounds(metadata)
    return f"{words}, or null" if nullable else words


def choices(hint: Any) -> list[str]:
    """The texts that a type allows, where it allows no others."""
    kind, _ = unwrap(hint)
    if get_origin(kind) in (Union, UnionType):
        return [text for member in get_args(kind) for text in choices(member)]
    return [str(choice) for choice in get_args(kind)] if get_origin(kind) is Literal else []


def _choices(texts: list[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} or {texts[-1]}"


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
            case Le():
                words.append(f"at most {extra.le}")
            case MinLen():
                words.append("that is not empty")
            case _:
                pass
    return f" {' and '.join(words)}" if words else ""

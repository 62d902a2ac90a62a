"""Secrets in recipes, which are refused: a run keeps a copy of its recipe, which later commands read."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import yaml

from dpoctl.recipe.diagnostics import Diagnostic, KeyPath, Place, RecipeError, dotted
from dpoctl.recipe.document import LOADER, Document, read_value
from dpoctl.redact import HIDDEN, find_secret, is_secret_name, is_secret_value, redact_source

LABELS: tuple[KeyPath, ...] = (("data", "eval"), ("eval", "judge", "categories"), ("splits",))
"""Mappings whose keys are the user's own names, such as a category `pass`."""
_HUB = "log in with `hf auth login`, or set the environment variable HF_TOKEN"
_WANDB = "log in with `wandb login`, or set the environment variable WANDB_API_KEY"
PLACES = dict.fromkeys(("hugging face", "huggingface", "hub_", "hf_"), _HUB) | dict.fromkeys(
    ("weights &", "wandb"), _WANDB
)
"""Where a secret belongs, by a part of its kind in words."""
ELSEWHERE = "set an environment variable that the library in question reads"
_WORD_VALUE = re.compile(r"[a-z0-9]*(?:[-_./][a-z0-9]+)*")


def refuse_secrets(document: Document, overrides: Sequence[str] = ()) -> None:
    """Refuse a recipe that holds a secret; call it before anything of the recipe is shown.

    Args:
        document: The recipe as written in its file.
        overrides: `key=value` texts; one that a later one replaces would stand in the command line that a run keeps.

    Raises:
        RecipeError: Each secret by its place, without the secret.
    """
    problems = [*_in_document(document)]
    for number, text in enumerate(overrides, start=1):
        problems += _in_override(text, Place(document.name, override=number))
    if problems:
        raise RecipeError(problems)


def refuse_secret_argument(name: str, value: str) -> None:
    """Refuse an argument of a command that holds a secret.

    Raises:
        RecipeError: It holds one.
    """
    if (kind := _kind(value)) is not None:
        raise RecipeError([Diagnostic.error((name,), f"{name}: {_message(kind)}")])


def without_secrets(text: str) -> str:
    """Return the text of a recipe without the secrets in its comments; its keys and values have none."""
    lines, shown = text.splitlines(keepends=True), ""
    line, column = 0, 0
    for token in yaml.scan(text, Loader=LOADER):
        start, end = token.start_mark, token.end_mark
        shown += redact_source(_between(lines, (line, column), (start.line, start.column)))
        content = _between(lines, (start.line, start.column), (end.line, end.column))
        if isinstance(token, yaml.ScalarToken) and token.style in ("|", ">"):
            # The comment in the first line of a block belongs to the block.
            head, mark, rest = content.partition("\n")
            sign, comment, words = head.partition("#")
            content = sign + comment + redact_source(words) + mark + rest
        shown += content
        line, column = end.line, end.column
    return shown + redact_source(_between(lines, (line, column), (len(lines), 0)))


def _between(lines: Sequence[str], start: tuple[int, int], end: tuple[int, int]) -> str:
    if start[0] == end[0]:
        return lines[start[0]][start[1] : end[1]] if start[0] < len(lines) else ""
    rest = lines[end[0]][: end[1]] if end[0] < len(lines) else ""
    return lines[start[0]][start[1] :] + "".join(lines[start[0] + 1 : end[0]]) + rest


def _in_document(document: Document) -> Iterator[Diagnostic]:
    for path, kind in _find(document.data, ()):
        found = Diagnostic.error(path, f"{dotted(path)}: {_message(kind)}")
        place = document.key_place(path)
        indent = " " * (place.column - 1)
        yield replace(found, place=replace(place, excerpt=f"{indent}{_shown_key(path)}: {HIDDEN}"))


def _in_override(text: str, place: Place) -> Iterator[Diagnostic]:
    name, equals, value = text.partition("=")
    try:
        data = read_value(value if equals else text, place).data
    except RecipeError:
        data = value
    path = tuple(name.strip().split(".")) if equals else ()
    above = path[:-1] if path else ()
    content = {path[-1]: data} if path else data
    found = [kind for _, kind in _find(content, above)]
    found += [kind] if not found and (kind := _kind(text)) else []
    if found:
        at = replace(place, excerpt=f"{_shown_key(path)}={HIDDEN}" if path else HIDDEN)
        yield Diagnostic.error(path, f"{dotted(path) or 'this value'}: {_message(found[0])}", at)


def _find(node: Any, path: KeyPath, *, is_named: bool = False) -> Iterator[tuple[KeyPath, str]]:
    """Yield the path of each secret, and what kind of secret it is.

    Args:
        node: Mappings, lists and scalars.
        path: The path of the node.
        is_named: A key above has the name of a secret.
    """
    if isinstance(node, dict):
        for key, value in node.items():
            if kind := _kind(str(key)):
                yield (*path, HIDDEN), kind
            name = str(key)
            yield from _find(value, (*path, name), is_named=is_named or (path not in LABELS and is_secret_name(name)))
    elif isinstance(node, list):
        for number, item in enumerate(node):
            yield from _find(item, (*path, number), is_named=is_named)
    elif kind := _kind(node) if isinstance(node, str) else None:
        yield path, kind
    else:
        name = next((part for part in reversed(path) if isinstance(part, str)), "")
        is_label = path[:-1] in LABELS or any(path[: len(above)] == above for above in LABELS)
        if is_secret_value("password" if is_named and not is_secret_name(name) else name, node) and (
            is_named or not is_label
        ):
            yield path, f"a value of {name}"


def _kind(text: str) -> str | None:
    """Return the kind of secret that a text holds: of a known shape, or the value of an environment variable."""
    if kind := find_secret(text):
        return kind
    for name, value in os.environ.items():
        is_word = _WORD_VALUE.fullmatch(value) is not None
        if len(value) >= 8 and value in text and is_secret_name(name) and not is_word and not os.path.lexists(value):
            return f"the value of the environment variable {name}"
    return None


def _message(kind: str) -> str:
    where = next((place for sign, place in PLACES.items() if sign in kind.lower()), ELSEWHERE)
    return f"this looks like {kind}, and a run keeps a copy of its recipe; remove it, and {where}"


def _shown_key(path: KeyPath) -> str:
    return next((part for part in reversed(path) if isinstance(part, str)), "")

"""`--set a.b=c`: values from the command line, put over those of the recipe."""

from collections.abc import Iterable, Sequence
from typing import Any

from dpoctl.recipe.document import Document, read_value
from dpoctl.recipe.expect import Path
from dpoctl.recipe.problems import Place, Problem, RecipeError, dotted, shown


def apply_overrides(document: Document, overrides: Sequence[str], known: Iterable[Path]) -> None:
    """Put each override into the document; later ones win.

    Args:
        document: A recipe whose root is a mapping; what cannot be applied is added to its problems.
        overrides: `key=value` texts: a full key, or an end of one that is unique; the value is YAML.
        known: All keys of the schema.
    """
    paths = list(known)
    for number, text in enumerate(overrides, start=1):
        place = Place(document.name, excerpt=text, override=number)
        try:
            _apply(document, text, place, paths)
        except RecipeError as error:
            document.problems += error.problems


def _apply(document: Document, text: str, place: Place, known: list[Path]) -> None:
    name, equals, value = text.partition("=")
    if not (equals and name.strip()):
        raise RecipeError([Problem(place, f"expected key=value, got {shown(text)}")])
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise RecipeError([Problem(place, f"not UTF-8 text: {shown(text)}")])
    given = read_value(value, place)
    path = _put(document, _resolve(name.strip(), place, known), given.data, place)
    document.problems += [Problem(problem.place, problem.message, (*path, *problem.path)) for problem in given.problems]
    document.values |= dict.fromkeys(((*path, *inner) for inner in given.values), place)
    document.keys |= dict.fromkeys(((*path, *inner) for inner in given.keys), place)


def _resolve(name: str, place: Place, known: list[Path]) -> Path:
    path: Path = tuple(int(part) if part.isdecimal() else part for part in name.split("."))
    if any(candidate[0] == path[0] for candidate in known):
        return path
    for end in range(len(path), 0, -1):
        matches = [candidate for candidate in known if candidate[-end:] == path[:end]]
        # What only looks at a model yields a name to what trains it: `seed` is training.seed.
        matches = [match for match in matches if match[0] != "eval"] or matches
        if len(matches) > 1:
            several = ", ".join(dotted(match) for match in matches)
            raise RecipeError([Problem(place, f"{name!r} could be any of {several}; write one in full")])
        if matches:
            return (*matches[0], *path[end:])
    return path


def _put(document: Document, path: Path, value: Any, place: Place) -> Path:
    """Put a value in its place, with the sections above it; return the path as it is written now."""
    node = document.data
    written: Path = ()
    for part in path[:-1]:
        written += (_step(node, part, written, place),)
        if isinstance(node, dict) and node.get(written[-1]) is None:
            node[written[-1]] = {}
            document.keys[written] = document.values[written] = place
        node = node[written[-1]]
    written += (_step(node, path[-1], written, place),)
    node[written[-1]] = value
    for places in (document.keys, document.values):
        for stale in [other for other in places if other[: len(written)] == written]:
            del places[stale]
    document.keys[written] = place
    return written


def _step(node: Any, part: str | int, above: Path, place: Place) -> str | int:
    """Check that a container has room for a key or an index, and spell it as that container does."""
    if isinstance(node, dict):
        return str(part)
    if not isinstance(node, list):
        raise RecipeError([Problem(place, f"{dotted(above)} is {shown(node)}, which has no keys")])
    if not isinstance(part, int):
        several = f"{dotted(above)} is a list of {len(node)}"
        raise RecipeError([Problem(place, f"{several}; say which, e.g. {dotted(above)}.0.{part}")])
    if part >= len(node):
        raise RecipeError([Problem(place, f"{dotted(above)} has {len(node)} items and no item {part!r}")])
    return part

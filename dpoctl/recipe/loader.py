"""Reading a recipe: the file, the overrides, the checks; no model library is needed for any of it."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpoctl.errors import UsageError
from dpoctl.recipe.document import LINE_BREAK, Document, read_document
from dpoctl.recipe.foreign import recognise
from dpoctl.recipe.overrides import apply_overrides
from dpoctl.recipe.problems import Place, Problem, RecipeError, dotted, shown
from dpoctl.recipe.schema import Recipe
from dpoctl.recipe.suggest import closest
from dpoctl.recipe.validate import known_paths, validate

MAX_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Examined:
    """What reading a recipe has found out.

    Args:
        document: Every key and value with its place.
        recipe: Complete; where there are problems, other values stand in the place of the wrong ones.
        problems: Everything that is wrong, in the order of the file.
    """

    document: Document
    recipe: Recipe | None
    problems: list[Problem]

    def accept(self) -> Recipe:
        """The recipe.

        Raises:
            RecipeError: With everything that is wrong in it, each with its line and column.
        """
        if self.problems or self.recipe is None:
            raise RecipeError(self.problems)
        return self.recipe


def load_recipe(
    path: Path | str,
    *,
    command: str,
    overrides: Sequence[str] = (),
    losses: Mapping[str, Any],
    formats: Mapping[str, Any] | None = None,
) -> Recipe:
    """Read, check and complete a recipe.

    Args:
        path: The YAML file.
        command: The command that reads it, `sft` or `dpo`.
        overrides: `key=value` texts that win over the file; later ones win over earlier ones.
        losses: A loss by its name: a frozen dataclass whose fields are its hyperparameters.
        formats: A data format by its name; None leaves the names unchecked.

    Raises:
        UsageError: There is no such file.
        RecipeError: With everything that is wrong in it, each with its line and column.
    """
    text = read_text(path)
    return parse_recipe(text, str(path), command=command, overrides=overrides, losses=losses, formats=formats)


def parse_recipe(
    text: str,
    name: str,
    *,
    command: str,
    overrides: Sequence[str] = (),
    losses: Mapping[str, Any],
    formats: Mapping[str, Any] | None = None,
) -> Recipe:
    """Check and complete a recipe that is in memory; see `load_recipe`.

    Args:
        text: The YAML.
        name: What errors call it.
        command: As for `load_recipe`.
        overrides: As for `load_recipe`.
        losses: As for `load_recipe`.
        formats: As for `load_recipe`.

    Raises:
        RecipeError: With everything that is wrong in it, each with its line and column.
    """
    return examine_recipe(text, name, command=command, overrides=overrides, losses=losses, formats=formats).accept()


def examine_recipe(
    text: str,
    name: str,
    *,
    command: str | None = None,
    overrides: Sequence[str] = (),
    losses: Mapping[str, Any],
    formats: Mapping[str, Any] | None = None,
) -> Examined:
    """Find everything that is wrong with a recipe that is in memory, without refusing it; see `load_recipe`.

    Args:
        text: The YAML.
        name: What errors call it.
        command: As for `load_recipe`; None for the command that the recipe is written for.
        overrides: As for `load_recipe`.
        losses: As for `load_recipe`.
        formats: As for `load_recipe`.

    Raises:
        RecipeError: It is no YAML, or not a recipe at all.
    """
    document = read_document(text, name)
    if not isinstance(document.data, dict):
        given = "nothing" if document.data is None else shown(document.data)
        message = f"expected the sections of a recipe (method, model, data, training), got {given}"
        raise RecipeError([Problem(document.value_place(()), message)])
    known = known_paths(losses)
    if foreign := recognise(document.data, map(dotted, known)):
        sign, message = foreign
        raise RecipeError([Problem(document.key_place((sign,)), message)])
    apply_overrides(document, overrides, known)
    if command is None:
        command = "sft" if document.data.get("method") == "sft" else "dpo"
    return Examined(document, *validate(document, command, losses, formats))


def read_text(path: Path | str) -> str:
    """Read the file of a recipe.

    Raises:
        UsageError: There is no such file, or it cannot be read.
        RecipeError: It is larger than 1 MiB, or not UTF-8.
    """
    file = Path(path)
    try:
        if not file.exists():
            near = _nearest(file)
            raise UsageError(f"there is no recipe {str(path)!r}", hint=f"did you mean {near!r}?" if near else None)
        if file.is_dir():
            raise UsageError(f"{str(path)!r} is a folder", hint="name the YAML file of a recipe")
        with open(file, "rb", opener=_without_waiting) as stream:
            raw = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"the recipe {str(path)!r} cannot be read: {error.strerror}") from None
    if len(raw) > MAX_BYTES:
        raise RecipeError([Problem(Place(str(path), 1, 1), "larger than 1 MiB; is this a recipe?")])
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        lines = LINE_BREAK.split(raw[: error.start].decode("utf-8-sig"))
        place = Place(str(path), len(lines), len(lines[-1]) + 1, lines[-1])
        raise RecipeError([Problem(place, "not UTF-8 text")]) from None


def _without_waiting(path: str, flags: int) -> int:
    """Open a pipe that nobody writes to as an empty file; one that somebody writes to is read to its end."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    os.set_blocking(descriptor, True)
    return descriptor


def _nearest(file: Path) -> str | None:
    """The recipe whose name is most like the one asked for: in its folder, or in recipes/."""
    candidates = {
        found.name: found
        for folder in (Path("recipes"), file.parent)
        if folder.is_dir()
        for found in sorted(folder.iterdir())
        if found.suffix in (".yaml", ".yml")
    }
    name = closest(file.name, candidates) or closest(file.stem, candidates)
    return str(candidates[name]) if name else None

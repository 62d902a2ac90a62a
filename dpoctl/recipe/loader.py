"""Loading of recipes: the file, the overrides, the validation and the consistency checks; needs no model library."""

import copy
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dpoctl.errors import UsageError
from dpoctl.recipe.consistency import find_contradictions
from dpoctl.recipe.data_section import SOURCE_FORMATS
from dpoctl.recipe.diagnostics import Diagnostic, KeyPath, Place, RecipeError, dotted, in_order, shown
from dpoctl.recipe.document import LINE_BREAK, VARIABLE, Document, apply_overrides, read_document
from dpoctl.recipe.foreign_keys import recognise
from dpoctl.recipe.key_errors import Suggester, closest, explain, field_at, hints, unwrap
from dpoctl.recipe.loss_section import complete_losses, hyperparameters, unknown_choice
from dpoctl.recipe.schema import LOSS, Recipe
from dpoctl.recipe.secrets import refuse_secrets
from dpoctl.recipe.shipped import shipped_recipes

MAX_BYTES = 2**20
MAX_ATTEMPTS = 6
NAMES = {"model_name_or_path", "revision", "chat_template", "path", "name", "split", "data_files", "items"} | {
    *("output_dir", "run_name", "hub_model_id"),
}
"""Keys whose values are paths or names."""
SOURCES = (("data", "train"), ("data", "eval"))


@dataclass(frozen=True, slots=True)
class Examined:
    """A recipe that was read, with its problems.

    Args:
        document: The recipe as written, with the place of every key and value.
        recipe: The complete recipe. Where it has problems, examples or defaults replace the wrong values.
        problems: The errors, in the order of the file.
        is_understood: Every key and value is known, so that the errors, if any, are contradictions between them.
    """

    document: Document
    recipe: Recipe | None
    problems: list[Diagnostic]
    is_understood: bool = True

    def accept(self) -> Recipe:
        """Return the recipe if nothing is wrong with it.

        Raises:
            RecipeError: All its errors, each with its line and column.
        """
        if self.problems or self.recipe is None:
            raise RecipeError(self.problems)
        return self.recipe


def parse_recipe(text: str, name: str, *, command: str, overrides: Sequence[str] = ()) -> Recipe:
    """Check and complete the text of a recipe.

    Args:
        text: The YAML.
        name: The name of the file in messages.
        command: The command that reads it, `sft` or `dpo`.
        overrides: `key=value` texts that replace values of the file; the last one of a key counts.

    Raises:
        RecipeError: All errors of the recipe, each with its line and column.
    """
    return examine_recipe(text, name, command=command, overrides=overrides).accept()


def examine_recipe(text: str, name: str, *, command: str | None = None, overrides: Sequence[str] = ()) -> Examined:
    """Find the errors of a recipe without raising them.

    Args:
        text: The YAML.
        name: The name of the file in messages.
        command: As for `parse_recipe`; None for the command that the recipe names as its method.
        overrides: As for `parse_recipe`.

    Raises:
        RecipeError: The text is not YAML, or not a recipe at all.
    """
    document = read_mapping(text, name, "the sections of a recipe (method, model, data, training)", overrides)
    known = known_paths()
    if foreign := recognise(document.data):
        sign, message = foreign
        raise RecipeError([document.locate(Diagnostic.error((sign,), message.replace("FILE", name)))])
    apply_overrides(document, overrides, known, _written_out)
    if command is None:
        command = "sft" if document.data.get("method") == "sft" else "dpo"
    return validate(document, command)


def read_mapping(text: str, name: str, expected: str, overrides: Sequence[str] = ()) -> Document:
    """Read a YAML document whose root is a mapping, and that holds no secret.

    Args:
        text: The YAML.
        name: The name of the file in messages.
        expected: The content of the mapping, for the error message.
        overrides: The overrides that will be applied to it, which may hold no secret either.

    Raises:
        RecipeError: The text is not YAML, or another kind of document, or holds a secret.
    """
    document = read_document(text, name)
    refuse_secrets(document, overrides)
    if not isinstance(document.data, dict):
        given = "nothing" if document.data is None else shown(document.data)
        raise RecipeError([Diagnostic.error((), f"expected {expected}, got {given}", document.value_place(()))])
    return document


def read_text(path: Path | str) -> str:
    """Read the file of a recipe.

    Raises:
        UsageError: There is no such file, or it cannot be read.
        RecipeError: It is larger than 1 MiB, or not UTF-8.
    """
    file = Path(path)
    try:
        if not file.exists():
            raise UsageError(f"there is no recipe {str(path)!r}", hint=_where_it_is(file))
        if file.is_dir():
            raise UsageError(f"{str(path)!r} is a folder", hint="name the YAML file of a recipe")
        with open(file, "rb", opener=_open_without_waiting) as stream:
            raw = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"the recipe {str(path)!r} cannot be read: {error.strerror}") from None
    if len(raw) > MAX_BYTES:
        raise RecipeError([Diagnostic.error((), "larger than 1 MiB; is this a recipe?", Place(str(path), 1, 1))])
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        lines = LINE_BREAK.split(raw[: error.start].decode("utf-8-sig"))
        place = Place(str(path), len(lines), len(lines[-1]) + 1, lines[-1])
        raise RecipeError([Diagnostic.error((), "not UTF-8 text", place)]) from None


def known_paths() -> list[KeyPath]:
    """Return every key of the schema, and the hyperparameters of all losses; not the keys inside lists."""
    paths = list(keys_of(Recipe))
    at = paths.index(LOSS) + 1
    paths[at:at] = [(*LOSS, name) for name in ("type", *hyperparameters())]
    return paths


def keys_of(model: type[BaseModel], above: KeyPath = ()) -> Iterator[KeyPath]:
    """Yield every key of a schema, sections before their keys; not the keys inside lists."""
    for name in model.model_fields:
        yield (*above, name)
        kind, _ = unwrap(hints(model)[name])
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from keys_of(kind, (*above, name))


def validate(document: Document, command: str) -> Examined:
    """Check and complete a document whose root is a mapping.

    Args:
        document: The recipe with its overrides.
        command: The command that reads it.
    """
    suggester = Suggester(known_paths())
    recipe, errors = _validate_with_examples(document, command)
    problems = document.problems + explain_all(errors, Recipe, document, suggester)
    problems += find_variables(document)
    if recipe is not None:
        recipe, losses, wrong_losses = complete_losses(recipe, document, suggester)
        problems += [*wrong_losses, *_unknown_formats(recipe, document)]
    is_understood = not problems
    if recipe is not None:
        contradictions = find_contradictions(recipe, command, document.is_in_force, losses)
        problems += [
            document.locate(found)
            for found in contradictions
            if not any(one.concerns(path) for one in problems for path in (found.path, *found.related))
        ]
    problems = [problem for problem in problems if not _is_follow_up(problem, document.problems)]
    return Examined(document, recipe, in_order(problems), is_understood)


def find_variables(document: Document) -> list[Diagnostic]:
    """Find paths and names in which a variable of the shell stands, which nothing expands."""
    found = []
    for path in document.values:
        value = document.at(path)
        variable = VARIABLE.search(value) if isinstance(value, str) and _is_name(path) else None
        if variable is None or os.path.lexists(value):
            continue
        key, place = dotted(path), document.value_place(path)
        remedy = f'write its value, or set the key with --set {key}="...", in which the shell expands it'
        if place.override:
            remedy = "put it into double quotes, in which the shell expands it"
        message = f"{key}: variables are not expanded in recipes, and {variable[0]} is one; {remedy}"
        found.append(Diagnostic.error(path, message, place))
    return found


def explain_all(
    errors: Sequence[ErrorDetails], model: type[BaseModel], document: Document, suggester: Suggester
) -> list[Diagnostic]:
    """Explain the errors of a validation; a key that is only misspelt is not reported as missing too."""
    explained = [explain(error, model, (), document, suggester) for error in errors]
    misspelt = {problem.meant for problem in explained}
    return [
        problem
        for error, problem in zip(errors, explained, strict=True)
        if not (error["type"] == "missing" and problem.path in misspelt)
    ]


def _is_name(path: KeyPath) -> bool:
    """Return whether a value is a path or a name of something, and no text or number."""
    keys = tuple(part for part in path if isinstance(part, str))
    is_source = keys == SOURCES[0] or (keys[:2] == SOURCES[1] and len(keys) <= 3)
    return is_source or bool(keys and keys[-1] in NAMES)


def _written_out(path: KeyPath, value: Any, part: str | int) -> Any:
    """Write out the short form of sources in which a part is to be set: a text is the path of one source."""
    if path[:2] not in SOURCES or not isinstance(value, str | list):
        return value
    if path == SOURCES[1] and isinstance(part, str):
        return {"eval": value}
    if isinstance(value, str):
        return [value] if isinstance(part, int) else {"path": value}
    return value


def _open_without_waiting(path: str, flags: int) -> int:
    """Open a pipe that has no writer as an empty file; a pipe with a writer is read to its end."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    os.set_blocking(descriptor, True)
    return descriptor


def _where_it_is(file: Path) -> str:
    """Say where the recipe is that was probably meant."""
    if near := _nearest(file):
        return f"did you mean {near!r}?"
    if file.stem in shipped_recipes():
        return f"`dpoctl recipes copy {file.stem}` copies the one that comes with dpoctl"
    return "`dpoctl recipes` lists those that come with dpoctl"


def _nearest(file: Path) -> str | None:
    """Return the recipe with the most similar name, in the same folder or in recipes/."""
    candidates = {
        found.name: found
        for folder in (Path("recipes"), file.parent)
        if folder.is_dir()
        for found in sorted(folder.iterdir())
        if found.suffix in (".yaml", ".yml")
    }
    name = closest(file.name, candidates) or closest(file.stem, candidates)
    return str(candidates[name]) if name else None


def _validate_with_examples(document: Document, command: str) -> tuple[Recipe | None, list[ErrorDetails]]:
    """Validate; replace wrong values by examples, so that the other keys can be checked against each other."""
    data = copy.deepcopy(document.data)
    errors: list[ErrorDetails] = []
    for _ in range(MAX_ATTEMPTS):
        try:
            return Recipe.model_validate(data), errors
        except ValidationError as error:
            found = error.errors(include_url=False)
        errors = errors or found
        for one in found:
            _replace_wrong_value(data, document.find(tuple(one["loc"])), one, command)
    return None, errors


def _replace_wrong_value(data: Any, written: KeyPath, error: ErrorDetails, command: str) -> None:
    """Give a missing key its example; remove a wrong key, together with the list around it."""
    if error["type"] == "missing":
        *above, key = error["loc"]
        field = field_at(Recipe, tuple(error["loc"]))
        section = _mapping_at(data, tuple(above))
        if field and field.examples and section is not None:
            section[key] = command if key == "method" else copy.deepcopy(field.examples[0])
            return
    first_index = next((i for i, part in enumerate(written) if isinstance(part, int)), len(written))
    outer = written[:first_index]
    section = _mapping_at(data, outer[:-1])
    if section is not None and outer:
        section.pop(outer[-1], None)


def _mapping_at(data: Any, path: KeyPath) -> dict[str | int, Any] | None:
    for part in path:
        data = data.get(part) if isinstance(data, dict) else None
    return data if isinstance(data, dict) else None


def _unknown_formats(recipe: Recipe, document: Document) -> Iterator[Diagnostic]:
    for path, source in recipe.data.sources:
        if source.format not in SOURCE_FORMATS:
            yield unknown_choice(document, (*path, "format"), source.format, SOURCE_FORMATS)


def _is_follow_up(problem: Diagnostic, refused: list[Diagnostic]) -> bool:
    """Return whether a problem is about a value that the YAML reader refused already, and replaced by null."""
    return any(one.path and problem.path[: len(one.path)] == one.path and one is not problem for one in refused)

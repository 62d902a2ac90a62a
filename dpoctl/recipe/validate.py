"""From a document to a recipe: every key by itself, then the loss, then the keys among one another."""

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_type_hints

from pydantic import BaseModel, ValidationError, create_model
from pydantic_core import ErrorDetails

from dpoctl.recipe.checks import LOSS, check
from dpoctl.recipe.document import Document
from dpoctl.recipe.expect import Path, hints, unwrap
from dpoctl.recipe.inert import sources_of
from dpoctl.recipe.problems import Problem, dotted, shown
from dpoctl.recipe.schema import DpoSection, Recipe, Section
from dpoctl.recipe.suggest import Suggester, closest
from dpoctl.recipe.wording import explain, field_at

ROUNDS = 6


def loss_parameters(loss: Any) -> type[Section]:
    """The section that a loss's hyperparameters make: as strict as every other."""
    annotations = get_type_hints(loss, include_extras=True)
    fields: dict[str, Any] = {
        field.name: (annotations[field.name], ... if field.default is dataclasses.MISSING else field.default)
        for field in dataclasses.fields(loss)
    }
    return create_model(str(loss.__name__), __base__=Section, **fields)


def known_paths(losses: Mapping[str, Any]) -> list[Path]:
    """Every key of the schema, with the hyperparameters of all losses; not the keys inside lists."""
    paths = list(keys_of(Recipe))
    parameters = dict.fromkeys(field.name for loss in losses.values() for field in dataclasses.fields(loss))
    at = paths.index(LOSS) + 1
    paths[at:at] = [(*LOSS, name) for name in ("type", *parameters)]
    return paths


def keys_of(model: type[BaseModel], above: Path = ()) -> Iterator[Path]:
    """Every key of a schema, sections before what is in them; not the keys inside lists."""
    for name in model.model_fields:
        yield (*above, name)
        kind, _ = unwrap(hints(model)[name])
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from keys_of(kind, (*above, name))


def validate(
    document: Document, command: str, losses: Mapping[str, Any], formats: Mapping[str, Any] | None
) -> tuple[Recipe | None, list[Problem]]:
    """Check a document whose root is a mapping, and complete it.

    Args:
        document: The recipe with its overrides.
        command: The command that reads it.
        losses: A loss by its name: a frozen dataclass whose fields are its recipe keys.
        formats: A data format by its name; None checks no format.

    Returns:
        The recipe, and everything that is wrong with it in the order of the file. Where something is, other values
        stand in the place of the wrong ones, and there may be no recipe at all.
    """
    suggester = Suggester(known_paths(losses))
    recipe, errors = _mended(document, command)
    explained = [explain(error, Recipe, (), document, suggester) for error in errors]
    misspelt = {problem.meant for problem in explained}
    problems = [*document.problems]
    problems += [
        problem
        for error, problem in zip(errors, explained, strict=True)
        if not (error["type"] == "missing" and problem.path in misspelt)
    ]
    if recipe is not None:
        recipe, needs_reference, found = _with_loss(recipe, document, losses, suggester)
        problems += found
        problems += _unknown_formats(recipe, document, formats)
        findings = list(check(recipe, command, document.stands, needs_reference))
        problems += [
            Problem(document.key_place(finding.path), finding.message, finding.path)
            for finding in findings
            if not any(touches(one, path) for one in problems for path in (finding.path, *finding.involves))
        ]
    problems = [problem for problem in problems if not _is_echo(problem, document.problems)]
    return recipe, sorted(problems, key=_order)


def _mended(document: Document, command: str) -> tuple[Recipe | None, list[ErrorDetails]]:
    """Validate; where keys are wrong, put examples for them, so that the other keys can still be compared."""
    data = copy.deepcopy(document.data)
    errors: list[ErrorDetails] = []
    for _ in range(ROUNDS):
        try:
            return Recipe.model_validate(data), errors
        except ValidationError as error:
            found = error.errors(include_url=False)
        errors = errors or found
        for one in found:
            _mend(data, document.find(tuple(one["loc"])), one, command)
    return None, errors


def _mend(data: Any, written: Path, error: ErrorDetails, command: str) -> None:
    """Give a missing key its example; drop a wrong one, with the list that it is in."""
    if error["type"] == "missing":
        *above, key = error["loc"]
        field = field_at(Recipe, tuple(error["loc"]))
        section = _inside(data, tuple(above))
        if field and field.examples and section is not None:
            section[key] = command if key == "method" else copy.deepcopy(field.examples[0])
            return
    first_index = next((i for i, part in enumerate(written) if isinstance(part, int)), len(written))
    outer = written[:first_index]
    section = _inside(data, outer[:-1])
    if section is not None and outer:
        section.pop(outer[-1], None)


def _inside(data: Any, path: Path) -> dict[str | int, Any] | None:
    for part in path:
        data = data.get(part) if isinstance(data, dict) else None
    return data if isinstance(data, dict) else None


def _with_loss(
    recipe: Recipe, document: Document, losses: Mapping[str, Any], suggester: Suggester
) -> tuple[Recipe, bool | None, list[Problem]]:
    """Complete the loss with its defaults; say whether it needs a reference, and what is wrong with it."""
    if recipe.method != "dpo":
        return recipe, None, []
    given = dict(recipe.dpo.loss)
    kind = given.pop("type", DpoSection.model_fields["loss"].default["type"])
    if not (isinstance(kind, str) and kind in losses):
        return recipe, None, [_unknown_choice(document, (*LOSS, "type"), kind, losses)]
    parameters = loss_parameters(losses[kind])
    try:
        chosen = parameters.model_validate(given).model_dump()
    except ValidationError as error:
        return (
            recipe,
            None,
            [
                _explain_loss(one, kind, parameters, document, losses, suggester)
                for one in error.errors(include_url=False)
            ],
        )
    completed = recipe.dpo.model_copy(update={"loss": {"type": kind, **chosen}})
    needs_reference = bool(losses[kind](**chosen).needs_reference)
    return recipe.model_copy(update={"dpo": completed}), needs_reference, []


def _explain_loss(
    error: ErrorDetails,
    kind: str,
    parameters: type[Section],
    document: Document,
    losses: Mapping[str, Any],
    suggester: Suggester,
) -> Problem:
    key = error["loc"][0]
    owners = [name for name, loss in losses.items() if key in {f.name for f in dataclasses.fields(loss)}]
    if error["type"] != "extra_forbidden" or not owners:
        return explain(error, parameters, LOSS, document, suggester)
    path = (*LOSS, key)
    message = (
        f"the loss {kind!r} has no {key!r} ({', '.join(owners)} has); "
        f"it takes {', '.join(parameters.model_fields) or 'no parameters'}"
    )
    return Problem(document.key_place(path), message, path)


def _unknown_formats(recipe: Recipe, document: Document, formats: Mapping[str, Any] | None) -> Iterator[Problem]:
    if formats is None:
        return
    for path, source in sources_of(recipe):
        if source.format != "auto" and source.format not in formats:
            yield _unknown_choice(document, (*path, "format"), source.format, ["auto", *formats])


def _unknown_choice(document: Document, path: Path, given: object, allowed: Iterable[str]) -> Problem:
    match = closest(given, allowed) if isinstance(given, str) else None
    meant = f", did you mean {match!r}?" if match else ""
    message = f"{dotted(path)}: expected one of {', '.join(allowed)}, got {shown(given)}{meant}"
    return Problem(document.value_place(path), message, path)


def _is_echo(problem: Problem, refused: list[Problem]) -> bool:
    """Whether a problem is about a value that the reader refused already, and replaced by null."""
    return any(one.path and problem.path[: len(one.path)] == one.path and one is not problem for one in refused)


def touches(problem: Problem, path: Path) -> bool:
    """Whether a problem is about a key, a section that it is in, or something below it."""
    for other in (problem.path, problem.meant or ()):
        shorter = min(len(other), len(path))
        if shorter and other[:shorter] == path[:shorter]:
            return True
    return False


def _order(problem: Problem) -> tuple[int, int, int]:
    return problem.place.override, problem.place.line, problem.place.column

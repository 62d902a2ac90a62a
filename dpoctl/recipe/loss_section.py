"""The losses of `dpo.loss`: their hyperparameters are checked and completed, and the error messages name them."""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dpoctl.losses import LOSSES, PreferenceLoss
from dpoctl.losses.base import loss_parameters
from dpoctl.losses.stepwise import BASES
from dpoctl.recipe.diagnostics import Diagnostic, KeyPath, dotted, shown
from dpoctl.recipe.document import Document
from dpoctl.recipe.foreign_keys import CONVERSIONS, LOSS_NAMES
from dpoctl.recipe.key_errors import Suggester, closest, explain
from dpoctl.recipe.schema import LOSS, DpoSection, Recipe

SFT = "sft"
"""The likelihood of preferred responses, as one of several losses."""
BASE = "base"
"""The hyperparameter that is a loss itself: its name, or a mapping like `dpo.loss`."""
DEFAULT = DpoSection().losses[0][1]["type"]
NAME_IN_TEXT = re.compile(r"[\w.]+")


@dataclass(frozen=True, slots=True)
class NamedLoss:
    """A preference loss of a recipe.

    Args:
        path: Its path in the recipe.
        kind: Its `type`.
        loss: The loss with its hyperparameters.
    """

    path: KeyPath
    kind: str
    loss: PreferenceLoss


def hyperparameters() -> list[str]:
    """Return the hyperparameters of all losses, each once."""
    return list(dict.fromkeys(field.name for loss in LOSSES.values() for field in dataclasses.fields(loss)))


def complete_losses(
    recipe: Recipe, document: Document, suggester: Suggester
) -> tuple[Recipe, list[NamedLoss], list[Diagnostic]]:
    """Give the losses of a recipe their default hyperparameters.

    Returns:
        The recipe, its preference losses, and their errors. If there are errors, the recipe gets the default loss, and
        no losses are returned.
    """
    if recipe.method != "dpo":
        return recipe, [], []
    reader = _LossReader(document, suggester)
    specs = [(path, reader.read(path, spec)) for path, spec in recipe.dpo.losses]
    problems = reader.problems
    if not problems:
        conflicts = _find_conflicts(specs, reader.losses)
        problems = [Diagnostic.error(path, message, document.value_place(path)) for path, message in conflicts]
    completed = [spec for _, spec in specs]
    loss = DpoSection().loss if problems else completed if isinstance(recipe.dpo.loss, list) else completed[0]
    dpo = recipe.dpo.model_copy(update={"loss": loss})
    return recipe.model_copy(update={"dpo": dpo}), [] if problems else reader.losses, problems


def unknown_choice(document: Document, path: KeyPath, given: object, allowed: Iterable[str]) -> Diagnostic:
    """Make the error for a name that is not one of several."""
    allowed = list(allowed)
    match = None
    if isinstance(given, str):
        translated = LOSS_NAMES.get(given.lower().replace("-", "_"))
        match = translated if translated in allowed else closest(given, allowed)
    hint = f"did you mean {match!r}?" if match else f"expected one of {', '.join(allowed)}"
    message = f"{dotted(path)}: unknown name {shown(given)}, {hint}"
    return Diagnostic.error(path, message, document.value_place(path))


class _LossReader:
    """Reads losses one after the other, and collects their errors."""

    def __init__(self, document: Document, suggester: Suggester) -> None:
        self._document, self._suggester = document, suggester
        self.problems: list[Diagnostic] = []
        self.losses: list[NamedLoss] = []

    def read(self, path: KeyPath, spec: Mapping[str, Any]) -> dict[str, Any]:
        """Return a loss with all its hyperparameters; an empty mapping if it is wrong."""
        given, in_list = dict(spec), path != LOSS
        kind = given.pop("type", None if in_list else DEFAULT)
        if not (isinstance(kind, str) and (kind in LOSSES or (in_list and kind == SFT))):
            self.problems.append(self._unknown_loss(path, kind, in_list=in_list))
            return {}
        completed = self._complete(path, kind, given, with_weight=in_list)
        if completed is None:
            return {}
        if kind != SFT:
            self._build(path, kind, given, {key: value for key, value in completed.items() if key != "weight"})
        return {"type": kind, **completed}

    def _complete(
        self, path: KeyPath, kind: str, given: dict[str, Any], *, with_weight: bool = False
    ) -> dict[str, Any] | None:
        parameters = loss_parameters(LOSSES.get(kind), with_weight=with_weight)
        try:
            completed = parameters.model_validate(given).model_dump()
        except ValidationError as error:
            # For a union of types, pydantic reports an error for each of them.
            first = {one["loc"][0]: one for one in reversed(error.errors(include_url=False))}
            self.problems += [self._explain(one, path, kind, parameters) for one in first.values()]
            return None
        return completed if BASE not in given or self._is_base((*path, BASE), given[BASE]) else None

    def _is_base(self, path: KeyPath, base: str | dict[str, Any]) -> bool:
        """Check a base loss, and collect its errors."""
        given = {"type": base} if isinstance(base, str) else dict(base)
        kind = given.pop("type", None)
        if isinstance(kind, str) and kind in BASES:
            return self._complete(path, kind, given) is not None
        at = path if isinstance(base, str) else (*path, "type")
        self.problems.append(
            Diagnostic.error(
                path, f"missing key {dotted(at)!r}, one of {', '.join(BASES)}", self._document.value_place(path)
            )
            if kind is None
            else unknown_choice(self._document, at, kind, BASES)
        )
        return False

    def _build(self, path: KeyPath, kind: str, given: dict[str, Any], completed: dict[str, Any]) -> None:
        try:
            self.losses.append(NamedLoss(path, kind, LOSSES[kind](**completed)))
        except ValueError as error:
            message = str(error)
            name = next((name for name in NAME_IN_TEXT.findall(message) if name.split(".")[0] in given), "")
            at = (*path, *name.split(".")) if name else path
            # A loss says `key: the error`, or a sentence that contains the key.
            joint = "." if name and message.startswith(f"{name}:") else ": "
            self.problems.append(
                Diagnostic.error(at, f"{dotted(path)}{joint}{message}", self._document.value_place(at))
            )

    def _unknown_loss(self, path: KeyPath, kind: object, *, in_list: bool) -> Diagnostic:
        at = (*path, "type")
        if kind == SFT:
            message = (
                f"{dotted(path)}: 'sft' alone is not a preference loss; run `dpoctl sft`, or set sft_weight of a loss"
            )
            return Diagnostic.error(at, message, self._document.value_place(at))
        if kind is None:
            message = f"missing key {dotted(at)!r}, one of {', '.join(LOSSES)}, {SFT}"
            return Diagnostic.error(path, message, self._document.value_place(path))
        return unknown_choice(self._document, at, kind, [*LOSSES, *([SFT] if in_list else [])])

    def _explain(self, error: ErrorDetails, path: KeyPath, kind: str, parameters: type[BaseModel]) -> Diagnostic:
        key = str(error["loc"][0])
        if error["type"] != "extra_forbidden":
            whole = {**error, "loc": (key,)}
            return explain(whole, parameters, path, self._document, self._suggester)  # type: ignore[arg-type]
        at = (*path, key)
        message = self._unknown_key(key, kind, list(parameters.model_fields))
        return Diagnostic.error(at, message, self._document.key_place(at))

    def _unknown_key(self, key: str, kind: str, known: list[str]) -> str:
        if key == "weight":
            return "weight is only for the losses of a list, [{type: ..., weight: ...}, ...]; remove it"
        takes = f"it takes {', '.join(known) or 'no parameters'}"
        if owners := self._owners(key):
            return f"the loss {kind!r} has no {key!r} ({_has(owners)}); {takes}"
        meant = self._suggester.suggest(LOSS, key, known)
        if meant is None:
            return f"unknown key {shown(key)} of the loss {kind!r}; {takes}"
        if meant[:-1] != LOSS:
            return f"unknown key {shown(key)}, did you mean {dotted(meant)!r}?"
        name = str(meant[-1])
        whose = "" if name in known else f" ({_has(self._owners(name))})"
        value = f"; its value is {CONVERSIONS[key]}" if key in CONVERSIONS else ""
        return f"unknown key {shown(key)}, did you mean {name!r}{whose}?{value}"

    def _owners(self, key: str) -> list[str]:
        return [name for name, loss in LOSSES.items() if any(field.name == key for field in dataclasses.fields(loss))]


def _has(owners: list[str]) -> str:
    return f"{', '.join(owners)} {'has' if len(owners) == 1 else 'have'} it" if owners else "no loss has it"


def _find_conflicts(
    specs: list[tuple[KeyPath, dict[str, Any]]], losses: list[NamedLoss]
) -> Iterator[tuple[KeyPath, str]]:
    """Find losses that cannot be in a list together."""
    if not losses:
        yield LOSS, f"{dotted(LOSS)}: the list has no preference loss; add one, or run `dpoctl sft`"
        return
    first = losses[0]
    for one in losses[1:]:
        if one.loss.rows != first.loss.rows:
            yield (
                one.path,
                f"{one.kind!r} needs {one.loss.rows}, but {first.kind!r} needs {first.loss.rows}; "
                "all losses of a list must use the same kind of rows",
            )
    seen: list[dict[str, Any]] = []
    for path, spec in specs:
        plain = {key: value for key, value in spec.items() if key != "weight"}
        if plain in seen:
            yield path, f"{plain['type']!r} is in the list twice with the same keys; keep one, with the summed weight"
        seen.append(plain)
        if plain["type"] == SFT:
            for _, other in specs:
                if weight := other.get("sft_weight"):
                    what = f"{other['type']!r} adds this term already (sft_weight {weight:g})"
                    yield path, f"{what}; remove one of them, or set sft_weight: 0"

"""The losses of `dpo.loss`: their hyperparameters, checked and completed, and what the losses say to them."""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Protocol, get_type_hints

from annotated_types import Gt
from pydantic import ValidationError, create_model
from pydantic_core import ErrorDetails

from dpoctl.recipe.document import Document
from dpoctl.recipe.expect import Path
from dpoctl.recipe.foreign import CONVERSIONS, LOSS_NAMES
from dpoctl.recipe.problems import Problem, dotted, shown
from dpoctl.recipe.schema import LOSS, DpoSection, Recipe
from dpoctl.recipe.section import Section
from dpoctl.recipe.suggest import Suggester, closest
from dpoctl.recipe.wording import explain

SFT = "sft"
"""The likelihood of preferred responses, as one of several losses."""
BASE = "base"
"""The hyperparameter that is a loss itself: its name, or a mapping as `dpo.loss` is."""
Weight = Annotated[float, Gt(0)]
NAME_IN_TEXT = re.compile(r"[\w.]+")


class Loss(Protocol):
    """What is asked of a loss about the rest of a recipe."""

    rows: str
    couples_batch: bool

    @property
    def needs_reference(self) -> bool:
        """Whether it compares the policy with a reference."""


@dataclass(frozen=True, slots=True)
class Named:
    """A preference loss of a recipe.

    Args:
        path: Where it stands.
        kind: Its `type`.
        loss: With its hyperparameters.
    """

    path: Path
    kind: str
    loss: Loss


@cache
def loss_parameters(loss: Any, *, with_weight: bool = False) -> type[Section]:
    """The section that a loss's hyperparameters make: as strict as every other.

    Args:
        loss: A dataclass; None has no hyperparameters.
        with_weight: Take the weight of a loss among several too.
    """
    fields: dict[str, Any] = {"weight": (Weight, 1.0)} if with_weight else {}
    if loss is not None:
        annotations = get_type_hints(loss, include_extras=True)
        fields |= {
            field.name: (annotations[field.name], ... if field.default is dataclasses.MISSING else field.default)
            for field in dataclasses.fields(loss)
        }
    return create_model(str(getattr(loss, "__name__", SFT)), __base__=Section, **fields)


def hyperparameters(losses: Mapping[str, Any]) -> list[str]:
    """The keys of all losses, each once."""
    return list(dict.fromkeys(field.name for loss in losses.values() for field in dataclasses.fields(loss)))


def complete_losses(
    recipe: Recipe, document: Document, losses: Mapping[str, Any], suggester: Suggester
) -> tuple[Recipe, list[Named], list[Problem]]:
    """Complete the losses of a recipe with their defaults.

    Returns:
        The recipe, its preference losses, and what is wrong with them. Where something is, the default loss stands in
        their place in the recipe, and there are none to ask.
    """
    if recipe.method != "dpo":
        return recipe, [], []
    reader = _Reader(document, losses, suggester)
    specs = [(path, reader.read(path, spec)) for path, spec in recipe.dpo.losses]
    problems = reader.problems
    if not problems:
        found = _mixture(specs, reader.named)
        problems = [Problem(document.value_place(path), message, path) for path, message in found]
    completed = [spec for _, spec in specs]
    loss = DpoSection().loss if problems else completed if isinstance(recipe.dpo.loss, list) else completed[0]
    dpo = recipe.dpo.model_copy(update={"loss": loss})
    return recipe.model_copy(update={"dpo": dpo}), [] if problems else reader.named, problems


def unknown_choice(document: Document, path: Path, given: object, allowed: Iterable[str]) -> Problem:
    """Refuse a name that is none of several."""
    allowed = list(allowed)
    match = None
    if isinstance(given, str):
        theirs = LOSS_NAMES.get(given.lower().replace("-", "_"))
        match = theirs if theirs in allowed else closest(given, allowed)
    known = f"did you mean {match!r}?" if match else f"expected one of {', '.join(allowed)}"
    return Problem(document.value_place(path), f"{dotted(path)}: unknown name {shown(given)}, {known}", path)


class _Reader:
    """Reads one loss after the other, and gathers what is wrong."""

    def __init__(self, document: Document, losses: Mapping[str, Any], suggester: Suggester) -> None:
        self._document, self._losses, self._suggester = document, losses, suggester
        self.problems: list[Problem] = []
        self.named: list[Named] = []

    def read(self, path: Path, spec: Mapping[str, Any]) -> dict[str, Any]:
        """Complete a loss."""
        given, in_list = dict(spec), path != LOSS
        kind = given.pop("type", None if in_list else DpoSection().losses[0][1]["type"])
        if not (isinstance(kind, str) and kind in (*self._losses, *([SFT] if in_list else []))):
            self.problems.append(self._unknown_loss(path, kind, in_list=in_list))
            return {}
        read = self._parameters(path, kind, given, with_weight=in_list)
        if read is None:
            return {}
        if kind != SFT:
            self._build(path, kind, given, {key: value for key, value in read.items() if key != "weight"})
        return {"type": kind, **read}

    def _parameters(
        self, path: Path, kind: str, given: dict[str, Any], *, with_weight: bool = False
    ) -> dict[str, Any] | None:
        parameters = loss_parameters(self._losses.get(kind), with_weight=with_weight)
        try:
            read = parameters.model_validate(given).model_dump()
        except ValidationError as error:
            # A value that is none of several kinds is an error for each of them.
            first = {one["loc"][0]: one for one in reversed(error.errors(include_url=False))}
            self.problems += [self._explain(one, path, kind, parameters) for one in first.values()]
            return None
        base = given.get(BASE)
        if isinstance(base, dict) and base.get("type") in self._losses:
            inner = {key: value for key, value in base.items() if key != "type"}
            return read if self._parameters((*path, BASE), base["type"], inner) is not None else None
        return read

    def _build(self, path: Path, kind: str, given: dict[str, Any], read: dict[str, Any]) -> None:
        try:
            self.named.append(Named(path, kind, self._losses[kind](**read)))
        except ValueError as error:
            said = str(error)
            name = next((name for name in NAME_IN_TEXT.findall(said) if name.split(".")[0] in given), "")
            at = (*path, *name.split(".")) if name else path
            # Some say `key: what is wrong`, others a sentence that has the key in it.
            joint = "." if name and said.startswith(f"{name}:") else ": "
            self.problems.append(Problem(self._document.value_place(at), f"{dotted(path)}{joint}{said}", at))

    def _unknown_loss(self, path: Path, kind: object, *, in_list: bool) -> Problem:
        if kind == SFT:
            message = f"{dotted(path)}: 'sft' goes with a preference loss, as its sft_weight; alone it is `dpoctl sft`"
            return Problem(self._document.value_place((*path, "type")), message, (*path, "type"))
        if kind is None:
            message = f"missing key {dotted((*path, 'type'))!r}, one of {', '.join(self._losses)}, {SFT}"
            return Problem(self._document.value_place(path), message, path)
        return unknown_choice(self._document, (*path, "type"), kind, [*self._losses, *([SFT] if in_list else [])])

    def _explain(self, error: ErrorDetails, path: Path, kind: str, parameters: type[Section]) -> Problem:
        key = str(error["loc"][0])
        if error["type"] != "extra_forbidden":
            whole = {**error, "loc": (key,)}
            return explain(whole, parameters, path, self._document, self._suggester)  # type: ignore[arg-type]
        at = (*path, key)
        said = self._unknown_key(key, kind, list(parameters.model_fields))
        return Problem(self._document.key_place(at), said, at)

    def _unknown_key(self, key: str, kind: str, ours: list[str]) -> str:
        if key == "weight":
            return "weight is for the losses of a list, [{type: ..., weight: ...}, ...]; a single loss has none"
        takes = f"it takes {', '.join(ours) or 'no parameters'}"
        if owners := self._owners(key):
            return f"the loss {kind!r} has no {key!r} ({_has(owners)}); {takes}"
        meant = self._suggester.meant(LOSS, key, ours)
        if meant is None:
            return f"unknown key {shown(key)} of the loss {kind!r}; {takes}"
        if meant[:-1] != LOSS:
            return f"unknown key {shown(key)}, did you mean {dotted(meant)!r}?"
        name = str(meant[-1])
        whose = "" if name in ours else f" ({_has(self._owners(name))})"
        value = f"; its value is {CONVERSIONS[key]}" if key in CONVERSIONS else ""
        return f"unknown key {shown(key)}, did you mean {name!r}{whose}?{value}"

    def _owners(self, key: str) -> list[str]:
        return [
            name for name, loss in self._losses.items() if any(field.name == key for field in dataclasses.fields(loss))
        ]


def _has(owners: list[str]) -> str:
    return f"{', '.join(owners)} {'has' if len(owners) == 1 else 'have'} it" if owners else "no loss has it"


def _mixture(specs: list[tuple[Path, dict[str, Any]]], named: list[Named]) -> Iterator[tuple[Path, str]]:
    """Find what losses must not be to one another."""
    if not named:
        yield LOSS, f"{dotted(LOSS)}: expected a loss of preferences beside sft, which alone is `dpoctl sft`"
        return
    first = named[0]
    for one in named[1:]:
        if one.loss.rows != first.loss.rows:
            said = f"{one.kind!r} judges {one.loss.rows}, and {first.kind!r} judges {first.loss.rows}"
            yield one.path, f"{said}; losses of a list judge the same rows"
    seen: list[dict[str, Any]] = []
    for path, spec in specs:
        plain = {key: value for key, value in spec.items() if key != "weight"}
        if plain in seen:
            yield path, f"{plain['type']!r} is in the list already, with the same hyperparameters; add up the weights"
        seen.append(plain)
        if plain["type"] == SFT:
            doubled = (
                f"{other['type']!r} has sft_weight {other['sft_weight']:g}"
                for _, other in specs
                if other.get("sft_weight")
            )
            for has_it in doubled:
                yield path, f"{has_it}, which is the same term; drop one, or set sft_weight: 0"

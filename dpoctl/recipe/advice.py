"""Advice: what a recipe, and the data and model it names, show before a run starts. The rules stand in `rules_*.py`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpoctl import console
from dpoctl.recipe import rules_data, rules_loss, rules_training
from dpoctl.recipe.document import Document
from dpoctl.recipe.facts import Facts, Grade, Remark, Situation
from dpoctl.recipe.problems import Place, Problem, dotted
from dpoctl.recipe.schema import Recipe
from dpoctl.recipe.validate import touches

RULES = (*rules_training.RULES, *rules_loss.RULES, *rules_data.RULES)
STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that a user may want to change, or must.

    Args:
        grade: An error is refused, a warning is printed when a run starts, a note is for those who ask.
        code: A short name of the kind of finding, which stays the same while words change.
        key: The recipe key, spelt as users do.
        message: In plain words, on one line.
        place: Where the key stands, or the nearest key above it.
    """

    grade: Grade
    code: str
    key: str
    message: str
    place: Place | None = None

    @property
    def line(self) -> int | None:
        """The line of the recipe, counted from 1; None where there is no file, or an override said it."""
        return (self.place.line or None) if self.place else None

    def __str__(self) -> str:
        where = str(self.place) if self.place else self.key
        return f"{where}: {self.grade}: {self.message}"

    def to_dict(self) -> dict[str, Any]:
        """The finding as JSON has it."""
        place = self.place or Place("")
        return {
            "grade": self.grade,
            "code": self.code,
            "key": self.key,
            "message": self.message,
            "file": place.source or None,
            "line": place.line or None,
            "column": place.column or None,
            "override": place.override or None,
        }


def advise(
    recipe: Recipe | None,
    document: Document | None = None,
    facts: Facts | None = None,
    problems: Sequence[Problem] = (),
) -> list[Finding]:
    """Find what a user may want to change, or must.

    Args:
        recipe: Complete; None where nothing could be made of it.
        document: Where its keys stand.
        facts: What was seen of the data, the tokenizer and the model.
        problems: What the recipe is refused for.

    Returns:
        The findings in the order of the file.
    """
    found = [Finding("error", "recipe", dotted(one.path), one.message, one.place) for one in problems]
    if recipe is not None:
        situation = Situation(recipe, facts or Facts())
        remarks = [*situation.facts.troubles, *(remark for rule in RULES for remark in rule(situation))]
        # What stands in the place of a wrong value is not the user's, and deserves no advice.
        kept = [one for one in remarks if not any(touches(problem, one.path) for problem in problems)]
        found += [_located(remark, document) for remark in kept]
    return sorted(found, key=_order)


def show_warnings(findings: Iterable[Finding]) -> None:
    """Print what a run that starts must not keep to itself: everything but the notes; rank 0 only."""
    from rich.text import Text  # noqa: PLC0415 - start-up time

    for finding in findings:
        if finding.grade != "note":
            where = f"{finding.place}: " if finding.place else ""
            console.say(Text.assemble(where, (f"{finding.grade}: ", STYLES[finding.grade]), finding.message))


def count_grades(findings: Iterable[Finding]) -> Mapping[Grade, int]:
    """Count findings by their grade."""
    counts: dict[Grade, int] = {"error": 0, "warning": 0, "note": 0}
    for finding in findings:
        counts[finding.grade] += 1
    return counts


def _located(remark: Remark, document: Document | None) -> Finding:
    place = document.key_place(remark.path) if document else None
    return Finding(remark.grade, remark.code, dotted(remark.path), remark.message, place)


def _order(finding: Finding) -> tuple[int, int, int]:
    place = finding.place or Place("")
    return place.override, place.line, place.column

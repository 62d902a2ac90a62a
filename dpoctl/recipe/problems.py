"""What is wrong with a recipe, and where."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from dpoctl.errors import UsageError
from dpoctl.recipe.expect import Path

SHOWN = 60
WIDTH = 100
LIMIT = 50


@dataclass(frozen=True, slots=True)
class Place:
    """A place in the recipe, or an override on the command line.

    Args:
        source: The file as the user named it.
        line: Counted from 1; 0 in an override.
        column: Counted from 1; 0 in an override.
        excerpt: The line, or the override, itself.
        override: Which of the overrides it is, counted from 1; 0 in the file.
    """

    source: str
    line: int = 0
    column: int = 0
    excerpt: str = ""
    override: int = 0

    def __str__(self) -> str:
        return f"--set #{self.override}" if self.override else f"{self.source}:{self.line}:{self.column}"

    def picture(self) -> str:
        """The source line with a caret under the column."""
        line = re.sub(r"[^\x20-\x7e\xa0-\U0010ffff]", " ", self.excerpt).rstrip()
        if self.override:
            return f"      | {line[:WIDTH]}"
        start = max(0, self.column - WIDTH)
        caret = " " * (self.column - 1 - start) + "^"
        return f"{self.line:5} | {line[start : start + WIDTH + SHOWN]}\n      | {caret}"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong.

    Args:
        place: Where.
        message: What, in one line.
        path: The key that it is about.
        meant: The key that was meant instead.
    """

    place: Place
    message: str
    path: Path = ()
    meant: Path | None = None

    def __str__(self) -> str:
        return f"{self.place}: error: {self.message}\n{self.place.picture()}"


class RecipeError(UsageError):
    """A recipe that is refused, with everything that is wrong with it.

    Args:
        problems: At least one, in the order of the file.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        first = problems[0]
        super().__init__(f"{first.place}: {first.message}")
        self.problems = list(problems)

    def __str__(self) -> str:
        shown = [str(problem) for problem in self.problems[:LIMIT]]
        more = len(self.problems) - LIMIT
        return "\n".join([*shown, f"and {more} more"] if more > 0 else shown)


def dotted(path: Path) -> str:
    """Spell a path as users do: `data.train[0].path`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def shown(value: object) -> str:
    """Show a value in a message: short, on one line, nothing unprintable."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case dict():
            return "a mapping" if value else "an empty mapping"
        case list():
            return "a list" if value else "an empty list"
        case str():
            return repr(value if len(value) <= SHOWN else value[:SHOWN] + "...")
        case _:
            return str(value)[:SHOWN]

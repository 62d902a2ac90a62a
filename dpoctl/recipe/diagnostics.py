"""Diagnostics: what is wrong, unusual or worth knowing in a recipe, each at its place in the file."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dpoctl.errors import UsageError
from dpoctl.redact import redact_source, redact_text

KeyPath = tuple[str | int, ...]
Severity = Literal["error", "warning", "note"]
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
        excerpt: The text of that line, or of the override.
        override: The number of the override, counted from 1; 0 in the file.
    """

    source: str
    line: int = 0
    column: int = 0
    excerpt: str = ""
    override: int = 0

    def __str__(self) -> str:
        return f"--set #{self.override}" if self.override else f"{self.source}:{self.line}:{self.column}"

    def picture(self) -> str:
        """The source line with a caret under the column, and without secrets."""
        line = re.sub(r"[^\x20-\x7e\xa0-\U0010ffff]", " ", redact_source(self.excerpt)).rstrip()
        if self.override:
            return f"      | {line[:WIDTH]}"
        start = max(0, self.column - WIDTH)
        caret = " " * (self.column - 1 - start) + "^"
        return f"{self.line:5} | {line[start : start + WIDTH + SHOWN]}\n      | {caret}"


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """Something that is wrong, unusual or worth knowing at a key of a recipe.

    Args:
        severity: An error stops the command; a run prints its warnings when it starts; notes are for `dpoctl check`.
        code: A short name of its kind, which stays the same when the message is reworded.
        path: The key.
        message: One line in plain words: what is wrong, and what to do.
        place: The place of the key, or of the nearest key above it; None where there is no file.
        meant: Of an unknown key, the key that was probably meant.
        related: Of a contradiction, the other keys that take part in it.
    """

    severity: Severity
    code: str
    path: KeyPath
    message: str
    place: Place | None = None
    meant: KeyPath | None = None
    related: tuple[KeyPath, ...] = ()

    @classmethod
    def error(
        cls,
        path: KeyPath,
        message: str,
        place: Place | None = None,
        *,
        meant: KeyPath | None = None,
        related: tuple[KeyPath, ...] = (),
    ) -> "Diagnostic":
        """Make an error; the errors of a recipe share one code."""
        return cls("error", "recipe", path, message, place, meant, related)

    @property
    def where(self) -> str:
        """The place, or the key where there is no file."""
        return str(self.place) if self.place else redact_text(dotted(self.path))

    def __str__(self) -> str:
        return f"{self.where}: {self.severity}: {redact_text(self.message)}"

    def text(self, *, picture: bool = False) -> str:
        """The diagnostic, and below it the line of the recipe."""
        return "\n".join([str(self), *([self.place.picture()] if picture and self.place else [])])

    def to_dict(self) -> dict[str, Any]:
        """The diagnostic as JSON; what it does not have is null."""
        place = self.place or Place("")
        return {
            "grade": self.severity,
            "code": self.code,
            "key": redact_text(dotted(self.path)),
            "message": redact_text(self.message),
            "file": place.source or None,
            "line": place.line or None,
            "column": place.column or None,
            "override": place.override or None,
        }

    def concerns(self, path: KeyPath) -> bool:
        """Return whether it is about a key, a section around that key, or something below it."""
        for other in (self.path, self.meant or ()):
            shorter = min(len(other), len(path))
            if shorter and other[:shorter] == path[:shorter]:
                return True
        return False


class RecipeError(UsageError):
    """The errors of a recipe that is refused.

    Args:
        problems: At least one error, in the order of the file.
    """

    def __init__(self, problems: Sequence[Diagnostic]) -> None:
        first = problems[0]
        super().__init__(f"{first.where}: {redact_text(first.message)}")
        self.problems = list(problems)

    def __str__(self) -> str:
        shown = [one.text(picture=True) for one in self.problems[:LIMIT]]
        more = len(self.problems) - LIMIT
        return "\n".join([*shown, f"and {more} more"] if more > 0 else shown)


def in_order(diagnostics: Iterable[Diagnostic]) -> list[Diagnostic]:
    """Sort by place: first the file from its top, then the overrides."""

    def position(one: Diagnostic) -> tuple[int, int, int]:
        place = one.place or Place("")
        return place.override, place.line, place.column

    return sorted(diagnostics, key=position)


def dotted(path: KeyPath) -> str:
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


@dataclass(frozen=True, slots=True)
class NoEffect:
    """The reason why a key has no effect.

    Args:
        reason: A clause that completes "it has no effect: ...".
        causes: The keys that make it so.
    """

    reason: str
    causes: tuple[KeyPath, ...]

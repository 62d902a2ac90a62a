"""Detection of a file's format from its first rows, and the options of formats."""

import inspect
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from dpoctl.data.formats import AS, FORMATS, TEXT_FORMATS, Format
from dpoctl.data.formats.common import MissingColumns
from dpoctl.data.formats.trl import synonyms
from dpoctl.data.messages import SHAPE
from dpoctl.data.records import Record, Reject, Row
from dpoctl.errors import DataError, UsageError

LEAST = 0.5
"""The share of rows that must be in the format of a file."""
SIMILAR = 0.9
"""A format is a candidate if it has this share of the rows that are in the format with the most."""
PLAIN = ("trl-explicit", "trl-implicit", "messages", "prompt-completion", "text")
"""Formats that an error names before others that are as near."""
NEAREST = 3
"""The number of formats that an error names as the nearest."""
MOST_NAMES = 40
LONGEST_NAME = 60


@dataclass(frozen=True)
class FirstRows:
    """The first rows of a file, and their places in words such as `line 3`."""

    rows: Sequence[Row]
    places: Sequence[str]

    @property
    def columns(self) -> set[str]:
        """All columns of the rows."""
        return set[str]().union(*self.rows)


@dataclass(frozen=True)
class Fit:
    """The rows of a sample that are in a format, and the reason of each other row."""

    name: str
    rows: frozenset[int]
    misfits: Mapping[int, Reject]

    def columns(self, sample: FirstRows) -> frozenset[str]:
        """Return the columns without which the first of its rows would not be in the format."""
        first, function = sample.rows[min(self.rows)], FORMATS[self.name]
        return frozenset(
            column for column in first if _misfit(function, {key: first[key] for key in first if key != column})
        )


class Match(NamedTuple):
    """A format that the rows are in."""

    name: str
    rows: frozenset[int]
    """The rows that are in it."""
    columns: frozenset[str]
    """The columns without which a row would not be in it."""


class Detection(NamedTuple):
    """The format of a file, and the evidence for it."""

    format: str
    evidence: str
    """The evidence in words."""
    also_possible: list[str]
    """Less specific formats that the rows are in as well."""
    columns: list[str]
    """All columns of the rows."""
    rows: int
    """The number of rows that were read."""


def detect(rows: Sequence[Row], places: Sequence[str] | None = None) -> Detection:
    """Detect the format of a file from its first rows, about a hundred.

    Of the formats that the most rows are in, the one that needs the most columns is the most specific; of those that
    need the same ones, the first. Rows in no format, or in another one, do not count.

    Args:
        rows: The rows.
        places: The place of each row in words; the default is `row 1` and so on.

    Raises:
        DataError: No format fits half of the rows, or two that are equally specific do.
    """
    sample = FirstRows(rows, places or [f"row {number}" for number in range(1, len(rows) + 1)])
    fits = [_fit(name, rows) for name in FORMATS]
    most = max(len(fit.rows) for fit in fits)
    if not most or most < LEAST * len(rows):
        raise _nothing_fits(sample, fits)
    likely = [fit for fit in fits if len(fit.rows) >= SIMILAR * most]
    matches = [Match(fit.name, fit.rows, fit.columns(sample)) for fit in likely]
    best = max(matches, key=lambda match: len(match.columns))
    rivals = [match for match in matches if _is_rival(match, best, rows)]
    equal = [match.name for match in rivals if len(match.columns) == len(best.columns)]
    if equal:
        names = [best.name, *equal]
        raise DataError(
            f"the columns {_listed(rows)} fit {' and '.join(names)} equally well",
            hint=f"set {' or '.join(f'--format {name}' for name in names)} (in a recipe, format: {best.name})",
        )
    evidence = _evidence(best, rivals, sample, fits)
    return Detection(best.name, evidence, [rival.name for rival in rivals], sorted(sample.columns), len(rows))


class Option(NamedTuple):
    """An option of a format: a keyword-only parameter of its function."""

    name: str
    type: Any
    """`bool`, `int`, `float`, `str`, or a `Literal` of words."""
    default: Any

    def __str__(self) -> str:
        return f"{self.name}={self.values} (default {_written(self.default)})"

    @property
    def values(self) -> str:
        """The words among which to choose, or the type of the values."""
        return "|".join(self.choices) or str(self.type.__name__)

    @property
    def choices(self) -> tuple[str, ...]:
        """The words among which to choose; empty where any value of the type will do."""
        return typing.get_args(self.type) if typing.get_origin(self.type) is typing.Literal else ()

    def takes(self, value: Any) -> bool:
        """Return whether the option can have a value."""
        if self.choices:
            return value in self.choices
        if self.type is float:
            return isinstance(value, int | float) and not isinstance(value, bool)
        return type(value) is self.type


def options_of(name: str) -> dict[str, Option]:
    """List the options of a format, by name."""
    function = FORMATS[name]
    hints = typing.get_type_hints(function)
    own = {
        key: Option(key, hints[key], parameter.default)
        for key, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    return own | ({AS: Option(AS, Literal["text", "messages"], "text")} if name in TEXT_FORMATS else {})


def list_formats() -> str:
    """List all formats, a line each, and below each its options with their defaults."""
    lines = []
    for name, function in FORMATS.items():
        summary = str(function.__doc__).partition("\n")[0].replace("`", "")
        lines += [f"{name:24}{summary}", *(f"    --option {option}" for option in options_of(name).values())]
    return "\n".join(lines)


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Make sure that a format has these options, with values as YAML gives them.

    Raises:
        UsageError: The format has no such option, or the option cannot have the value.
    """
    known = options_of(name)
    hint = f"{name} takes {', '.join(map(str, known.values()))}" if known else f"{name} takes no options"
    for key, value in options.items():
        if key not in known:
            raise UsageError(f"format {name} has no option {key!r}", hint=hint)
        if not known[key].takes(value):
            raise UsageError(f"format {name}: option {key} cannot be {_written(value)}", hint=hint)


def _fit(name: str, rows: Sequence[Row]) -> Fit:
    reasons = {number: _misfit(FORMATS[name], row) for number, row in enumerate(rows)}
    misfits = {number: reject for number, reject in reasons.items() if reject is not None}
    return Fit(name, frozenset(reasons.keys() - misfits.keys()), misfits)


def _is_rival(match: Match, best: Match, rows: Sequence[Row]) -> bool:
    """Whether another format, with other columns, finds different answers in a row, and not fewer."""
    if match.columns <= best.columns:
        return False
    readings = ((_read(FORMATS[best.name], row), _read(FORMATS[match.name], row)) for row in rows)
    return any(one and other and _differ(one, other) for one, other in readings)


def _differ(one: Record, other: Record) -> bool:
    return len(other.responses) >= len(one.responses) and (one.prompt, one.responses) != (other.prompt, other.responses)


def _read(function: Format, row: Row) -> Record | None:
    try:
        return function(row)
    except Reject:
        return None


def _misfit(function: Format, row: Row) -> Reject | None:
    """Return the reason why a row is not in a format at all; None where it is."""
    try:
        function(row)
    except Reject as reject:
        return reject if reject.reason == SHAPE else None
    return None


def _evidence(best: Match, rivals: Iterable[Match], sample: FirstRows, fits: Sequence[Fit]) -> str:
    words = [f"columns {', '.join(sorted(best.columns))}", _share(best, sample, fits)]
    if best.name == "generic":
        renamed = [(name, column) for name, (column,) in synonyms(best.columns).items() if name != column]
        words[0] = ", ".join(f"{column} -> {name}" for name, column in renamed)
    names = [match.name for match in rivals]
    return "; ".join(words + ([f"also possible: {', '.join(names)}"] if names else []))


def _share(best: Match, sample: FirstRows, fits: Sequence[Fit]) -> str:
    """Say how many rows are in the best format, why the first of the others is not, and whether another fits those.

    Raises:
        DataError: Another format fits as many other rows.
    """
    count = len(sample.rows)
    text = f"{len(best.rows)} of the first {count} rows fit"
    misfits = next(fit.misfits for fit in fits if fit.name == best.name)
    if not misfits:
        return text
    first = min(misfits)
    text += f", {sample.places[first]} does not: {misfits[first].detail}"
    other = max(fits, key=lambda fit: len(fit.rows - best.rows))
    others = len(other.rows - best.rows)
    if others >= len(best.rows):
        names = (best.name, other.name)
        raise DataError(
            f"{len(best.rows)} of the first {count} rows fit {best.name}, and {others} others fit {other.name}",
            hint=f"split the file, or set {' or '.join(f'--format {name}' for name in names)} to read a part of it",
        )
    return f"{text}; {others} of the others fit {other.name}" if others else text


def _nothing_fits(sample: FirstRows, fits: Sequence[Fit]) -> DataError:
    found = synonyms(sample.columns)
    unclear = [f"{name} could be {' or '.join(columns)}" for name, columns in found.items() if len(columns) > 1]
    closeness = {fit.name: _closeness(fit, sample) for fit in fits}
    ranked = sorted(fits, key=lambda fit: (-closeness[fit.name], fit.name not in PLAIN))
    nearest = [fit for fit in ranked if closeness[fit.name]][:NEAREST]
    hints = [f"closest formats: {', '.join(_why_not(fit, sample) for fit in nearest)}"] if nearest else []
    has_columns = max(closeness.values()) >= 1
    renamed = {name: columns[0] if columns else "COLUMN" for name, columns in found.items() if columns != [name]}
    if renamed and not has_columns:
        flags = " ".join(f"--column-map {name}={column}" for name, column in renamed.items())
        recipe = ", ".join(f"{name}: {column}" for name, column in renamed.items())
        hints.append(f"try {flags} (in a recipe, column_map: {{{recipe}}})")
    what = f"the columns {_listed(sample.rows)}"
    if best := next((fit.name for fit in nearest if fit.rows), None):
        what = f"half of the first {len(sample.rows)} rows, which have {what}"
        hints.append(f"--format {best} reads those that fit (in a recipe, format: {best})")
    text = "; ".join([f"no known format fits {what}", *unclear])
    return DataError(text, hint="; ".join(hints) or None)


def _closeness(fit: Fit, sample: FirstRows) -> float:
    """Return the number of rows that are in a format, plus the share of its columns that the closest other row has."""
    return len(fit.rows) + max((_nearness(reject, sample.rows[row]) for row, reject in fit.misfits.items()), default=0)


def _nearness(reject: Reject, row: Row) -> float:
    """Return the share of a format's columns that a row outside of it has; 1 where the value of one is wrong."""
    if isinstance(reject, MissingColumns):
        return len(reject.found) / (len(reject.found) + len(reject.missing))
    return float(reject.detail.startswith(tuple(row)))


def _why_not(fit: Fit, sample: FirstRows) -> str:
    """Say where and why a row is not in a format: the first of those that are closest to it."""
    row = max(fit.misfits, key=lambda row: (_nearness(fit.misfits[row], sample.rows[row]), -row))
    reject = fit.misfits[row]
    if isinstance(reject, MissingColumns) and not sample.columns & {*reject.missing}:
        return f"{fit.name} (no column {', '.join(map(repr, reject.missing))})"
    share = f"{len(fit.rows)} of {len(sample.rows)} rows fit; " if fit.rows else ""
    return f"{fit.name} ({share}{sample.places[row]}: {reject.detail})"


def _listed(rows: Sequence[Row]) -> str:
    names = sorted(set[str]().union(*rows))
    shown = ", ".join(name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}..." for name in names[:MOST_NAMES])
    return (f"{shown} and {len(names) - MOST_NAMES:,} more" if len(names) > MOST_NAMES else shown) or "none"


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)

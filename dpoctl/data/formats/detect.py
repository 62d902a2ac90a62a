"""Telling the format of a file by its first rows."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from dpoctl.data.conversation import SHAPE
from dpoctl.data.formats.options import Format
from dpoctl.data.formats.parts import MissingColumns
from dpoctl.data.formats.trl import synonyms
from dpoctl.data.records import Record, Reject, Row
from dpoctl.errors import DataError

ENOUGH = 0.9
"""The share of rows that must be in a format."""
NEAREST = 3
MOST_NAMES = 40
LONGEST_NAME = 60


class Match(NamedTuple):
    """A format that the rows are in."""

    name: str
    rows: int
    """How many are."""
    columns: frozenset[str]
    """Those without which a row would not be."""


class Detection(NamedTuple):
    """The format of a file, and how that is told."""

    format: str
    evidence: str
    """In words."""
    also_possible: list[str]
    """Formats that the rows are in as well, and that are less specific."""
    columns: list[str]
    """All columns that were seen."""
    rows: int
    """How many were looked at."""


def detect(rows: Sequence[Row], formats: Mapping[str, Format]) -> Detection:
    """Find the format of a file by its first rows.

    The format that needs the most columns is the most specific; of those that need the same ones, the first.

    Args:
        rows: The first rows, about a hundred.
        formats: All formats, more specific ones before others that need the same columns.

    Returns:
        The most specific format that nine of ten rows are in.

    Raises:
        DataError: No format fits, or two that are as specific do.
    """
    matches = [match for name, function in formats.items() if (match := _match(name, function, rows))]
    if not matches:
        raise _nothing_fits(rows, formats)
    best = max(matches, key=lambda match: len(match.columns))
    rivals = [match for match in matches if _is_rival(match, best, rows, formats)]
    equal = [match.name for match in rivals if len(match.columns) == len(best.columns)]
    if equal:
        names = [best.name, *equal]
        raise DataError(
            f"the columns {_listed(rows)} fit {' and '.join(names)} alike",
            hint=f"say {' or '.join(f'--format {name}' for name in names)} (in a recipe, format: {best.name})",
        )
    columns = sorted(set[str]().union(*rows))
    return Detection(best.name, _evidence(best, rivals, rows), [rival.name for rival in rivals], columns, len(rows))


def _match(name: str, function: Format, rows: Sequence[Row]) -> Match | None:
    fitting = [row for row in rows if _fits(function, row)]
    if not fitting or len(fitting) < ENOUGH * len(rows):
        return None
    first = fitting[0]
    needed = (column for column in first if not _fits(function, {key: first[key] for key in first if key != column}))
    return Match(name, len(fitting), frozenset(needed))


def _is_rival(match: Match, best: Match, rows: Sequence[Row], formats: Mapping[str, Format]) -> bool:
    """Whether another format, which goes by other columns, sees different answers in a row, and not fewer."""
    if match.columns <= best.columns:
        return False
    readings = ((_read(formats[best.name], row), _read(formats[match.name], row)) for row in rows)
    return any(one and other and _differ(one, other) for one, other in readings)


def _differ(one: Record, other: Record) -> bool:
    return len(other.responses) >= len(one.responses) and (one.prompt, one.responses) != (other.prompt, other.responses)


def _read(function: Format, row: Row) -> Record | None:
    try:
        return function(row)
    except Reject:
        return None


def _fits(function: Format, row: Row) -> bool:
    return _misfit(function, row) is None


def _misfit(function: Format, row: Row) -> Reject | None:
    """Why a row is not in a format at all, or None where it is."""
    try:
        function(row)
    except Reject as reject:
        return reject if reject.reason == SHAPE else None
    return None


def _evidence(best: Match, rivals: Iterable[Match], rows: Sequence[Row]) -> str:
    words = [f"columns {', '.join(sorted(best.columns))}", f"{best.rows} of the first {len(rows)} rows fit"]
    if best.name == "generic":
        renamed = [(name, column) for name, (column,) in synonyms(best.columns).items() if name != column]
        words[0] = ", ".join(f"{column} -> {name}" for name, column in renamed)
    names = [match.name for match in rivals]
    return "; ".join(words + ([f"also possible: {', '.join(names)}"] if names else []))


def _nothing_fits(rows: Sequence[Row], formats: Mapping[str, Format]) -> DataError:
    found = synonyms(set[str]().union(*rows))
    unclear = [f"{name} could be {' or '.join(columns)}" for name, columns in found.items() if len(columns) > 1]
    nearest = "; ".join(f"{name}: {why}" for name, why in _nearest(rows, formats))
    renamed = {name: columns[0] if columns else "COLUMN" for name, columns in found.items() if columns != [name]}
    flags = " ".join(f"--column-map {name}={column}" for name, column in renamed.items())
    recipe = ", ".join(f"{name}: {column}" for name, column in renamed.items())
    hints = [f"nearest are {nearest}"] if nearest else []
    hints += [f"try {flags} (in a recipe, column_map: {{{recipe}}})"] if renamed else []
    return DataError("; ".join([f"no known format fits the columns {_listed(rows)}", *unclear]), hint="; ".join(hints))


def _nearest(rows: Sequence[Row], formats: Mapping[str, Format]) -> list[tuple[str, str]]:
    """The formats that the first row lacks least of, and what it lacks."""
    lacks: list[tuple[float, str, str]] = []
    for row in rows[:1]:
        for name, function in formats.items():
            reject = _misfit(function, row)
            if isinstance(reject, MissingColumns):
                lacks.append((len(reject.found) / (len(reject.found) + len(reject.missing)), name, reject.detail))
            elif reject and reject.detail.startswith(tuple(row)):
                lacks.append((1.0, name, reject.detail))
    nearest = sorted((lack for lack in lacks if lack[0]), key=lambda lack: -lack[0])[:NEAREST]
    return [(name, why) for _, name, why in nearest]


def _listed(rows: Sequence[Row]) -> str:
    names = sorted(set[str]().union(*rows))
    shown = ", ".join(name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}..." for name in names[:MOST_NAMES])
    return (f"{shown} and {len(names) - MOST_NAMES:,} more" if len(names) > MOST_NAMES else shown) or "none"

"""Sources to records: every row is read, understood and selected, or counted as what became of it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

from dpoctl.data import formats
from dpoctl.data.grouping import GROUPED, Grouper
from dpoctl.data.records import Record, Reject, Row, Text
from dpoctl.data.selection import HeldOut, sample
from dpoctl.data.shaping import Shaper, Wants, pairing_of
from dpoctl.data.sources import SourceRow, read_rows
from dpoctl.errors import DataError, UsageError

if TYPE_CHECKING:
    from dpoctl.recipe.schema_data import Source

LOOK_AT = 100
"""Rows that a format is told by."""

Place = tuple[int, str, int]
"""The number of a source, the file in it (empty for the source itself), and the line."""


@dataclass(frozen=True)
class Selection:
    """Which rows a set is made of, and what for."""

    sources: tuple["Source", ...]
    wants: Wants
    seed: int
    eval_size: float | int | None = None
    """How much of the sources is held out, where something is."""
    side: str = "train"
    """`train` or `eval`: which side of that split the set is."""
    held_out: HeldOut | None = None
    """The split itself, once it is known."""

    @property
    def method(self) -> str:
        """Which kind of rows a built-in source gives."""
        return "sft" if self.wants == "demonstrations" else "dpo"


@dataclass
class RowCount:
    """What became of the rows that are not found."""

    rows: int = 0
    """All of them, found or not."""
    unsampled: int = 0
    """Left out by `max_samples`, or by a `weight` below 1."""
    held_out: int = 0
    """In the eval set instead."""
    sources: list[dict[str, Any]] = field(default_factory=list)
    """One a source: its path, its format, the evidence for it, its rows."""


class Unit(NamedTuple):
    """What is sampled together: a row, or the rows of a prompt where they mean something only together."""

    places: tuple[Place, ...]
    content: Row | Record | Reject


class Found(NamedTuple):
    """A record that is selected, or why there is none."""

    places: tuple[Place, ...]
    """Where its rows stand."""
    outcome: Record | Reject
    copies: int = 1
    """How often an epoch sees it."""
    tied_pairs: int = 0
    """Pairs that the record lost for being ties."""


def find_rows(selection: Selection, count: RowCount) -> Iterator[Found]:
    """Read the selected rows of all sources, in order.

    Raises:
        UsageError: A source is to be read with an option that its format does not have.
        DataError: A source cannot be read, is in no known format, or has a key that none of its rows has a use for.
        SetupError: The hub cannot be reached.
    """
    for number, source in enumerate(selection.sources):
        name, evidence, rows = settle_format(source, read_rows(source, method=selection.method))
        facts: dict[str, Any] = {"path": source.path, "format": name, "evidence": evidence, "rows": 0}
        count.sources.append(facts)
        shaper = Shaper(source, selection.wants, pairing_of(source, selection.wants, selection.seed))
        sampling = sample(source, partial(_count_units, selection, number, name), selection.seed, number)
        for ordinal, unit in enumerate(read_units(source, rows, name, number, selection.wants)):
            copies = sampling.copies(ordinal)
            outcome, tied_pairs = shaper.settle(understand(unit.content, name, source)) if copies else (None, 0)
            if not _is_ours(selection, outcome, len(unit.places), count):
                continue
            facts["rows"] += len(unit.places)
            if outcome is not None:
                yield Found(unit.places, outcome, copies if selection.side == "train" else 1, tied_pairs)
        shaper.refuse_idle_keys(name)


def settle_format(source: "Source", rows: Iterator[SourceRow]) -> tuple[str, str, Iterator[SourceRow]]:
    """Find the format of a source by its first rows, where the source leaves it to them.

    Returns:
        The format, the evidence (empty where the source says it), and all the rows.

    Raises:
        UsageError: The format has no such option.
        DataError: No format fits.
    """
    name, evidence = source.format, ""
    if name == "auto":
        head = _head(rows)
        rows = chain(head, rows)
        sound = [row.row for row in head if not isinstance(row.row, Reject)]
        if not sound:
            return name, "", rows
        name, evidence, *_ = detect_format(source.path, sound)
    try:
        formats.check_options(name, source.format_options)
    except UsageError as error:
        raise UsageError(f"{source.path}: {error.message}", hint=error.hint) from error
    return name, evidence, rows


def _head(rows: Iterator[SourceRow]) -> list[SourceRow]:
    """Take the first rows, and as many more as it takes to meet one that can be read."""
    head = []
    any_sound = False
    for row in rows:
        head.append(row)
        any_sound = any_sound or not isinstance(row.row, Reject)
        if any_sound and len(head) >= LOOK_AT:
            break
    return head


def detect_format(path: str, rows: list[Row]) -> formats.Detection:
    """Find the format of a source by its first rows.

    Raises:
        DataError: No format fits, or two fit alike.
    """
    try:
        return formats.detect(rows)
    except DataError as error:
        raise DataError(f"{path}: {error.message}", hint=error.hint) from error


def read_units(
    source: "Source", rows: Iterable[SourceRow], name: str, number: int, wants: Wants | None
) -> Iterator[Unit]:
    """Bring the rows together that mean something only together; the others come one by one."""
    units = (Unit(((number, row.part, row.line),), row.row) for row in rows)
    if name not in GROUPED or wants == "labels":
        yield from units
        return
    grouper = Grouper[Place]()
    for places, content in units:
        record = understand(content, name, source)
        if isinstance(record, Reject):
            yield Unit(places, record)
        else:
            grouper.add(record, places[0])
    for places, ranking in grouper.rankings():
        yield Unit(places, ranking)


def understand(content: Row | Record | Reject, name: str, source: "Source") -> Record | Reject:
    """Read a row in a format, if that is not done."""
    if not isinstance(content, dict):
        return content
    try:
        return formats.read(name, content, source.format_options)
    except Reject as reject:
        return reject


def iter_topics(selection: Selection) -> Iterable[Text]:
    """Read the topics of the rows that can be used."""
    return (found.outcome.topic for found in find_rows(selection, RowCount()) if isinstance(found.outcome, Record))


def _count_units(selection: Selection, number: int, name: str) -> int:
    source = selection.sources[number]
    rows = read_rows(source, method=selection.method)
    return sum(1 for _ in read_units(source, rows, name, number, selection.wants))


def _is_ours(selection: Selection, outcome: Record | Reject | None, rows: int, count: RowCount) -> bool:
    """Count rows, and say whether they belong to this side of the split.

    Rows that are rejected before their side can be known, and unsampled ones, are the training side's to report.
    """
    is_held_out = selection.held_out is not None and isinstance(outcome, Record) and outcome in selection.held_out
    if selection.side == "eval":
        count.rows += rows * is_held_out
        return is_held_out
    count.rows += rows
    count.unsampled += rows * (outcome is None)
    count.held_out += rows * is_held_out
    return not is_held_out

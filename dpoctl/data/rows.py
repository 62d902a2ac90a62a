"""Sources to records: every row is read, understood and selected, or counted as what became of it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, NamedTuple

from dpoctl.data import formats
from dpoctl.data.records import Record, Reject, Text
from dpoctl.data.selection import HeldOut, sample
from dpoctl.data.sources import SourceRow, read_rows
from dpoctl.errors import DataError

if TYPE_CHECKING:
    from dpoctl.recipe.schema import Source

LOOK_AT = 100
"""Rows that a format is told by."""

Place = tuple[int, str, int]
"""The number of a source, the file in it (empty for the source itself), and the line."""


@dataclass(frozen=True)
class Selection:
    """Which rows a set is made of."""

    sources: tuple["Source", ...]
    method: str
    seed: int
    eval_size: float | int | None = None
    """How much of the sources is held out, where something is."""
    side: str = "train"
    """`train` or `eval`: which side of that split the set is."""
    held_out: HeldOut | None = None
    """The split itself, once it is known."""


@dataclass
class RowCount:
    """What became of the rows that are not found."""

    rows: int = 0
    """All of them, found or not."""
    unsampled: int = 0
    """Left out by `max_samples`, or by a `weight` below 1."""
    held_out: int = 0
    """In the eval set instead."""
    formats: list[dict[str, Any]] = field(default_factory=list)
    """One a source: its path, its format, the evidence for it, its rows."""


class Found(NamedTuple):
    """A row that is selected: understood, or rejected."""

    at: Place
    outcome: Record | Reject
    copies: int
    """How often an epoch sees it."""


def find_rows(selection: Selection, count: RowCount) -> Iterator[Found]:
    """Read the selected rows of all sources, in order.

    Raises:
        DataError: A source cannot be read, or is in no known format.
        SetupError: The hub cannot be reached.
    """
    for number, source in enumerate(selection.sources):
        rows = read_rows(source, method=selection.method)
        name, evidence, rows = settle_format(source.path, source.format, rows)
        facts: dict[str, Any] = {"path": source.path, "format": name, "evidence": evidence, "rows": 0}
        count.formats.append(facts)
        sampling = sample(source, partial(_count, source, selection.method), selection.seed, number)
        for ordinal, row in enumerate(rows):
            copies = sampling.copies(ordinal)
            outcome = understand(row.row, name, selection.method) if copies else None
            if not _is_ours(selection, outcome, count):
                continue
            facts["rows"] += 1
            if outcome is not None:
                yield Found((number, row.part, row.line), outcome, copies if selection.side == "train" else 1)


def settle_format(path: str, asked: str, rows: Iterator[SourceRow]) -> tuple[str, str, Iterator[SourceRow]]:
    """Find the format of a source by its first rows, where the recipe leaves it to them.

    Returns:
        The format, the evidence (empty where the recipe says it), and all the rows.

    Raises:
        DataError: No format fits.
    """
    if asked != "auto":
        return asked, "", rows
    head = list(islice(rows, LOOK_AT))
    sound = [row.row for row in head if not isinstance(row.row, Reject)]
    if not sound:
        return asked, "", iter(head)
    try:
        name, evidence = formats.detect(sound)
    except DataError as error:
        raise DataError(f"{path}: {error.message}", hint=error.hint) from error
    return name, evidence, chain(head, rows)


def understand(row: Any, name: str, method: str | None = None) -> Record | Reject:
    """Read a row in a format, as what a method trains on; any method where none is named."""
    if isinstance(row, Reject):
        return row
    try:
        record = formats.read(name, row)
        if method == "sft":
            return record.preferred()
        if method == "dpo" and not record.pairs:
            return Reject("no_pair", "the row holds one answer, and a preference needs two")
    except Reject as reject:
        return reject
    return record


def iter_prompts(selection: Selection) -> Iterable[Text]:
    """Read the prompts of the rows that can be used."""
    return (found.outcome.prompt for found in find_rows(selection, RowCount()) if isinstance(found.outcome, Record))


def _count(source: "Source", method: str) -> int:
    return sum(1 for _ in read_rows(source, method=method))


def _is_ours(selection: Selection, outcome: Record | Reject | None, count: RowCount) -> bool:
    """Count a row, and say whether it belongs to this side of the split.

    Rows that are rejected before their side can be known, and unsampled ones, are the training side's to report.
    """
    is_held_out = selection.held_out is not None and isinstance(outcome, Record) and outcome in selection.held_out
    if selection.side == "eval":
        count.rows += is_held_out
        return is_held_out
    count.rows += 1
    count.unsampled += outcome is None
    count.held_out += is_held_out
    return not is_held_out

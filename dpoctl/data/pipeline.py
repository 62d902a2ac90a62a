"""The pipeline from sources to records: detect the format, read, parse, shape, apply majorities, mark duplicates.

Training (`build`) and `convert-data` (`convert`) both consume `read_records`; `RowStats` counts every row.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from dpoctl.data import formats
from dpoctl.data.formats.detect import Detection, check_options, detect
from dpoctl.data.formats.transcripts import as_messages
from dpoctl.data.grouping import GROUPED, Grouper, Labels, Majority
from dpoctl.data.json_cells import message_columns, refuse_unread, with_messages
from dpoctl.data.pairing import Shaper, Wants, check_ranking, pairing_of
from dpoctl.data.records import Record, Reject, Row, RowPlace
from dpoctl.data.row_report import LengthStats
from dpoctl.data.sampling import HeldOut, Tries, record_digest, sample
from dpoctl.data.sources import SourceRow, read_rows
from dpoctl.errors import DataError, UsageError

if TYPE_CHECKING:
    from dpoctl.recipe.data_section import Source

DETECTION_ROWS = 100
"""The number of first rows from which a format is detected."""


@dataclass(frozen=True)
class Selection:
    """The rows of a set, and the records that they become."""

    sources: tuple["Source", ...]
    wants: Wants | None
    """The kind of record that every row must become; None takes records as they are, once pairs are chosen."""
    seed: int
    method: Literal["sft", "dpo"] = "dpo"
    """The kind of rows that a built-in source gives."""
    eval_size: float | int | None = None
    """The share or number of records that are held out for evaluation."""
    side: Literal["train", "eval"] = "train"
    """The side of that split that the set is."""
    held_out: HeldOut | None = None
    """The split, once it is known."""
    tries: Mapping[int, Tries] = field(default_factory=dict)
    """The rows to try of sources with `max_samples`, by the number of the source; see `sample`."""
    drop_duplicates: bool = False
    keep_ratings: bool = False
    """Choose no pairs from rated answers."""
    labels: Literal["keep", "compare"] | None = None
    """`keep` leaves labelled answers as they are, `compare` makes pairs of the good and bad answers to a prompt."""


class RowResult(NamedTuple):
    """A selected record, or the reason why its rows give none."""

    places: tuple[RowPlace, ...]
    """The places of its rows."""
    outcome: Record | Reject
    copies: int = 1
    """The number of times that an epoch uses it."""
    tied_pairs: int = 0
    """The number of pairs that the record lost as ties."""
    rank: int = 0
    """Its place in the random order of a source with `max_samples`."""


@dataclass
class SourceStats:
    """The format of a source, and its counts."""

    path: str
    format: str
    evidence: str
    """The reason for the format; empty where the source names it."""
    json_columns: tuple[str, ...] = ()
    """Columns whose cells are the JSON text of messages."""
    rows: int = 0
    used: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    """Rows by reason."""


class OpenedRows(NamedTuple):
    """The rows of a source that is being read."""

    head: list[SourceRow]
    """The first of them, about a hundred."""
    rows: Iterator[SourceRow]
    """All of them, the first ones included."""
    json_columns: tuple[str, ...]
    """Columns whose cells are the JSON text of messages."""

    @property
    def sound(self) -> list[Row]:
        """Those of the first rows that can be read."""
        return [row.row for row in self.head if isinstance(row.row, dict)]


OpenedSource = tuple[SourceStats, Iterator[SourceRow]]


@dataclass
class RowStats:
    """The counts of a set: all rows, those that are used, and those that are not, by reason."""

    rows: int = 0
    unsampled: int = 0
    """Rows that `max_samples`, or a `weight` below 1, leaves out."""
    held_out: int = 0
    """Rows that are in the eval set instead."""
    duplicates: int = 0
    """Records that repeat an earlier one."""
    tied_pairs: int = 0
    """Pairs that used rows lost as ties."""
    outvoted_pairs: int = 0
    """Pairs that used rows lost to the majority."""
    sources: list[SourceStats] = field(default_factory=list)
    first_rejected: dict[str, tuple[RowPlace, str]] = field(default_factory=dict)
    """The first row that was rejected for each reason, and the detail."""
    lengths: LengthStats = field(default_factory=LengthStats)
    """The lengths of used records."""

    @property
    def used(self) -> int:
        """The number of rows that are used."""
        return sum(source.used for source in self.sources)

    @property
    def rejected(self) -> Counter[str]:
        """The number of rows that are not used, by reason."""
        return sum((source.rejected for source in self.sources), Counter[str]())

    def reject(self, reject: Reject, places: tuple[RowPlace, ...]) -> None:
        """Count rows that are not used."""
        self.sources[places[0][0]].rejected[reject.reason] += len(places)
        self.first_rejected.setdefault(reject.reason, (places[0], reject.detail))

    def use(self, result: RowResult, prompt: int, answers: tuple[int, ...]) -> None:
        """Count a record that is used, and add the lengths of its prompt and of each answer."""
        assert isinstance(result.outcome, Record)
        self.sources[result.places[0][0]].used += len(result.places)
        self.tied_pairs += result.tied_pairs
        self.lengths.add(prompt, answers, result.outcome.pairs)


class _Unit(NamedTuple):
    """Rows that are sampled together: one, or all rows with the same prompt where only those make a record."""

    places: tuple[RowPlace, ...]
    content: Row | Record | Reject


def read_records(
    selection: Selection, stats: RowStats, majority: Majority, opened: Iterable[OpenedSource] | None = None
) -> Iterator[RowResult]:
    """Read the records of a set in order, with majorities applied and duplicates counted.

    Args:
        selection: The set.
        stats: Counts the rows.
        majority: Counts the pairs of this pass, or, once it is closed, drops those that it decides against.
        opened: The selection's sources, where they are open: a stream can be opened only once.

    Raises:
        UsageError: A source sets an option that its format does not have.
        DataError: A source cannot be read, has no known format, or sets a key that no row of it uses.
        SetupError: The hub cannot be reached.
    """
    results = select_rows(selection, stats, opened)
    return _count_duplicates(_apply_majority(results, majority, selection, stats), selection, stats)


def select_rows(
    selection: Selection, stats: RowStats, opened: Iterable[OpenedSource] | None = None
) -> Iterator[RowResult]:
    """Read the records of a set in order, before majorities and duplicates; see `read_records`."""
    if opened is None:
        opened = (open_source(source, method=selection.method) for source in selection.sources)
    for number, (source, (counts, rows)) in enumerate(zip(selection.sources, opened, strict=True)):
        stats.sources.append(counts)
        pairing = None if selection.keep_ratings else pairing_of(source, selection.wants, selection.seed)
        shaper = Shaper(source, selection.wants, pairing, keep_labels=selection.labels == "keep")
        count = partial(count_units, selection, number, counts.format)
        tries = selection.tries.get(number)
        sampling = sample(source, count, selection.seed, number, tries)
        for ordinal, unit in enumerate(_read_units(selection, number, counts.format, rows)):
            copies = sampling.copies(ordinal)
            outcome, tied_pairs = None, 0
            if copies:
                outcome, tied_pairs = shaper.shape(_parse(unit.content, counts.format, source))
            if not _is_on_side(selection, outcome, len(unit.places), stats):
                continue
            counts.rows += len(unit.places)
            if outcome is not None:
                copies = copies if selection.side == "train" else 1
                yield RowResult(unit.places, outcome, copies, tied_pairs, sampling.rank(ordinal))
        if tries is None or not tries.start:
            shaper.refuse_unused_keys(counts.format)


def open_source(source: "Source", *, method: str = "dpo") -> OpenedSource:
    """Start to read a source, and detect its format from its first rows where it names none.

    Returns:
        The format with counts of zero, and the rows.

    Raises:
        UsageError: The source sets an option that its format does not have.
        DataError: The source cannot be read, or no format fits.
        SetupError: The hub cannot be reached.
    """
    opened = open_rows(source, method=method)
    name, evidence = source.format, ""
    if name == "auto":
        if not opened.sound:
            return SourceStats(source.path, name, ""), opened.rows
        name, evidence, *_ = detect_format(source.path, opened)
    try:
        check_options(name, source.format_options)
    except UsageError as error:
        raise UsageError(f"{source.path}: {error.message}", hint=error.hint) from error
    if source.format_options.get(formats.AS) == "messages" and not _any_text(name, opened.sound, source.format_options):
        why = f"the first rows of format {name} are messages already"
        raise UsageError(f"{source.path}: option as: messages would do nothing: {why}", hint="leave it out")
    return SourceStats(source.path, name, evidence, opened.json_columns), opened.rows


def open_rows(source: "Source", *, method: str = "dpo") -> OpenedRows:
    """Start to read the rows of a source, with the JSON text of messages in their cells read.

    Raises:
        DataError: The source cannot be read.
        SetupError: The hub cannot be reached.
    """
    rows = read_rows(source, method=method)
    head = _head(rows)
    columns = message_columns(row.row for row in head if isinstance(row.row, dict))
    if columns:
        head, rows = [_with_messages(row, columns) for row in head], (_with_messages(row, columns) for row in rows)
    return OpenedRows(head, chain(head, rows), columns)


def detect_format(path: str, opened: OpenedRows) -> Detection:
    """Detect the format of a source from its first rows, of which at least one can be read.

    Raises:
        DataError: No format fits, or two fit equally well.
    """
    places = [f"{row.part and f'{row.part}, '}line {row.line}" for row in opened.head if isinstance(row.row, dict)]
    try:
        return detect(opened.sound, places)
    except DataError as error:
        raise DataError(f"{path}: {error.message}", hint=error.hint) from error


def _any_text(name: str, rows: list[Row], options: Mapping[str, Any]) -> bool:
    """Return whether messages would be made of any of these rows, or none of them can be read."""
    any_sound = False
    for row in rows:
        try:
            plain = formats.read(name, row, {key: value for key, value in options.items() if key != formats.AS})
        except Reject:
            continue
        any_sound = True
        try:
            if as_messages(plain) != plain:
                return True
        except Reject:
            return True
    return not any_sound


def _head(rows: Iterator[SourceRow]) -> list[SourceRow]:
    """Take the first rows, and as many more as it takes to find one that can be read."""
    head = []
    any_sound = False
    for row in rows:
        head.append(row)
        any_sound = any_sound or not isinstance(row.row, Reject)
        if any_sound and len(head) >= DETECTION_ROWS:
            break
    return head


def _with_messages(row: SourceRow, columns: tuple[str, ...]) -> SourceRow:
    return row if isinstance(row.row, Reject) else row._replace(row=with_messages(row.row, columns))


def _read_units(selection: Selection, number: int, name: str, rows: Iterable[SourceRow]) -> Iterator[_Unit]:
    """Group the rows of a source that make a record only together; yield the others one by one."""
    units = (_Unit(((number, row.part, row.line),), row.row) for row in rows)
    has_groups = name in GROUPED and selection.wants != "labels"
    if not has_groups and selection.labels != "compare":
        yield from units
        return
    groups = Grouper() if has_groups else Labels()
    for places, content in units:
        outcome = _parse(content, name, selection.sources[number])
        if isinstance(outcome, Record) and (has_groups or outcome.label is not None):
            groups.add(outcome, places[0])
        else:
            yield _Unit(places, outcome)
    for group in groups.records():
        yield _Unit(*group)


def count_units(selection: Selection, number: int, name: str) -> int:
    """Read a source to its end, and count its rows, those that make a record only together as one.

    Raises:
        DataError: The source cannot be read.
        SetupError: The hub cannot be reached.
    """
    rows = open_rows(selection.sources[number], method=selection.method).rows
    return sum(1 for _ in _read_units(selection, number, name, rows))


def _parse(content: Row | Record | Reject, name: str, source: "Source") -> Record | Reject:
    """Make a record of a row in a format; pass a record or a rejection on."""
    if not isinstance(content, dict):
        return content
    try:
        record = formats.read(name, content, source.format_options)
        refuse_unread(content, record)
    except Reject as reject:
        return reject
    return record


def _is_on_side(selection: Selection, outcome: Record | Reject | None, rows: int, stats: RowStats) -> bool:
    """Count rows, and return whether they belong to the selection's side of the split.

    Rows that are rejected before their side is known, and unsampled ones, count for the training side.
    """
    is_held_out = selection.held_out is not None and isinstance(outcome, Record) and outcome in selection.held_out
    if selection.side == "eval":
        stats.rows += rows * is_held_out
        return is_held_out
    stats.rows += rows
    stats.unsampled += rows * (outcome is None)
    stats.held_out += rows * is_held_out
    return not is_held_out


def _apply_majority(
    results: Iterable[RowResult], majority: Majority, selection: Selection, stats: RowStats
) -> Iterator[RowResult]:
    for result in results:
        record = result.outcome
        if isinstance(record, Reject):
            yield result
        elif not majority.is_closed:
            majority.add(record)
            yield result
        else:
            try:
                kept = majority.filter(record)
                if selection.wants == "rankings":
                    check_ranking(kept)
            except Reject as reject:
                yield result._replace(outcome=reject)
                continue
            stats.outvoted_pairs += len(record.pairs) - len(kept.pairs)
            yield result._replace(outcome=kept)


def _count_duplicates(results: Iterable[RowResult], selection: Selection, stats: RowStats) -> Iterator[RowResult]:
    """Count records that repeat an earlier one, and reject them if the selection drops duplicates."""
    seen = set[bytes]()
    for result in results:
        if isinstance(result.outcome, Record):
            digest = record_digest(result.outcome)
            if digest in seen:
                stats.duplicates += 1
                if selection.drop_duplicates:
                    result = result._replace(outcome=Reject("duplicate", "the same record appears earlier in the data"))
            seen.add(digest)
        yield result

"""The `convert-data` side of the pipeline: any preference file becomes canonical JSON lines, every row counted."""

import json
import os
import sys
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dpoctl import console
from dpoctl.data.formats.detect import options_of
from dpoctl.data.formats.transcripts import with_messages
from dpoctl.data.formats.trl import canonical_rows
from dpoctl.data.grouping import Majority, unpaired
from dpoctl.data.output import Stdout, WholeFile
from dpoctl.data.pairing import Wants
from dpoctl.data.pipeline import (
    RowResult,
    RowStats,
    Selection,
    detect_format,
    open_rows,
    open_source,
    read_records,
)
from dpoctl.data.records import Record, Reject, Row, Text, strings_of
from dpoctl.data.row_report import json_text, lengths_table
from dpoctl.data.sources import STDIN, location, reads_once
from dpoctl.errors import DataError, UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from dpoctl.recipe.data_section import Source

STDOUT = "-"
To = Literal["pairs", "unpaired", "messages"]
Transcripts = Literal["text", "messages"]
ASKED_FOR = {"duplicate"}
"""Reasons for rejection that the user has chosen, and that `strict` therefore allows."""


@dataclass(frozen=True)
class Conversion:
    """A source, its outputs, and the options of the conversion."""

    source: "Source"
    output: str
    """A file, compressed if named `.gz`, whole or absent; `-` is stdout."""
    to: To | None = None
    """The kind of rows to write; None keeps that of each row."""
    rankings: bool = False
    """Keep rated answers together in one row, and choose no pairs."""
    transcripts: Transcripts | None = None
    """Make messages of transcripts, or keep them as text; None makes messages where messages are written."""
    drop_duplicates: bool = False
    strict: bool = False
    """Write nothing if any row is rejected."""
    max_reject_fraction: float | None = None
    """Write nothing if more of the rows than this are rejected."""
    rejects: str | None = None
    """A file for the rejected rows, one JSON object each."""
    report: str | None = None
    """A file for the counts."""

    @property
    def name(self) -> str:
        """The source as messages name it."""
        return "<stdin>" if self.source.path == STDIN else self.source.path

    @property
    def holds_back(self) -> bool:
        """Whether nothing is written before the last row is read."""
        return self.output != STDOUT or self.strict or self.max_reject_fraction is not None

    @property
    def reads_transcripts(self) -> bool:
        """Whether transcripts become messages."""
        return (self.transcripts or ("messages" if self.to == "messages" else "text")) == "messages"

    @property
    def can_repeat(self) -> bool:
        """Whether the source can be read a second time before anything is written."""
        return self.holds_back and not reads_once(self.source.path)

    @property
    def selection(self) -> Selection:
        """All rows of the source, and the records that they become."""
        wants: dict[To | None, Wants] = {"pairs": "pairs", "unpaired": "pairs", "messages": "demonstrations"}
        labels: dict[To | None, Literal["keep", "compare"]] = {"pairs": "compare", "unpaired": "keep"}
        return Selection(
            (self.source,),
            wants.get(self.to),
            seed=0,
            drop_duplicates=self.drop_duplicates,
            keep_ratings=self.rankings,
            labels=labels.get(self.to),
        )

    def check(self) -> None:
        """Make sure that no two outputs exclude each other, and that every option has an effect.

        Raises:
            UsageError: Two outputs exclude each other, or an option would do nothing.
        """
        if self.output == STDOUT and self.report == STDOUT:
            raise UsageError("--report and the rows cannot both go to stdout", hint="name a file with -o or --report")
        files = [
            Path(name).resolve() for name in (self.output, self.rejects, self.report) if name not in (None, STDOUT)
        ]
        twice = [file for file, count in Counter(files).items() if count > 1]
        if twice:
            text = f"{twice[0].name}: rows, rejected rows and the report cannot go to the same file"
            raise UsageError(text, hint="name different files")
        if any(_is_same_file(file, self.source.path) for file in files):
            raise UsageError(f"{self.source.path}: would be overwritten while it is read", hint="name another file")
        if self.rankings and self.to is not None:
            raise UsageError(f"--pairs none keeps rated answers together, but --to {self.to} splits them")
        keys = ("pairs", "min_margin", "max_pairs_per_prompt", "ties")
        given = [key for key in keys if getattr(self.source, key) is not None]
        if given and (self.to == "messages" or self.rankings):
            why = "--to messages takes the best answer alone" if self.to else "--pairs none chooses no pairs"
            raise UsageError(f"--{given[0].replace('_', '-')} would do nothing: {why}")


@dataclass
class ConversionResult:
    """The counts of a conversion."""

    source: str
    """The source as messages name it."""
    stats: RowStats = field(default_factory=RowStats)
    """Counts of rows; lengths are in characters."""
    written: int = 0
    """Rows of the output: a ranking may give several."""
    plain_text: int = 0
    """Rows that are no messages, although messages were wanted: text without turns."""
    has_conflicts: bool = False
    """Whether rows that contradict each other were written, since the source could not be read again."""

    def first(self, reason: str) -> dict[str, Any]:
        """Return file, line and detail of the first row that was rejected for a reason."""
        (_, part, line), detail = self.stats.first_rejected[reason]
        return {"file": location(self.source, part), "line": line, "detail": detail}

    def first_text(self, reason: str) -> str:
        """Name the first row that was rejected for a reason."""
        first = self.first(reason)
        return f"{first['file']}:{first['line']}{first['detail'] and ': '}{first['detail']}"

    def counts(self) -> dict[str, Any]:
        """Return the counts as JSON values."""
        return {
            "source": self.source,
            "format": self.stats.sources[0].format,
            "rows": self.stats.rows,
            "used": self.stats.used,
            "written": self.written,
            "duplicates": self.stats.duplicates,
            "tied_pairs": self.stats.tied_pairs,
            "outvoted_pairs": self.stats.outvoted_pairs,
            "rejected": dict(sorted(self.stats.rejected.items())),
        }

    def report(self) -> dict[str, Any]:
        """Return the counts and all that is known beside them as JSON values; lengths are in characters."""
        more = {
            "evidence": self.stats.sources[0].evidence,
            "first_rejected": {reason: self.first(reason) for reason in self.stats.first_rejected},
            "characters": self.stats.lengths.summary(),
        }
        return self.counts() | more


def _is_same_file(one: Path, other: str) -> bool:
    try:
        return one.samefile(other)
    except OSError:  # one of them is not there
        return False


def run(job: Conversion, *, json_output: bool = False) -> None:
    """Convert a source to canonical rows, and print the counts; `json_output` prints them on stdout as JSON too.

    Raises:
        UsageError: Two outputs exclude each other or one cannot be written, or an option would do nothing.
        DataError: The source cannot be read, no row of it can be used, or more are rejected than allowed.
        SetupError: The hub cannot be reached.
    """
    if json_output and job.output == STDOUT:
        raise UsageError("--json and the rows cannot both go to stdout", hint="name a file with -o")
    job.check()
    try:
        result = _convert(job)
    except BrokenPipeError:
        # The reader of stdout has closed it. Python would report that again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    console.say(_table(result, job.rejects))
    if lengths := result.stats.lengths.summary():
        console.say(lengths_table(lengths, "characters"))
    if result.has_conflicts:
        hint = "save the rows to a file" if reads_once(job.source.path) else "name a file with -o"
        console.warn(
            f"{job.name}: some pairs are contradicted by other rows, and all of them were written; "
            f"{hint} to keep only the majority's choice"
        )
    if result.plain_text:
        rows = "row stays" if result.plain_text == 1 else "rows stay"
        console.warn(
            f"{job.name}: {result.plain_text:,} {rows} plain text, without turns such as Human: and Assistant:"
        )
    if job.report is not None:
        with WholeFile(Path(job.report)) as file:
            file.write(json.dumps(result.report(), ensure_ascii=False, indent=2))
    if problem := _problem(result, job):
        raise problem
    if json_output:
        console.emit(json.dumps(result.counts(), ensure_ascii=False))


def detect(source: "Source", *, json_output: bool = False) -> None:
    """Print the format of a source, and the evidence for it.

    Raises:
        DataError: The source cannot be read, or no format fits.
        SetupError: The hub cannot be reached.
    """
    opened = open_rows(source)
    if not opened.sound:
        raise DataError(f"{source.path}: {'no row that can be read' if opened.head else 'no rows'}")
    found = detect_format(source.path, opened)
    options = options_of(found.format).values()
    if json_output:
        listed = {option.name: {"values": option.values, "default": option.default} for option in options}
        facts = {"source": source.path, **found._asdict(), "json_columns": opened.json_columns, "options": listed}
        console.emit(json.dumps(facts, ensure_ascii=False))
        return
    if opened.json_columns:
        console.note(f"{source.path}: {json_text(opened.json_columns)}")
    console.emit(f"{found.format}   ({found.evidence})")
    for option in options:
        console.emit(f"  --option {option}")


def _convert(job: Conversion) -> ConversionResult:
    majority = Majority()
    result = _pass(job, majority)
    if majority.has_conflicts and job.can_repeat:
        majority.close()
        return _pass(job, majority)
    result.has_conflicts = majority.has_conflicts
    return result


def _pass(job: Conversion, majority: Majority) -> ConversionResult:
    """Read all rows and write their records, unless the rows must be read again for the majority to decide."""
    opened = open_source(job.source)
    if (source := opened[0]).evidence and not majority.is_closed:
        console.note(f"{source.path}: format {source.format} ({source.evidence})")
    if source.json_columns and not majority.is_closed:
        console.note(f"{source.path}: {json_text(source.json_columns)}")
    result = ConversionResult(job.name)
    with ExitStack() as stack:
        rejects = None if job.rejects is None else stack.enter_context(WholeFile(Path(job.rejects)))
        output: WholeFile | Stdout
        output = Stdout(hold=job.holds_back) if job.output == STDOUT else WholeFile(Path(job.output))
        stack.enter_context(output)
        for row in read_records(job.selection, result.stats, majority, [opened]):
            _write(row, job, result, output, rejects)
        is_final = majority.is_closed or not (majority.has_conflicts and job.can_repeat)
        if rejects is not None:
            rejects.wanted = is_final
        output.wanted = is_final and _problem(result, job) is None
    return result


def _write(
    row: RowResult, job: Conversion, result: ConversionResult, output: WholeFile | Stdout, rejects: WholeFile | None
) -> None:
    outcome = row.outcome
    if isinstance(outcome, Record) and job.reads_transcripts:
        outcome = _from_transcript(outcome, result)
    if isinstance(outcome, Record):
        rows = _rows_of(outcome, job)
        if rows:
            result.written += len(rows)
            result.stats.use(row, _size(outcome.prompt), tuple(map(_size, outcome.responses)))
            for canonical in rows:
                output.write(json.dumps(canonical, ensure_ascii=False, default=str))
            return
        outcome = Reject("no_label", "every answer has both won and lost")
    result.stats.reject(outcome, row.places)
    if rejects is None:
        return
    for _, part, line in row.places:
        note = {"file": location(job.name, part), "line": line, "reason": outcome.reason, "detail": outcome.detail}
        rejects.write(json.dumps(note, ensure_ascii=False))


def _from_transcript(record: Record, result: ConversionResult) -> Record | Reject:
    try:
        found = with_messages(record)
    except Reject as reject:
        return reject
    result.plain_text += found is None and isinstance(record.prompt, str)
    return found or record


def _rows_of(record: Record, job: Conversion) -> list[Row]:
    if job.to == "messages" and not isinstance(record.prompt, str):
        return canonical_rows(_one_conversation(record))
    if job.to == "unpaired" and record.label is None:
        return [row for labelled in unpaired(record) for row in canonical_rows(labelled)]
    return canonical_rows(record, split=not job.rankings)


def _one_conversation(record: Record) -> Record:
    """Move the prompt of a demonstration into its response, where weight 0 keeps turns from being trained on.

    So every row has the column `messages`, whether the assistant has spoken before or not.
    """
    (answer,) = record.responses
    assert not isinstance(record.prompt, str)
    assert not isinstance(answer, str)
    prompt = [turn | {"weight": 0} if turn["role"] == "assistant" else turn for turn in record.prompt]
    return replace(record, prompt=[], responses=([*prompt, *answer],), label=None)


def _size(text: Text) -> int:
    return sum(map(len, strings_of(text)))


def _problem(result: ConversionResult, job: Conversion) -> DataError | None:
    """Return the reason not to write the output, or None."""
    rows, rejected = result.stats.rows, result.stats.rejected
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in rejected.most_common())
    hint = f"first: {result.first_text(rejected.most_common(1)[0][0])}" if rejected else None
    if not rows:
        return DataError(f"{job.name}: no rows")
    if not result.stats.used:
        return DataError(f"{job.name}: none of {rows:,} rows can be used: {reasons}", hint=hint)
    unwanted = sum(count for reason, count in rejected.items() if reason not in ASKED_FOR)
    limit = 0.0 if job.strict else job.max_reject_fraction
    if limit is not None and unwanted > limit * rows:
        allowed = "--strict allows none" if job.strict else f"--max-reject-fraction is {limit:g}"
        text = f"{job.name}: {unwanted:,} of {rows:,} rows cannot be used, and {allowed}: {reasons}"
        return DataError(text, hint=hint)
    return None


def _table(result: ConversionResult, rejects: str | None) -> "Table":
    from rich.table import Table

    stats, rejected = result.stats, result.stats.rejected
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(justify="right")
    table.add_column()
    table.add_column(style="dim", overflow="fold")
    table.add_row(f"{stats.rows:,}", "rows", "")
    table.add_row(f"{stats.used:,}", "used", "")
    table.add_row(f"{rejected.total():,}", "dropped", rejects or "")
    for reason, count in rejected.most_common():
        table.add_row(f"{count:,}", f"  {reason}", f"first: {console.printable(result.first_text(reason), keep='')}")
    others = {
        "written": 0 if result.written == stats.used else result.written,
        "duplicates": stats.duplicates,
        "tied pairs dropped": stats.tied_pairs,
        "outvoted pairs dropped": stats.outvoted_pairs,
    }
    for name, count in others.items():
        if count:
            table.add_row(f"{count:,}", name, "")
    return table

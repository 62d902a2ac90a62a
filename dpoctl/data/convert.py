"""`dpoctl convert-data`: any preference file to canonical JSON lines, streaming, with honest counts."""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dpoctl import console
from dpoctl.data import formats
from dpoctl.data.account import lengths_table
from dpoctl.data.grouping import Labels, Votes, unpaired
from dpoctl.data.records import Record, Reject, Row, Text
from dpoctl.data.rows import LOOK_AT, Found, Place, Unit, detect_format, read_units, settle_format, understand
from dpoctl.data.selection import record_digest
from dpoctl.data.shaping import Shaper, Wants, pairing_of
from dpoctl.data.sinks import HeldStdout, Nowhere, Sink, Stdout, WholeFile
from dpoctl.data.sources import STDIN, location, read_rows, reads_once
from dpoctl.data.spread import Lengths
from dpoctl.errors import DataError, UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from dpoctl.recipe.schema_data import Source

STDOUT = "-"
To = Literal["pairs", "unpaired", "messages"]
ASKED_FOR = {"duplicate"}
"""Reasons that `strict` does not object to: the user has asked for them."""


@dataclass(frozen=True)
class Job:
    """What is converted to what."""

    source: "Source"
    output: str
    """A file, compressed if named `.gz`, whole or absent; `-` is stdout."""
    to: To | None = None
    """None writes what a row is."""
    rankings: bool = False
    """Leave rated answers together in one row, and choose no pairs."""
    drop_duplicates: bool = False
    strict: bool = False
    """Write nothing if any row is rejected."""
    max_reject_fraction: float | None = None
    """Write nothing if more of the rows than this are rejected."""
    rejects: str | None = None
    """A file for the rows that are not used, one JSON object each."""
    report: str | None = None
    """A file for the counts."""

    @property
    def wants(self) -> Wants | None:
        """What must become of every row."""
        wanted: dict[To | None, Wants] = {"pairs": "pairs", "unpaired": "pairs", "messages": "demonstrations"}
        return wanted.get(self.to)

    @property
    def holds_back(self) -> bool:
        """Whether nothing is written before the last row is read."""
        return self.output != STDOUT or self.strict or self.max_reject_fraction is not None

    def check(self) -> None:
        """Make sure that all outputs can be had together, and that no choice would do nothing.

        Raises:
            UsageError: They cannot, or one would.
        """
        if self.output == STDOUT and self.report == STDOUT:
            raise UsageError("--report would go where the rows go", hint="name a file with -o or --report")
        files = [
            Path(name).resolve() for name in (self.output, self.rejects, self.report) if name not in (None, STDOUT)
        ]
        twice = [file for file, count in Counter(files).items() if count > 1]
        if twice:
            raise UsageError(f"{twice[0].name}: rows, rejected rows and the report cannot go to the same file")
        if any(_is_same_file(file, self.source.path) for file in files):
            raise UsageError(f"{self.source.path}: would be written over while it is read", hint="name another file")
        if self.rankings and self.to is not None:
            raise UsageError(f"--pairs none leaves rated answers together, and --to {self.to} takes them apart")
        keys = ("pairs", "min_margin", "max_pairs_per_prompt", "ties")
        given = [key for key in keys if getattr(self.source, key) is not None]
        if given and (self.to == "messages" or self.rankings):
            why = "--to messages takes the best answer alone" if self.to else "--pairs none chooses no pairs"
            raise UsageError(f"--{given[0].replace('_', '-')} would do nothing: {why}")


@dataclass
class Summary:
    """What became of the rows of a source."""

    source: str
    format: str = ""
    evidence: str = ""
    rows: int = 0
    used: int = 0
    written: int = 0
    """Rows of the output: a ranking may give several."""
    rejected: Counter[str] = field(default_factory=Counter)
    first: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Where each reason was met first, and in what words."""
    duplicates: int = 0
    tied_pairs: int = 0
    """Pairs that used rows have lost for being ties."""
    outvoted_pairs: int = 0
    """Pairs that used rows have lost to the majority."""
    unsettled: bool = False
    """Pairs stand there both ways round, and the source could not be read again to settle which is right."""
    lengths: Lengths = field(default_factory=Lengths)

    def reject(self, reject: Reject, file: str, line: int) -> None:
        """Count a row that is not used."""
        self.rejected[reject.reason] += 1
        self.first.setdefault(reject.reason, {"file": file, "line": line, "detail": reject.detail})

    def where(self, reason: str) -> str:
        """Say where a reason was met first."""
        first = self.first[reason]
        return f"{first['file']}:{first['line']}{first['detail'] and ': '}{first['detail']}"

    def counts(self) -> dict[str, Any]:
        """Write the counts as JSON values."""
        names = ("rows", "used", "written", "duplicates", "tied_pairs", "outvoted_pairs")
        rejected = dict(sorted(self.rejected.items()))
        return {
            "source": self.source,
            "format": self.format,
            **{name: getattr(self, name) for name in names},
            "rejected": rejected,
        }

    def report(self) -> dict[str, Any]:
        """Write all there is to say as JSON values; lengths are in characters."""
        more = {"evidence": self.evidence, "first_rejected": self.first, "characters": self.lengths.summary()}
        return self.counts() | more


def _is_same_file(one: Path, other: str) -> bool:
    try:
        return one.samefile(other)
    except OSError:  # one of them is not there
        return False


def run(job: Job, *, json_output: bool = False) -> None:
    """Convert a source to canonical rows.

    Args:
        job: What is converted to what.
        json_output: Print the counts as one JSON object on stdout.

    Raises:
        UsageError: The outputs are at odds with each other, or cannot be written; or a choice would do nothing.
        DataError: The source cannot be read, no row of it can be used, or more are rejected than may be.
        SetupError: The hub cannot be reached.
    """
    if json_output and job.output == STDOUT:
        raise UsageError("--json prints the counts on stdout, where the rows go", hint="name a file with -o")
    job.check()
    try:
        summary = _convert(job)
    except BrokenPipeError:
        # Whoever read stdout has had enough. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    console.say(_table(summary, job.rejects))
    if lengths := summary.lengths.summary():
        console.say(lengths_table(lengths, "characters"))
    if summary.unsettled:
        hint = "save it to a file" if reads_once(job.source.path) else "name a file with -o"
        console.warn(f"some pairs stand there both ways round, and all were written; {hint}, and the majority decides")
    if job.report is not None:
        with WholeFile(Path(job.report)) as file:
            file.write(json.dumps(summary.report(), ensure_ascii=False, indent=2))
    if problem := _objection(summary, job):
        raise problem
    if json_output:
        console.emit(json.dumps(summary.counts(), ensure_ascii=False))


def detect(source: "Source", *, json_output: bool = False) -> None:
    """Say which format a source is in, and how that is told.

    Raises:
        DataError: The source cannot be read, or no format fits.
        SetupError: The hub cannot be reached.
    """
    head = list(islice(read_rows(source), LOOK_AT))
    rows = [row.row for row in head if not isinstance(row.row, Reject)]
    if not rows:
        raise DataError(f"{source.path}: no rows" if not head else f"{source.path}: no row that can be read")
    found = detect_format(source.path, rows)
    if json_output:
        console.emit(json.dumps({"source": source.path, **found._asdict()}, ensure_ascii=False))
        return
    console.emit(f"{found.format}   ({found.evidence})")


def _convert(job: Job) -> Summary:
    votes = Votes()
    summary = _pass(job, votes, settle=False)
    if not votes.contradicted:
        return summary
    if reads_once(job.source.path) or not job.holds_back:
        summary.unsettled = True
        return summary
    return _pass(job, votes, settle=True)


def _pass(job: Job, votes: Votes, *, settle: bool) -> Summary:
    """Read all rows and write what becomes of them, unless they must be read again with the votes counted."""
    source = job.source
    name, evidence, rows = settle_format(source, read_rows(source))
    if evidence and not settle:
        console.note(f"{source.path}: format {name} ({evidence})")
    summary = Summary("<stdin>" if source.path == STDIN else source.path, name, evidence)
    units = read_units(source, rows, name, 0, job.wants)
    with ExitStack() as stack:
        refused, sink = _refused(job), _sink(job)
        stack.enter_context(refused)
        stack.enter_context(sink)
        for found in _without_duplicates(_votes(_shaped(job, units, name), votes, summary, settle), job, summary):
            _write(found, job, summary, sink, refused)
        is_final = settle or not votes.contradicted or reads_once(source.path)
        refused.wanted = is_final
        sink.wanted = is_final and _objection(summary, job) is None
    return summary


def _sink(job: Job) -> Sink:
    if job.output != STDOUT:
        return WholeFile(Path(job.output))
    return HeldStdout() if job.holds_back else Stdout()


def _refused(job: Job) -> Sink:
    return Nowhere() if job.rejects is None else WholeFile(Path(job.rejects))


def _shaped(job: Job, units: Iterable[Unit], name: str) -> Iterator[Found]:
    """Understand rows, and make of them what is wanted."""
    pairing = None if job.rankings else pairing_of(job.source, job.wants, seed=0)
    shaper = Shaper(job.source, job.wants, pairing)
    labels = Labels[Place]()
    for unit in units:
        outcome = understand(unit.content, name, job.source)
        if isinstance(outcome, Record) and outcome.label is not None and job.to in ("pairs", "unpaired"):
            if job.to == "pairs":
                labels.add(outcome, unit.places[0])
            else:
                yield Found(unit.places, outcome)
            continue
        outcome, tied_pairs = shaper.settle(outcome)
        yield Found(unit.places, outcome, tied_pairs=tied_pairs)
    for places, outcome in labels.comparisons():
        outcome, tied_pairs = shaper.settle(outcome)
        yield Found(places, outcome, tied_pairs=tied_pairs)
    shaper.refuse_idle_keys(name)


def _votes(rows: Iterable[Found], votes: Votes, summary: Summary, settle: bool) -> Iterator[Found]:
    """Count the votes on every pair; where they are counted, drop what the majority speaks against."""
    for found in rows:
        if isinstance(found.outcome, Record) and settle:
            try:
                record = votes.settle(found.outcome)
            except Reject as reject:
                yield found._replace(outcome=reject)
                continue
            summary.outvoted_pairs += len(found.outcome.pairs) - len(record.pairs)
            found = found._replace(outcome=record)
        elif isinstance(found.outcome, Record):
            votes.add(found.outcome)
        yield found


def _without_duplicates(rows: Iterable[Found], job: Job, summary: Summary) -> Iterator[Found]:
    seen = set[bytes]()
    for found in rows:
        if isinstance(found.outcome, Record):
            digest = record_digest(found.outcome)
            summary.duplicates += digest in seen
            if job.drop_duplicates and digest in seen:
                found = found._replace(outcome=Reject("duplicate", "the same record stands further up"))
            seen.add(digest)
        yield found


def _write(found: Found, job: Job, summary: Summary, sink: Sink, refused: Sink) -> None:
    summary.rows += len(found.places)
    outcome = found.outcome
    if isinstance(outcome, Record):
        rows = _rows_of(outcome, job)
        if rows:
            summary.used += len(found.places)
            summary.written += len(rows)
            summary.tied_pairs += found.tied_pairs
            summary.lengths.add(_size(outcome.prompt), tuple(map(_size, outcome.responses)), outcome.pairs)
            for row in rows:
                sink.write(json.dumps(row, ensure_ascii=False, default=str))
            return
        outcome = Reject("no_label", "every answer has both won and lost")
    for _, part, line in found.places:
        file = location(summary.source, part)
        summary.reject(outcome, file, line)
        note = {"file": file, "line": line, "reason": outcome.reason, "detail": outcome.detail}
        refused.write(json.dumps(note, ensure_ascii=False))


def _rows_of(record: Record, job: Job) -> list[Row]:
    if job.to == "unpaired" and record.label is None:
        return [row for labelled in unpaired(record)[0] for row in formats.canonical_rows(labelled)]
    return formats.canonical_rows(record, split=not job.rankings)


def _size(text: Text) -> int:
    return len(text) if isinstance(text, str) else sum(len(message["content"]) for message in text)


def _objection(summary: Summary, job: Job) -> DataError | None:
    """Say why nothing of this may be written, if that is so."""
    objected = Counter({reason: n for reason, n in summary.rejected.items() if reason not in ASKED_FOR})
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in summary.rejected.most_common())
    hint = f"first: {summary.where(summary.rejected.most_common(1)[0][0])}" if summary.rejected else None
    if not summary.rows:
        return DataError(f"{summary.source}: no rows")
    if not summary.used:
        return DataError(f"{summary.source}: none of {summary.rows:,} rows can be used: {reasons}", hint=hint)
    limit = 0.0 if job.strict else job.max_reject_fraction
    if limit is not None and objected.total() > limit * summary.rows:
        allowed = "--strict allows none" if job.strict else f"--max-reject-fraction is {limit:g}"
        rejected = f"{objected.total():,} of {summary.rows:,} rows cannot be used"
        return DataError(f"{summary.source}: {rejected}, and {allowed}: {reasons}", hint=hint)
    return None


def _table(summary: Summary, rejects: str | None) -> "Table":
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(justify="right")
    table.add_column()
    table.add_column(style="dim", overflow="fold")
    table.add_row(f"{summary.rows:,}", "rows", "")
    table.add_row(f"{summary.used:,}", "used", "")
    table.add_row(f"{summary.rejected.total():,}", "rejected", rejects or "")
    for reason, count in summary.rejected.most_common():
        table.add_row(f"{count:,}", f"  {reason}", f"first: {console.printable(summary.where(reason), keep='')}")
    others = {
        "written": 0 if summary.written == summary.used else summary.written,
        "duplicates": summary.duplicates,
        "tied pairs dropped": summary.tied_pairs,
        "outvoted pairs dropped": summary.outvoted_pairs,
    }
    for name, count in others.items():
        if count:
            table.add_row(f"{count:,}", name, "")
    return table

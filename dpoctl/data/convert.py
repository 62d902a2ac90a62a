"""`dpoctl convert-data`: any preference file to canonical JSON lines, streaming, with honest counts."""

import gzip
import io
import json
import os
import sys
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self
from uuid import uuid4

from dpoctl import console
from dpoctl.data.formats import canonical_row
from dpoctl.data.records import Record, Reject
from dpoctl.data.rows import settle_format, understand
from dpoctl.data.sources import STDIN, SourceRow, location, read_rows
from dpoctl.errors import DataError, UsageError
from dpoctl.recipe.schema import Source

if TYPE_CHECKING:
    from rich.table import Table

STDOUT = "-"


@dataclass
class Summary:
    """What became of the rows of a file."""

    source: str
    format: str = ""
    rows: int = 0
    used: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    """Where each reason was met first, and in what words."""

    def reject(self, reject: Reject, file: str, line: int) -> None:
        """Count a row that is not used."""
        self.rejected[reject.reason] += 1
        self.first.setdefault(reject.reason, f"{file}:{line}{f': {reject.detail}' if reject.detail else ''}")

    def to_json(self) -> str:
        """Write the counts as one JSON object."""
        counts = {"rows": self.rows, "used": self.used, "rejected": dict(sorted(self.rejected.items()))}
        return json.dumps({"source": self.source, "format": self.format, **counts}, ensure_ascii=False)


class _Sink(Protocol):
    def write(self, line: str) -> None: ...


class _Stdout:
    def write(self, line: str) -> None:
        console.emit(line)


class _Nowhere:
    def write(self, line: str) -> None:
        del line


class WholeFile:
    """A text file that is there whole, after the `with` block, or not at all; compressed if named `.gz`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.tmp")
        self.wanted = True
        """Set to false to leave nothing behind."""

    def __enter__(self) -> Self:
        try:
            raw = self._temporary.open("wb")
        except OSError as error:
            raise UsageError(f"{self._path}: cannot be written: {error.strerror or error}") from error
        self._files = ExitStack()
        self._files.enter_context(raw)
        file: Any = raw
        if self._path.suffix == ".gz":
            # No time stamp: the same rows give the same bytes.
            file = self._files.enter_context(gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0))
        self._text = self._files.enter_context(io.TextIOWrapper(file, encoding="utf-8", newline="\n"))
        return self

    def write(self, line: str) -> None:
        """Add a line."""
        self._text.write(line + "\n")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._files.close()
            if error is None and self.wanted:
                self._temporary.replace(self._path)
        finally:
            self._temporary.unlink(missing_ok=True)


def run(
    source: str,
    *,
    output: str,
    format: str = "auto",
    split: str = "train",
    rejects: str | None = None,
    column_map: dict[str, str] | None = None,
    json_output: bool = False,
) -> None:
    """Convert a source to canonical rows.

    Args:
        source: A file, a folder saved by `datasets`, a hub id, a built-in source, or `-` for stdin.
        output: A file, compressed if named `.gz`, whole or absent; `-` is stdout.
        format: A name in `FORMATS`, or `auto`.
        split: Which split to read, of sources that have some.
        rejects: A file for the rows that are not used, one JSON object each.
        column_map: Canonical column name: its name in the file.
        json_output: Print the counts as one JSON object on stdout.

    Raises:
        UsageError: The outputs are at odds with each other, or cannot be written.
        DataError: The source cannot be read, or no row of it can be used.
        SetupError: The hub cannot be reached.
    """
    if json_output and output == STDOUT:
        raise UsageError("--json prints the counts on stdout, where the rows go", hint="name a file with -o")
    if rejects is not None and Path(rejects).resolve() == Path(output).resolve():
        raise UsageError(f"{rejects}: rows and rejected rows cannot go to the same file")
    place = Source(path=source, split=split, format=format, column_map=column_map or {})
    try:
        summary = _convert(place, output, rejects)
    except BrokenPipeError:
        # Whoever read stdout has had enough. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    console.say(_table(summary, rejects))
    if not summary.used:
        raise _nothing_used(summary)
    if json_output:
        console.emit(summary.to_json())


def _convert(source: Source, output: str, rejects: str | None) -> Summary:
    name, evidence, rows = settle_format(source.path, source.format, read_rows(source))
    if evidence:
        console.note(f"{source.path}: format {name} ({evidence})")
    summary = Summary("<stdin>" if source.path == STDIN else source.path, name)
    with ExitStack() as stack:
        refused: _Sink = stack.enter_context(WholeFile(Path(rejects))) if rejects else _Nowhere()
        if output == STDOUT:
            for row in rows:
                _convert_row(row, summary, _Stdout(), refused)
            return summary
        with WholeFile(Path(output)) as file:
            for row in rows:
                _convert_row(row, summary, file, refused)
            file.wanted = summary.used > 0
    return summary


def _convert_row(row: SourceRow, summary: Summary, sink: _Sink, refused: _Sink) -> None:
    summary.rows += 1
    outcome = understand(row.row, summary.format)
    if isinstance(outcome, Record):
        summary.used += 1
        canonical = canonical_row(outcome)
        if not isinstance(row.row, Reject) and isinstance(row.row.get("meta"), dict):
            canonical["meta"] = row.row["meta"]
        sink.write(json.dumps(canonical, ensure_ascii=False, default=str))
        return
    file = location(summary.source, row.part)
    summary.reject(outcome, file, row.line)
    note = {"file": file, "line": row.line, "reason": outcome.reason, "detail": outcome.detail}
    refused.write(json.dumps(note, ensure_ascii=False))


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
        table.add_row(f"{count:,}", f"  {reason}", f"first: {summary.first[reason]}")
    return table


def _nothing_used(summary: Summary) -> DataError:
    if not summary.rows:
        return DataError(f"{summary.source}: no rows")
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in summary.rejected.most_common())
    first = summary.first[summary.rejected.most_common(1)[0][0]]
    return DataError(f"{summary.source}: none of {summary.rows:,} rows can be used: {reasons}", hint=f"first: {first}")

"""Readers of tables: CSV and TSV, Parquet and Arrow.

Cells of CSV and TSV are text, and an empty cell is a missing value; cells of Parquet and Arrow are JSON values.
"""

import csv
import io
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, Self, cast

from dpoctl.data.memory_limit import memory_limit
from dpoctl.data.readers.streams import LONGEST_ROW, TOO_LONG, Line, read_lines, too_long_row
from dpoctl.data.records import Reject, Row
from dpoctl.errors import DataError

DELIMITERS = ",;\t"
PARQUET = "a Parquet file"
ARROW_FILE = "an Arrow file"
ARROW_STREAM = "an Arrow stream"
MAGIC = {b"PAR1": PARQUET, b"ARROW1": ARROW_FILE, b"\xff\xff\xff\xff": ARROW_STREAM}
"""First bytes; `datasets` writes streams into files that end in `.arrow`."""
KIND_OF_SUFFIX = {".parquet": PARQUET, ".arrow": ARROW_FILE}
BATCH = 1024
BATCH_MEMORY, ROW_MEMORY = 1 << 30, 1 << 29
"""The bytes that reading a batch, or a row alone, may take."""


def read_table(file: io.BufferedReader, name: str, delimiter: str | None = None) -> Iterator[Line]:
    """Read the rows of a CSV file; cells in quotes may hold delimiters and line ends.

    Args:
        file: UTF-8, with or without a byte order mark.
        name: The name of the file, for errors.
        delimiter: None for the most frequent one in the header, among comma, semicolon and tab.

    Raises:
        DataError: The file is not UTF-8, a quote is never closed, a cell of several lines is too long, or columns
            share a name.
    """
    csv.field_size_limit(LONGEST_ROW)
    lines = _RowLines(read_lines(file, name), name)
    first = next(lines, "")
    reader = csv.reader(chain([first], lines), delimiter=delimiter or max(DELIMITERS, key=first.count), strict=True)
    line = 1
    try:
        header = _header(next(reader, []), name)
        line = lines.number + 1
        while (cells := lines.next_row(reader)) is not None:
            for number in lines.too_long:
                yield number, too_long_row()
            start, line = max([line, *(number + 1 for number in lines.too_long)]), lines.number + 1
            if cells:
                yield start, _row(header, cells)
        for number in lines.too_long:
            yield number, too_long_row()
    except csv.Error as error:
        if "field limit" in str(error):
            raise DataError(
                f"{name}:{line}:1: a cell of {TOO_LONG}", hint="close the quote that opens there"
            ) from error
        raise DataError(
            f"{name}:{line}:1: not CSV: {error}", hint="close the quote that opens on this line, or escape it"
        ) from error


def arrow_kind(start: bytes) -> str | None:
    """Return the kind of a table by its first bytes; None if they are those of no table."""
    return next((kind for magic, kind in MAGIC.items() if start.startswith(magic)), None)


def read_arrow(path: Path, kind: str) -> Iterator[Line]:
    """Read the rows of a file of such a kind, numbered from 1.

    Raises:
        DataError: The file is broken.
    """
    import pyarrow

    reader = {PARQUET: _parquet, ARROW_FILE: _arrow_file, ARROW_STREAM: _arrow_stream}[kind]
    try:
        yield from rows_of(reader(path), str(path))
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        told = str(error).strip().partition("\n")[0]
        raise DataError(f"{path}: not {kind} that can be read: {told}") from error


def rows_of(batches: Iterable[Any], name: str) -> Iterator[Line]:
    """Turn record batches, or tables, into numbered rows.

    Nulls are dropped at any depth, since Arrow adds them where rows have different keys, and so is NaN in a column, by
    which data frames mark a missing number.

    Raises:
        DataError: A text is not UTF-8.
    """
    number = 0
    for batch in batches:
        try:
            rows = _python_rows(batch)
            is_large = batch.nbytes > LONGEST_ROW
            for number, row in enumerate(rows, start=number + 1):  # noqa: B020 - goes on from the last batch
                if row is None or (is_large and _text_size(row) > LONGEST_ROW):
                    yield number, too_long_row()
                    continue
                try:
                    yield number, _plain({key: value for key, value in row.items() if not _is_nan(value)})
                except OverflowError:
                    yield number, Reject("bad_value", "a number that is not finite")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{name}: rows {number + 1:,} to {number + len(batch):,} hold a text that is not UTF-8"
            ) from error


def _python_rows(batch: Any) -> Iterable[Any]:
    """Return the rows of a batch as Python values; None for one that is too long."""
    try:
        with memory_limit(BATCH_MEMORY):
            return cast("list[Any]", batch.to_pylist())
    except MemoryError:
        # A dictionary of a few long texts may stand for many.
        return (_python_row(batch.slice(number, 1)) for number in range(len(batch)))


def _python_row(row: Any) -> Any:
    try:
        with memory_limit(ROW_MEMORY):
            return row.to_pylist()[0]
    except MemoryError:
        return None


def _text_size(value: Any) -> int:
    if isinstance(value, dict):
        return sum(map(_text_size, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_text_size, value))
    return len(value) if isinstance(value, str | bytes) else 0


class _RowLines:
    """The lines of a table; one that is too long is left out, if a row begins there."""

    def __init__(self, lines: Iterator[str | None], name: str) -> None:
        self._lines, self._name = lines, name
        self._is_at_start = True
        self.number = 0
        """The number of the last line."""
        self.too_long: list[int] = []
        """The lines that were left out before the last row."""

    def next_row(self, reader: Iterator[list[str]]) -> list[str] | None:
        """Return the cells of the next row; None at the end."""
        self._is_at_start, self.too_long = True, []
        return next(reader, None)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        while True:
            line = next(self._lines)
            self.number += 1
            if line is not None:
                self._is_at_start = False
                return line
            if not self._is_at_start or self.number == 1:
                raise DataError(f"{self._name}:{self.number}: a line of {TOO_LONG}")
            self.too_long.append(self.number)


def _header(names: list[str], source: str) -> list[str]:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise DataError(f"{source}:1:1: several columns are named {repeated[0][:80]!r}", hint="rename all but one")
    return names


def _row(header: list[str], cells: list[str]) -> Row | Reject:
    if len(cells) != len(header):
        return Reject("bad_columns", f"{len(cells)} cells where the header has {len(header)}")
    return {name: cell for name, cell in zip(header, cells, strict=True) if cell}


def _plain(value: Any) -> Any:
    """Keep JSON values; others become text."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise OverflowError
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as table:
        done = 0
        try:
            for batch in _within_memory(table.iter_batches(BATCH), BATCH_MEMORY):
                yield batch
                done += len(batch)
        except _MoreMemoryError:
            # A dictionary of a few long texts may stand for many: read row by row.
            try:
                yield from _within_memory(islice(table.iter_batches(1), done, None), ROW_MEMORY)
            except _MoreMemoryError:
                raise DataError(f"{path}: a row of more than {ROW_MEMORY >> 20} MiB") from None


class _MoreMemoryError(Exception):
    """Reading takes more memory than it may."""


def _within_memory(batches: Iterable[Any], room: int) -> Iterator[Any]:
    iterator = iter(batches)
    while True:
        try:
            with memory_limit(room):
                batch = next(iterator, None)
        except MemoryError as error:
            raise _MoreMemoryError from error
        if batch is None:
            return
        yield batch


def _arrow_file(path: Path) -> Iterator[Any]:
    import pyarrow

    with pyarrow.memory_map(str(path)) as source, pyarrow.ipc.open_file(source) as table:
        for number in range(table.num_record_batches):
            yield from _slices(table.get_batch(number))


def _arrow_stream(path: Path) -> Iterator[Any]:
    import pyarrow

    with pyarrow.memory_map(str(path)) as source, pyarrow.ipc.open_stream(source) as table:
        for batch in table:
            yield from _slices(batch)


def _slices(batch: Any) -> Iterator[Any]:
    return (batch.slice(start, BATCH) for start in range(0, len(batch), BATCH))

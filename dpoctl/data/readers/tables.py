"""CSV and TSV to rows: cells are text, and an empty cell is a missing value."""

import csv
import io
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import chain

from dpoctl.data.readers.lines import Line, read_lines
from dpoctl.data.records import Reject, Row
from dpoctl.errors import DataError

DELIMITERS = ",;\t"


def read_table(file: io.BufferedReader, name: str, delimiter: str | None = None) -> Iterator[Line]:
    """Read rows; cells in quotes may hold delimiters and line ends.

    Args:
        file: UTF-8, with or without a byte order mark.
        name: What errors call the file.
        delimiter: None for the one that the header has most of, among comma, semicolon and tab.

    Raises:
        DataError: It is not UTF-8, a quote is never closed, or columns share a name.
    """
    csv.field_size_limit(sys.maxsize)
    lines = read_lines(file, name)
    first = next(lines, "")
    reader = csv.reader(chain([first], lines), delimiter=delimiter or max(DELIMITERS, key=first.count), strict=True)
    line = 1
    try:
        header = _header(next(reader, []), name)
        line = reader.line_num + 1
        for cells in reader:
            start, line = line, reader.line_num + 1
            if cells:
                yield start, _row(header, cells)
    except csv.Error as error:
        raise DataError(
            f"{name}:{line}:1: not CSV: {error}", hint="a quote opens on this line that nothing closes, or closes early"
        ) from error


def _header(names: list[str], source: str) -> list[str]:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise DataError(f"{source}:1:1: the column {repeated[0][:80]!r} is there more than once", hint="rename one")
    return names


def _row(header: list[str], cells: list[str]) -> Row | Reject:
    if len(cells) != len(header):
        return Reject("bad_columns", f"{len(cells)} cells where the header has {len(header)}")
    return {name: cell for name, cell in zip(header, cells, strict=True) if cell}

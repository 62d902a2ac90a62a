"""Files to rows: JSON, CSV, Parquet and Arrow, compressed or not, each row with the line it starts on.

What breaks a file (bad JSON, bad UTF-8, a stream that is cut) is a `DataError` with file and line. What breaks one row
(a lone surrogate, NaN, a repeated key) is yielded as a `Reject` in its place. What a file holds is told by its first
bytes; its name decides only between kinds of text.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from dpoctl.data.readers import arrow
from dpoctl.data.readers.json_rows import read_json
from dpoctl.data.readers.lines import Line, read_lines
from dpoctl.data.readers.streams import CHUNK, look_at, unpack
from dpoctl.data.readers.streams import SUFFIXES as COMPRESSED
from dpoctl.data.readers.tables import read_table
from dpoctl.errors import DataError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
"""What the name of a data file ends in, before the suffix of its compression."""

__all__ = ["COMPRESSED", "SUFFIXES", "Line", "read_file", "read_stream", "read_text", "suffix_of"]


def suffix_of(path: Path) -> str:
    """Find the suffix that says what a file holds: `.json` of `rows.json.gz`."""
    inner = Path(path.stem) if path.suffix.lower() in COMPRESSED else path
    return inner.suffix.lower()


def read_file(path: Path) -> Iterator[Line]:
    """Read the rows of a file.

    Raises:
        DataError: The file cannot be read, or is not what it seems to be.
        SetupError: It needs a library that is not installed.
    """
    try:
        with path.open("rb", buffering=CHUNK) as file:
            kind = arrow.kind_of(look_at(file))
            if kind is not None:
                yield from arrow.read_file(path, kind)
            else:
                yield from read_stream(file, str(path), suffix_of(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_stream(stream: BinaryIO, name: str, suffix: str = ".jsonl") -> Iterator[Line]:
    """Read rows from an open binary stream of text, compressed or not.

    Raises:
        DataError: The content is not what the suffix says.
        SetupError: It needs a library that is not installed.
    """
    file = unpack(stream, name)
    if (kind := arrow.kind_of(look_at(file))) is not None:
        raise DataError(f"{name}: {kind} in a stream", hint="name the file itself, uncompressed")
    if suffix in (".parquet", ".arrow"):
        raise DataError(f"{name}: not {arrow.KIND_OF_SUFFIX[suffix]}, though its name ends in {suffix}")
    if suffix in (".csv", ".tsv"):
        yield from read_table(file, name, "\t" if suffix == ".tsv" else None)
    else:
        yield from read_json(file, name, suffix)


def read_text(path: Path) -> Iterator[str]:
    """Read the lines of a text file, compressed or not.

    Raises:
        DataError: The file cannot be read, or is not text.
        SetupError: It needs a library that is not installed.
    """
    try:
        with path.open("rb") as file:
            yield from read_lines(unpack(file, str(path)), str(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error

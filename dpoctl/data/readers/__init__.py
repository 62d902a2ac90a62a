"""Readers of files: JSON, CSV, Parquet and Arrow, compressed or not, become rows with their line numbers.

A broken file (bad JSON, bad UTF-8, truncated compression) is a `DataError` with file and line. A broken row (a lone
surrogate, NaN, a repeated key) is yielded as a `Reject` in its place. The first bytes of a file tell its kind; its name
decides only between kinds of text.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from dpoctl.data.readers import tables
from dpoctl.data.readers.json_lines import read_json
from dpoctl.data.readers.streams import CHUNK, TOO_LONG, Line, look_at, read_lines, unpack
from dpoctl.data.readers.streams import SUFFIXES as COMPRESSED
from dpoctl.data.readers.tables import read_table
from dpoctl.errors import DataError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
"""Suffixes of data files, before that of their compression."""


def suffix_of(path: Path) -> str:
    """Return the suffix of the content of a file: `.json` for `rows.json.gz`."""
    inner = Path(path.stem) if path.suffix.lower() in COMPRESSED else path
    return inner.suffix.lower()


def read_file(path: Path) -> Iterator[Line]:
    """Read the rows of a file.

    Raises:
        DataError: The file cannot be read, or its content is not what its name says.
        SetupError: The file needs a library that is not installed.
    """
    try:
        with path.open("rb", buffering=CHUNK) as file:
            kind = tables.arrow_kind(look_at(file))
            if kind is not None:
                yield from tables.read_arrow(path, kind)
            else:
                yield from read_stream(file, str(path), suffix_of(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_stream(stream: BinaryIO, name: str, suffix: str = ".jsonl") -> Iterator[Line]:
    """Read rows from an open binary stream of text, compressed or not.

    Raises:
        DataError: The content is not what the suffix says.
        SetupError: The content needs a library that is not installed.
    """
    file = unpack(stream, name)
    if (kind := tables.arrow_kind(look_at(file))) is not None:
        raise DataError(f"{name}: {kind} cannot be read as a stream", hint="name the file itself, uncompressed")
    if suffix in (".parquet", ".arrow"):
        raise DataError(f"{name}: not {tables.KIND_OF_SUFFIX[suffix]}, though its name ends in {suffix}")
    if suffix in (".csv", ".tsv"):
        yield from read_table(file, name, "\t" if suffix == ".tsv" else None)
    else:
        yield from read_json(file, name, suffix)


def read_text(path: Path) -> Iterator[str]:
    """Read the lines of a text file, compressed or not.

    Raises:
        DataError: The file cannot be read, or is not text.
        SetupError: The file needs a library that is not installed.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(read_lines(unpack(file, str(path)), str(path)), start=1):
                if line is None:
                    raise DataError(f"{path}:{number}: a line of {TOO_LONG}")
                yield line
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error

"""Files to rows: JSON lines, JSON, CSV and Parquet, compressed or not, each row with the line it starts on.

What breaks a file (bad JSON, bad UTF-8) is a `DataError` with file, line and column. What breaks one row
(a lone surrogate, NaN, a repeated key) is yielded as a `Reject` in its place.
"""

import csv
import gzip
import io
import json
import math
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from dpoctl.data.records import Reject, Row
from dpoctl.errors import DataError

Line = tuple[int, Row | Reject]
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
PARQUET_BATCH = 1024
LFS_POINTER = b"version https://git-lfs"


def suffix_of(path: Path) -> str:
    """Find the suffix that says what a file holds: `.json` of `rows.json.gz`."""
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def read_file(path: Path) -> Iterator[Line]:
    """Read the rows of a file, by its suffix and by what its first bytes say.

    Raises:
        DataError: The file cannot be read, or is not what its suffix says.
    """
    try:
        if suffix_of(path) == ".parquet":
            yield from _read_parquet(path)
        else:
            with path.open("rb") as file:
                yield from read_stream(file, str(path), suffix_of(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_stream(stream: BinaryIO, name: str, suffix: str = ".jsonl") -> Iterator[Line]:
    """Read rows from an open binary stream, compressed or not.

    Raises:
        DataError: The content is not what the suffix says.
    """
    try:
        yield from _read_stream(stream, name, suffix)
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 text ({error.reason})", hint="save the file as UTF-8") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{name}: broken gzip file: {error}") from error


def _read_stream(file: BinaryIO, name: str, suffix: str) -> Iterator[Line]:
    if _peek(file, 2)[:2] == b"\x1f\x8b":
        file = io.BufferedReader(gzip.GzipFile(fileobj=file))
    start = _peek(file, 4096)
    if start.startswith(LFS_POINTER):
        raise DataError(f"{name}:1:1: a Git LFS pointer, not the data", hint="run `git lfs pull`")
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{name}: UTF-16 text", hint="save the file as UTF-8")
    if suffix in (".csv", ".tsv"):
        yield from _read_csv(file, name, "\t" if suffix == ".tsv" else ",")
        return
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"[") or (suffix == ".json" and text.startswith(b"{")):
        yield from _read_json(file.read().decode("utf-8-sig"), name)
    else:
        yield from _read_lines(file, name)


def _peek(file: BinaryIO, count: int) -> bytes:
    if isinstance(file, io.BufferedReader):
        return file.peek(count)
    start = file.tell()
    content = file.read(count)
    file.seek(start)
    return content


def _text_lines(file: BinaryIO, name: str) -> Iterator[str]:
    # A binary file is split at \n only; U+2028 and its like may stand inside a row.
    for number, line in enumerate(file, start=1):
        content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        try:
            yield content.decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{name}:{number}:{error.start + 1}: not UTF-8 text", hint="save the file as UTF-8"
            ) from error


def _read_lines(file: BinaryIO, name: str) -> Iterator[Line]:
    for number, text in enumerate(_text_lines(file, name), start=1):
        start = _skip_blanks(text, 0)
        if start == len(text):
            continue
        try:
            value, end = _decode(text, start)
            end = _skip_blanks(text, end)
            if end < len(text):
                raise json.JSONDecodeError("more than one value on the line", text, end)
        except json.JSONDecodeError as error:
            _bad_json(name, number, error.colno, error.msg)
        yield number, _as_row(value)


def _read_json(text: str, name: str) -> Iterator[Line]:
    """Read a JSON array of rows, `{"data": [rows]}`, or JSON lines in a file named `.json`."""
    try:
        start = _array_start(text)
        if start is None:
            yield from _read_lines(io.BytesIO(text.encode()), name)
            return
        yield from _elements(text, start)
    except json.JSONDecodeError as error:
        _bad_json(name, error.lineno, error.colno, error.msg)


def _array_start(text: str) -> int | None:
    """Find the position after the `[` of the rows, or None where the file holds JSON lines."""
    position = _skip_blanks(text, 0)
    if text[position] == "[":
        return position + 1
    position += 1
    while (position := _skip_blanks(text, position)) < len(text) and text[position] == '"':
        key, position = _decode(text, position)
        position = _skip_blanks(text, _expect(text, position, ":"))
        if key == "data" and text[position : position + 1] == "[":
            return position + 1
        _, position = _decode(text, position)
        position = _skip_blanks(text, position)
        if text[position : position + 1] != ",":
            return None
        position += 1
    return None


def _elements(text: str, position: int) -> Iterator[Line]:
    line, counted = 1, 0
    position = _skip_blanks(text, position)
    while text[position : position + 1] != "]":
        line += text.count("\n", counted, position)
        counted = position
        value, position = _decode(text, position)
        yield line, _as_row(value)
        position = _skip_blanks(text, position)
        if text[position : position + 1] == "]":
            return
        position = _skip_blanks(text, _expect(text, position, ","))


def _expect(text: str, position: int, character: str) -> int:
    position = _skip_blanks(text, position)
    if text[position : position + 1] != character:
        raise json.JSONDecodeError(f"expected {character!r}", text, position)
    return position + 1


def _skip_blanks(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _decode(text: str, position: int) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, position)
    except RecursionError as error:
        raise json.JSONDecodeError("nested too deeply", text, position) from error


def _bad_json(name: str, line: int, column: int, problem: str) -> NoReturn:
    raise DataError(f"{name}:{line}:{column}: not JSON: {problem[:1].lower()}{problem[1:]}") from None


def _as_row(value: Any) -> Row | Reject:
    if not isinstance(value, dict):
        return Reject("not_an_object", "the row is not a JSON object")
    if problem := value.pop(_PROBLEM, None):
        return Reject("bad_value", problem)
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return Reject("lone_surrogate", "half of a UTF-16 pair, which is not a character")
    return value


class _Flawed(dict[str, Any]):
    """An object that stands for a row with a flaw in it, found while parsing."""


_PROBLEM = "\0problem"


def _object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        return _Flawed({_PROBLEM: f"the key {repeated!r} is repeated"})
    for value in row.values():
        if (flaw := _flaw(value)) is not None:
            return _Flawed({_PROBLEM: flaw})
    return row


def _flaw(value: Any) -> str | None:
    if isinstance(value, float) and not math.isfinite(value):
        return "a number that is not finite"
    if isinstance(value, _Flawed):
        return str(value[_PROBLEM])
    if isinstance(value, list):
        return next((flaw for item in value if (flaw := _flaw(item)) is not None), None)
    return None


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _read_csv(file: BinaryIO, name: str, delimiter: str) -> Iterator[Line]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(_text_lines(file, name), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        line = reader.line_num + 1
        for cells in reader:
            start, line = line, reader.line_num + 1
            if not cells:
                continue
            if len(cells) != len(header):
                yield start, Reject("bad_columns", f"{len(cells)} cells where the header has {len(header)}")
            else:
                yield start, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{name}:{reader.line_num}:1: not CSV: {error}") from error


def _read_parquet(path: Path) -> Iterator[Line]:
    import pyarrow
    import pyarrow.parquet

    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise DataError(f"{path}:1:1: a Git LFS pointer, not the data", hint="run `git lfs pull`")
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(PARQUET_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a Parquet file that can be read: {error}") from error

"""Parquet and Arrow to rows of JSON values."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dpoctl.data.readers.lines import Line
from dpoctl.data.records import Reject
from dpoctl.errors import DataError

PARQUET = "a Parquet file"
ARROW_FILE = "an Arrow file"
ARROW_STREAM = "an Arrow stream"
MAGIC = {b"PAR1": PARQUET, b"ARROW1": ARROW_FILE, b"\xff\xff\xff\xff": ARROW_STREAM}
"""First bytes; `datasets` writes streams into files that end in `.arrow`."""

KIND_OF_SUFFIX = {".parquet": PARQUET, ".arrow": ARROW_FILE}
BATCH = 1024


def kind_of(start: bytes) -> str | None:
    """Tell a table by its first bytes."""
    return next((kind for magic, kind in MAGIC.items() if start.startswith(magic)), None)


def read_file(path: Path, kind: str) -> Iterator[Line]:
    """Read the rows of a file of one of the kinds; they are counted from 1.

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
        raise DataError(f"{path}: not {kind} that can be read: {_first_line(error)}") from error


def rows_of(batches: Iterable[Any], name: str) -> Iterator[Line]:
    """Turn record batches, or tables, into rows.

    Nulls vanish at any depth, for Arrow fills them in where rows differ, and so does a column's NaN, which is how
    data frames write a missing number.

    Raises:
        DataError: A text is not UTF-8.
    """
    number = 0
    for batch in batches:
        try:
            rows = batch.to_pylist()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{name}: rows {number + 1:,} to {number + len(batch):,}: a text that is not UTF-8"
            ) from error
        for number, row in enumerate(rows, start=number + 1):  # noqa: B020 - goes on from the last batch
            try:
                yield number, _plain({key: value for key, value in row.items() if not _is_nan(value)})
            except OverflowError:
                yield number, Reject("bad_value", "a number that is not finite")


def _plain(value: Any) -> Any:
    """Keep what JSON knows; what it does not becomes text."""
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
        yield from table.iter_batches(BATCH)


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


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]

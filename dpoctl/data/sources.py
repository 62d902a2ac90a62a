"""Where rows come from: files, folders saved by `datasets`, hub ids, built-in sources, stdin."""

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dpoctl.data import demo
from dpoctl.data.folders import data_files, is_saved, load_saved
from dpoctl.data.hub import load_hub
from dpoctl.data.readers import SUFFIXES, Line, read_file, read_stream, suffix_of
from dpoctl.data.readers.arrow import BATCH, rows_of
from dpoctl.data.records import Reject, Row
from dpoctl.errors import DataError

if TYPE_CHECKING:
    from dpoctl.recipe.schema_data import DataSection, Source

STDIN = "-"
PARTICULAR = {"name": None, "split": "train", "revision": None, "data_files": None}
"""Keys that only some kinds of sources have a use for, and the values that ask for nothing."""


class Kind(NamedTuple):
    """A kind of source, and which of the particular keys it has a use for."""

    name: str
    uses: tuple[str, ...] = ()


PIPE = Kind("stdin")
BUILT_IN = Kind("a built-in source", ("split",))
SAVED = Kind("a folder saved by datasets", ("split",))
FOLDER = Kind("a folder of files", ("data_files",))
FILE = Kind("a file")
HUB = Kind("a hub data set", tuple(PARTICULAR))


class SourceRow(NamedTuple):
    """A raw row, or why there is none, and where it stands."""

    part: str
    """Which file of a folder; empty where the source is not a folder of files."""
    line: int
    row: Row | Reject


def read_rows(source: "Source", *, method: str = "dpo") -> Iterator[SourceRow]:
    """Read the rows of a source, with its columns renamed as the source asks.

    Args:
        source: Where to read; `-` is JSON lines on stdin.
        method: `sft` or `dpo`: which kind of rows a built-in source gives.

    Raises:
        DataError: There is no such file, folder or split, or it is not what it should be; or a key of the source
            would do nothing.
        SetupError: The hub cannot be reached.
    """
    _refuse_idle_keys(source)
    for part, lines in _open(source, method):
        for line, row in lines:
            yield SourceRow(part, line, row if isinstance(row, Reject) else _renamed(row, source.column_map))


def fingerprint(source: "Source", *, method: str = "dpo") -> str:
    """Hash the content of a source: same rows, same hash, wherever the file lies.

    Raises:
        DataError: There is no such file or folder.
        SetupError: The hub cannot be reached.
    """
    _refuse_idle_keys(source)
    kind = kind_of(source.path)
    if kind == BUILT_IN:
        return f"{source.path}:{source.split}:{method}:{demo.VERSION}"
    if kind == SAVED:
        files = sorted(file for file in Path(source.path).rglob("*") if file.is_file())
        return f"{_hash_files(files)}:{source.split}"
    if kind != HUB:
        return _hash_files([file for _, file in _files(source)])
    dataset = load_hub(source)
    sums = dataset.info.download_checksums
    content = sorted(sums) if sums and not source.data_files else dataset._fingerprint
    return hashlib.sha256(json.dumps([content, source.name, source.split]).encode()).hexdigest()


def has_splits(source_path: str) -> bool:
    """Whether a source is read by split."""
    return "split" in kind_of(source_path).uses


def reads_once(source_path: str) -> bool:
    """Whether a source is a pipe, whose rows are gone once they are read."""
    return source_path == STDIN or Path(source_path).is_fifo()


def location(source_path: str, part: str) -> str:
    """Name the file that a row stands in, as the user would."""
    return str(Path(source_path) / part) if part else source_path


def kind_of(source_path: str) -> Kind:
    """Say what kind of source a path names.

    Raises:
        DataError: It is no path that a file system could know.
    """
    path = Path(source_path)
    if source_path == STDIN:
        return PIPE
    if source_path.startswith(demo.PREFIX):
        return BUILT_IN
    try:
        if path.is_dir():
            return SAVED if is_saved(path) else FOLDER
        is_file = path.exists() or path.is_symlink() or suffix_of(path) in SUFFIXES
    except OSError as error:
        raise DataError(f"{source_path[:80]}: cannot be read: {error.strerror or error}") from error
    if is_file and "\0" in source_path:
        raise DataError(f"{source_path}: no path has such a character")
    if path.is_char_device() or path.is_block_device():
        raise DataError(f"{source_path}: a device, not a file")
    return FILE if is_file else HUB


def refuse_missing(data: "DataSection") -> None:
    """See that the files of a recipe are there; cheap enough to ask before anything heavy is imported.

    Raises:
        DataError: One is not.
    """
    for source in (source for sources in (data.train, *data.eval.values()) for source in sources):
        if kind_of(source.path) == FILE and not Path(source.path).exists():
            raise DataError(
                f"{source.path}: cannot be read: No such file or directory", hint="look at data.train and data.eval"
            )


def _refuse_idle_keys(source: "Source") -> None:
    kind = kind_of(source.path)
    idle = [key for key, nothing in PARTICULAR.items() if key not in kind.uses and getattr(source, key) != nothing]
    if idle:
        raise DataError(f"{source.path}: {idle[0]} would do nothing: this is {kind.name}", hint=f"leave {idle[0]} out")


def _open(source: "Source", method: str) -> Iterator[tuple[str, Iterator[Line]]]:
    kind = kind_of(source.path)
    if kind == PIPE:
        yield "", read_stream(sys.stdin.buffer, "<stdin>")
    elif kind == BUILT_IN:
        yield "", demo.read_rows(source.path, source.split, method)
    elif kind in (FILE, FOLDER):
        for part, file in _files(source):
            yield part, read_file(file)
    else:
        dataset = load_hub(source) if kind == HUB else load_saved(Path(source.path), source.split)
        yield "", rows_of(dataset.with_format("arrow").iter(BATCH), source.path)


def _files(source: "Source") -> list[tuple[str, Path]]:
    path = Path(source.path)
    if not path.is_dir():
        return [("", path)]
    return [(part, path / part) for part in source.data_files or data_files(path)]


def _renamed(row: Row, column_map: dict[str, str]) -> Row | Reject:
    row = {key: value for key, value in row.items() if value is not None}
    missing = [column for column in column_map.values() if column not in row]
    if missing:
        return Reject("missing_column", f"column_map names {missing[0]!r}; the row has {', '.join(sorted(row))}")
    taken = set(column_map.values())
    kept = {key: value for key, value in row.items() if key not in taken}
    return kept | {canonical: row[column] for canonical, column in column_map.items()}


def _hash_files(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        if path.is_fifo():
            raise DataError(f"{path}: a pipe can be read only once", hint="save it to a file")
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()

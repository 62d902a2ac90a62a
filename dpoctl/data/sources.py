"""Where rows come from: files, folders saved by `datasets`, hub ids, built-in sources, stdin."""

import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dpoctl.data import demo
from dpoctl.data.conversation import without_nulls
from dpoctl.data.readers import SUFFIXES, Line, read_file, read_stream, suffix_of
from dpoctl.data.records import Reject, Row
from dpoctl.errors import DataError, SetupError

if TYPE_CHECKING:
    from dpoctl.recipe.schema import Source

STDIN = "-"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
PARTICULAR = {"name": None, "split": "train", "revision": None, "data_files": None}
"""Keys that only some kinds of sources have a use for, and the values that ask for nothing."""
SAVED = ("dataset_info.json", "dataset_dict.json")
"""Files that `save_to_disk` writes into the folder of a data set, or of a mapping of them."""


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
    path = Path(source.path)
    if source.path.startswith(demo.PREFIX):
        return f"{source.path}:{source.split}:{method}:{demo.VERSION}"
    if _is_saved_dataset(path):
        return _hash_files(sorted(file for file in path.rglob("*") if file.is_file())) + f":{source.split}"
    if path.exists() or suffix_of(path) in SUFFIXES:
        return _hash_files([file for _, file in _files(source)])
    dataset = _load_hub(source)
    sums = dataset.info.download_checksums
    content = sorted(sums) if sums and not source.data_files else dataset._fingerprint
    return hashlib.sha256(json.dumps([content, source.name, source.split]).encode()).hexdigest()


def has_splits(source_path: str) -> bool:
    """Whether a source is read by split."""
    return "split" in _kind(source_path)[1]


def location(source_path: str, part: str) -> str:
    """Name the file that a row stands in, as the user would."""
    return str(Path(source_path) / part) if part else source_path


def _kind(source_path: str) -> tuple[str, tuple[str, ...]]:
    """Say what kind of source a path names, and which of the particular keys it has a use for."""
    path = Path(source_path)
    if source_path == STDIN:
        return "stdin", ()
    if source_path.startswith(demo.PREFIX):
        return "a built-in source", ("split",)
    if _is_saved_dataset(path):
        return "a folder saved by datasets", ("split",)
    if path.is_dir():
        return "a folder of files", ("data_files",)
    if path.exists() or suffix_of(path) in SUFFIXES:
        return "a file", ()
    return "a hub data set", tuple(PARTICULAR)


def _refuse_idle_keys(source: "Source") -> None:
    kind, used = _kind(source.path)
    idle = [key for key, nothing in PARTICULAR.items() if key not in used and getattr(source, key) != nothing]
    if idle:
        raise DataError(f"{source.path}: {idle[0]} would do nothing: this is {kind}", hint=f"leave {idle[0]} out")


def _open(source: "Source", method: str) -> Iterator[tuple[str, Iterator[Line]]]:
    path = Path(source.path)
    if source.path == STDIN:
        yield "", read_stream(sys.stdin.buffer, "<stdin>")
    elif source.path.startswith(demo.PREFIX):
        yield "", demo.read_rows(source.path, source.split, method)
    elif _is_saved_dataset(path):
        yield "", _number(_load_saved(path, source.split))
    elif path.exists() or suffix_of(path) in SUFFIXES:
        for part, file in _files(source):
            yield part, read_file(file)
    else:
        yield "", _number(_load_hub(source))


def _files(source: "Source") -> list[tuple[str, Path]]:
    path = Path(source.path)
    if not path.is_dir():
        return [("", path)]
    parts = source.data_files or sorted(file.name for file in path.iterdir() if suffix_of(file) in SUFFIXES)
    if not parts:
        raise DataError(f"{path}: no data files in this folder", hint=f"data files end in {', '.join(SUFFIXES)}")
    return [(part, path / part) for part in parts]


def _renamed(row: Row, column_map: dict[str, str]) -> Row | Reject:
    row = {key: value for key, value in row.items() if value is not None}
    missing = [column for column in column_map.values() if column not in row]
    if missing:
        return Reject("missing_column", f"column_map names {missing[0]!r}; the row has {', '.join(sorted(row))}")
    taken = set(column_map.values())
    kept = {key: value for key, value in row.items() if key not in taken}
    return kept | {canonical: row[column] for canonical, column in column_map.items()}


def _number(rows: Any) -> Iterator[Line]:
    for number, row in enumerate(rows, start=1):
        yield number, without_nulls(row)


def _is_saved_dataset(path: Path) -> bool:
    return path.is_dir() and any((path / name).is_file() for name in SAVED)


def _hash_files(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def _load_saved(path: Path, split: str) -> Any:
    import datasets

    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever Arrow or the file system makes of a damaged folder
        raise DataError(f"{path}: not a folder saved by datasets that can be read: {error}") from error
    if not isinstance(dataset, dict):
        return dataset
    if split not in dataset:
        raise DataError(f"{path}: no split {split!r}", hint=f"splits are {', '.join(dataset)}")
    return dataset[split]


def _load_hub(source: "Source") -> Any:
    if not HUB_ID.fullmatch(source.path):
        raise DataError(f"{source.path}: no such file or folder")
    import datasets

    try:
        return datasets.load_dataset(
            source.path, source.name, split=source.split, revision=source.revision, data_files=source.data_files
        )
    except (ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        raise SetupError(
            f"hub data set {source.path!r} cannot be reached: {_first_line(error)}",
            hint="check the name and the network, or save it to a folder and name that",
        ) from error
    except RuntimeError as error:
        hint = "set revision: refs/convert/parquet" if "scripts are no longer supported" in str(error) else None
        raise DataError(f"hub data set {source.path!r}: {_first_line(error)}", hint=hint) from error
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"hub data set {source.path!r}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]

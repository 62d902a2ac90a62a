"""Sources of rows: files, folders of files, data sets saved by `datasets`, hub ids, built-in sources, stdin."""

import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dpoctl import console
from dpoctl.data import demo
from dpoctl.data.readers import SUFFIXES, read_file, read_stream, suffix_of
from dpoctl.data.readers.streams import LFS_POINTER, Line
from dpoctl.data.readers.tables import BATCH, rows_of
from dpoctl.data.records import Reject, Row
from dpoctl.errors import DataError, SetupError, UserError
from dpoctl.hub import hub_is_reachable

if TYPE_CHECKING:
    from dpoctl.recipe.data_section import Source

STDIN = "-"
PARTICULAR = {"name": None, "split": "train", "revision": None, "data_files": None}
"""Keys that only some kinds of sources use, and their defaults."""
ABOUT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files that `datasets` writes beside the rows."""
OF_SAVED = ("dataset_dict.json", "state.json")
"""Files that `save_to_disk` writes, and by which its folders are known."""
OF_A_MODEL = ("adapter_config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
UNREACHABLE = ("ConnectionError", "DatasetNotFoundError", "OfflineModeIsEnabled", "LocalEntryNotFoundError")
"""Errors of `datasets`, of the hub's client and of Python for a data set that is missing or cannot be reached."""


class Kind(NamedTuple):
    """A kind of source, and the particular keys that it uses."""

    name: str
    uses: tuple[str, ...] = ()


PIPE = Kind("stdin")
BUILT_IN = Kind("a built-in source", ("split",))
SAVED = Kind("a folder saved by datasets", ("split",))
FOLDER = Kind("a folder of files", ("data_files",))
FILE = Kind("a file")
HUB = Kind("a hub data set", tuple(PARTICULAR))


class SourceRow(NamedTuple):
    """A raw row or its rejection, and its place."""

    part: str
    """The file in the folder; empty where the source is not a folder of files."""
    line: int
    row: Row | Reject


def read_rows(source: "Source", *, method: str = "dpo") -> Iterator[SourceRow]:
    """Read the rows of a source, with its columns renamed by its `column_map`.

    Args:
        source: The source; `-` is JSON lines on stdin.
        method: `sft` or `dpo`, the kind of rows that a built-in source gives.

    Raises:
        DataError: There is no such file, folder or split, it cannot be read, or a key of the source would do nothing.
        SetupError: The hub cannot be reached.
    """
    _refuse_unused_keys(source)
    for part, lines in _open(source, method):
        for line, row in lines:
            yield SourceRow(part, line, row if isinstance(row, Reject) else _renamed(row, source.column_map))


def fingerprint(source: "Source", *, method: str = "dpo") -> str:
    """Hash the content of a source: the same rows have the same hash, whatever the path.

    Raises:
        DataError: There is no such file or folder.
        SetupError: The hub cannot be reached.
    """
    _refuse_unused_keys(source)
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
    """Return whether a source is read by split."""
    return "split" in kind_of(source_path).uses


def reads_once(source_path: str) -> bool:
    """Return whether a source is a pipe, whose rows can be read only once."""
    return source_path == STDIN or Path(source_path).is_fifo()


def location(source_path: str, part: str) -> str:
    """Name the file that holds a row, as the user would."""
    return str(Path(source_path) / part) if part else source_path


def kind_of(source_path: str) -> Kind:
    """Return the kind of source that a path names.

    Raises:
        DataError: The path is not valid, or is that of a device.
    """
    path = Path(source_path)
    if source_path == STDIN:
        return PIPE
    if source_path.startswith(demo.PREFIX):
        return BUILT_IN
    try:
        if path.is_dir():
            return SAVED if any((path / name).is_file() for name in OF_SAVED) else FOLDER
        is_file = path.exists() or path.is_symlink() or suffix_of(path) in SUFFIXES
    except OSError as error:
        raise DataError(f"{source_path[:80]}: cannot be read: {error.strerror or error}") from error
    if is_file and "\0" in source_path:
        raise DataError(f"{source_path}: a path cannot hold a null character")
    if path.is_char_device() or path.is_block_device():
        raise DataError(f"{source_path}: a device, not a file")
    return FILE if is_file else HUB


def data_files(folder: Path) -> list[str]:
    """List the data files of a folder, by name.

    Raises:
        DataError: There are none, or it is the folder of a model.
    """
    if of_a_model := next((name for name in OF_A_MODEL if (folder / name).is_file()), None):
        raise DataError(f"{folder}: a model's folder, not data: it holds {of_a_model}")
    try:
        found = sorted(path.name for path in folder.iterdir() if _is_data(path))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror or error}") from error
    if not found:
        raise DataError(f"{folder}: no data files in this folder", hint=_where_data_is(folder))
    return found


def load_saved(folder: Path, split: str) -> Any:
    """Load a split of a folder that `save_to_disk` wrote.

    Raises:
        DataError: The folder is damaged, or has no such split.
    """
    import datasets

    for path in folder.rglob("*.arrow"):
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise DataError(f"{path}: a Git LFS pointer, not the data", hint="run `git lfs pull`")
    try:
        dataset = datasets.load_from_disk(str(folder))
    except Exception as error:  # Arrow and the file system raise many kinds for a damaged folder
        told = str(error).strip().partition("\n")[0]
        raise DataError(f"{folder}: not a folder saved by datasets that can be read: {told}") from error
    if not isinstance(dataset, dict):
        return dataset
    if split not in dataset:
        raise DataError(f"{folder}: no split {split!r}", hint=f"splits are {', '.join(dataset)}")
    return dataset[split]


def load_hub(source: "Source") -> Any:
    """Load a split of a hub data set, from the cache if the hub cannot be reached.

    Raises:
        DataError: The path is not a hub id, or the data set cannot be read.
        SetupError: The hub cannot be reached, and the data set is not in the cache.
    """
    if not HUB_ID.fullmatch(source.path):
        several = f"several sources are a list: [{source.path.replace(',', ', ')}]" if "," in source.path else None
        raise DataError(f"{source.path}: no such file or folder in {Path.cwd()}", hint=several)
    import datasets

    offline = not hub_is_reachable()
    if offline:
        # The library would try several times, with pauses, before it reads its cache.
        datasets.config.HF_HUB_OFFLINE = True
    try:
        dataset = datasets.load_dataset(
            source.path, source.name, split=source.split, revision=source.revision, data_files=source.data_files
        )
    except Exception as error:  # the network, the cache and foreign files raise many kinds
        raise _hub_error(source.path, error) from error
    if offline and source.revision is not None:
        console.warn(
            f"hub data set {source.path!r}: the hub cannot be reached, and the cached copy may not be of "
            f"revision {source.revision!r}"
        )
    return dataset


def _refuse_unused_keys(source: "Source") -> None:
    kind = kind_of(source.path)
    unused = [key for key, default in PARTICULAR.items() if key not in kind.uses and getattr(source, key) != default]
    if unused:
        key = unused[0]
        raise DataError(f"{source.path}: {key} would do nothing: this is {kind.name}", hint=f"leave {key} out")


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
            with path.open("rb") as file, console.WorkProgress(f"hashing {path}"):
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def _is_data(path: Path) -> bool:
    return suffix_of(path) in SUFFIXES and path.name not in ABOUT_DATA and not path.name.startswith(".")


def _where_data_is(folder: Path) -> str:
    inner = sorted({path.parent for path in folder.glob("*/*") if _is_data(path)})
    if inner:
        return f"there are some in {inner[0]}; name that folder"
    if any(folder.glob("*.py")):
        return "scripts are not run; export the rows, or name the hub id with revision: refs/convert/parquet"
    return f"data files end in {', '.join(SUFFIXES)}"


def _hub_error(path: str, error: Exception) -> UserError:
    told = str(error).strip().partition("\n")[0] or type(error).__name__
    if type(error).__name__ in UNREACHABLE or type(error).__module__.startswith("http"):
        return SetupError(
            f"hub data set {path!r} cannot be reached, and no local file has that name: {told}",
            hint="check the name and the network (`hf auth login` for a gated one), or name a folder that holds it",
        )
    hint = None
    if "scripts are no longer supported" in str(error):
        hint = "`datasets` no longer runs the script of this data set; set revision: refs/convert/parquet"
    return DataError(f"hub data set {path!r}: {told}", hint=hint)

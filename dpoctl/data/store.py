"""The token store: records tokenized once, memory-mapped, found again by a key, complete or absent.

A folder holds `ids.bin` and `scored.bin` (each record's shared prefix, then its suffixes), one `.npy` a column of the
index, `records.jsonl` (the texts), `rejects.jsonl`, `report.json`, and `store.json`, which is written last and holds
size and checksum of every other file.
"""

import errno
import json
import os
import shutil
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import numpy as np
import numpy.typing as npt

from dpoctl import console
from dpoctl.data.cache import checksum_of, is_folder
from dpoctl.data.records import Record, Reject, RowPlace
from dpoctl.data.sampling import prompt_digest
from dpoctl.data.sources import location
from dpoctl.data.tokenize import Example
from dpoctl.files import checksum, locked, remove_torn, temporary_folder

COLUMNS = (
    "token_start",
    "shared_len",
    "response_start",
    "suffix_len",
    "num_tokens",
    "pair_start",
    "pairs",
    "label",
    "target",
    "source",
    "prompt_hash",
    "text_start",
)
CONTENTS = ("ids.bin", "scored.bin", "records.jsonl", "rejects.jsonl", "report.json")
MANIFEST = "store.json"
BUFFER = 1 << 20

_to_json = json.JSONEncoder(ensure_ascii=False).encode

Column = npt.NDArray[np.int64]


class TokenStore:
    """Tokenized records, read-only. Columns of the index are int64.

    Args:
        folder: A folder that a `StoreWriter` has written.
        paths: The sources' paths, in order, for `texts`.
    """

    token_start: Column
    """`(n + 1,)`: the start of each record's tokens in the flat ids."""
    shared_len: Column
    """`(n,)`: tokens that all responses of a record share."""
    response_start: Column
    """`(n + 1,)`: a ragged index into the next two."""
    suffix_len: Column
    """`(R,)`: tokens that each response adds."""
    num_tokens: Column
    """`(R,)`: tokens of each response that are trained on, end-of-turn included."""
    pair_start: Column
    """`(n + 1,)`: a ragged index into `pairs`."""
    pairs: Column
    """`(M, 2)`: (winner, loser), as indices of the record's responses."""
    label: Column
    """`(n,)`: unpaired feedback: 1 is good, 0 is bad, -1 is none."""
    target: Column
    """`(n,)`: the index of the response to imitate; -1 is none."""
    source: Column
    """`(n,)`: the number of the record's source."""
    prompt_hash: Column
    """`(n,)`: the hash of each prompt up to white space."""
    text_start: Column
    """`(n + 1,)`: the start of each record's line in the texts, in bytes."""

    def __init__(self, folder: Path, paths: Sequence[str] = ()) -> None:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        self.folder = folder
        self.key: str = manifest["key"]
        self.report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        for name in COLUMNS:
            setattr(self, name, _load(folder / f"{name}.npy"))
        self._ids = _map(folder / "ids.bin", np.dtype(manifest["dtype"]))
        self._scored = _map(folder / "scored.bin", np.dtype(np.bool_))
        # A map stays when the cache folder goes.
        self._records = _map(folder / "records.jsonl", np.dtype(np.uint8))
        self._paths = tuple(paths)

    def __len__(self) -> int:
        return len(self.shared_len)

    def example(self, index: int) -> Example:
        """Return the tokens of a record."""
        first, last = self.response_start[index : index + 2]
        lengths = np.concatenate(([self.shared_len[index]], self.suffix_len[first:last]))
        ends = self.token_start[index] + np.cumsum(lengths)
        slices = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
        return Example(
            shared=self._ids[slices[0]],
            shared_scored=self._scored[slices[0]],
            suffixes=tuple(self._ids[part] for part in slices[1:]),
            suffixes_scored=tuple(self._scored[part] for part in slices[1:]),
            pairs=self.pairs[self.pair_start[index] : self.pair_start[index + 1]],
            label=int(self.label[index]),
            target=int(self.target[index]),
            source=int(self.source[index]),
        )

    def pair_lengths(self) -> tuple[Column, Column]:
        """Return the trained tokens of the winner and of the loser of every pair, `(M,)` each."""
        first = np.repeat(self.response_start[:-1], np.diff(self.pair_start))
        return self.num_tokens[first + self.pairs[:, 0]], self.num_tokens[first + self.pairs[:, 1]]

    def texts(self, index: int) -> Record:
        """Return a record as it was before the template and the tokenizer."""
        start, end = (int(byte) for byte in self.text_start[index : index + 2])
        fields = json.loads(self._records[start:end].tobytes())
        source, part, line = fields["at"]
        path = location(self._paths[source], part) if source < len(self._paths) else part
        return Record.from_fields(fields["record"], source=path, line=line)

    def rejects(self, paths: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Yield the rows that are not in the store: file, line, reason and detail of each."""
        with (self.folder / "rejects.jsonl").open("rb") as file:
            for line in file:
                row = json.loads(line)
                source, part, number = row["at"]
                file_name = location(paths[source], part)
                yield {"file": file_name, "line": number, "reason": row["reason"], "detail": row["detail"]}


def find_store(folder: Path, key: str, paths: Sequence[str] = ()) -> TokenStore | None:
    """Open a store if it exists and no file of it is damaged; print a warning about one that is."""
    if not is_folder(folder):
        return None
    damage = find_damage(folder, key)
    if damage is None:
        try:
            return TokenStore(folder, paths)
        except FileNotFoundError:
            # The cache folder has been emptied since.
            return None
    console.warn(f"damaged token store: {folder / damage}; the data are tokenized again")
    return None


def find_damage(folder: Path, key: str) -> str | None:
    """Compare the files of a store with its manifest; return the first difference, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        expected, files = manifest.pop("checksum"), manifest["files"]
        if expected != _manifest_checksum(manifest) or manifest["key"] != key:
            return f"{MANIFEST} has a wrong checksum"
    except OSError as error:
        return f"{MANIFEST} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    with console.WorkProgress(
        "verifying tokenized data", sum(about["size"] for about in files.values()), "bytes"
    ) as shown:
        for name, about in files.items():
            try:
                if (folder / name).stat().st_size != about["size"] or checksum(folder / name) != about["checksum"]:
                    return f"{name} has a wrong checksum"
            except OSError as error:
                return f"{name} cannot be read ({error.strerror})"
            shown.advance(about["size"])
    return None


class StoreWriter:
    """Writes a store to a temporary folder, which `commit` renames, and which is removed without a commit.

    Several processes may write the same store: all write the same bytes, and the first to commit wins.
    """

    def __init__(self, folder: Path, key: str, dtype: Any) -> None:
        self._folder = folder
        self._key = key
        self._dtype = np.dtype(dtype)
        self._columns = {name: array("q", [0] if name.endswith("_start") else []) for name in COLUMNS}
        self._files = ExitStack()

    def __enter__(self) -> Self:
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        remove_torn(self._folder.parent)
        self._place = ExitStack()
        self._temporary = self._place.enter_context(temporary_folder(self._folder))
        self._ids, self._scored, self._records, self._rejects = (
            self._files.enter_context((self._temporary / name).open("wb", buffering=BUFFER)) for name in CONTENTS[:4]
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._files.close()
        finally:
            self._place.close()

    def add(self, example: Example, record: Record, place: RowPlace) -> None:
        """Append a record with its tokens and its place."""
        columns = self._columns
        for ids in (example.shared, *example.suffixes):
            self._ids.write(np.ascontiguousarray(ids, dtype=self._dtype).data)
        for flags in (example.shared_scored, *example.suffixes_scored):
            self._scored.write(flags.data)
        lengths = [len(suffix) for suffix in example.suffixes]
        shared_scored = int(np.count_nonzero(example.shared_scored))
        columns["shared_len"].append(len(example.shared))
        columns["suffix_len"].extend(lengths)
        columns["num_tokens"].extend(
            [shared_scored + int(np.count_nonzero(flags)) for flags in example.suffixes_scored]
        )
        columns["pairs"].extend(example.pairs.ravel().tolist())
        columns["token_start"].append(columns["token_start"][-1] + len(example.shared) + sum(lengths))
        columns["response_start"].append(len(columns["suffix_len"]))
        columns["pair_start"].append(len(columns["pairs"]) // 2)
        columns["label"].append(example.label)
        columns["target"].append(example.target)
        columns["source"].append(place[0])
        columns["prompt_hash"].append(int.from_bytes(prompt_digest(record.topic)[:8], signed=True))
        line = _to_json({"at": place, "record": record.to_fields()}).encode() + b"\n"
        self._records.write(line)
        columns["text_start"].append(columns["text_start"][-1] + len(line))

    def reject(self, reject: Reject, place: RowPlace) -> None:
        """Append the rejection of a row."""
        row = {"at": place, "reason": reject.reason, "detail": reject.detail}
        self._rejects.write(_to_json(row).encode(errors="replace") + b"\n")

    def column(self, name: str) -> Column:
        """Return a column of the records so far."""
        values = np.array(self._columns[name], dtype=np.int64)
        return values.reshape(-1, 2) if name == "pairs" else values

    def commit(self, report: dict[str, Any], paths: Sequence[str] = ()) -> TokenStore:
        """Write the index, rename the folder, and open the store."""
        self._files.close()
        for name in COLUMNS:
            np.save(self._temporary / f"{name}.npy", self.column(name), allow_pickle=False)
        (self._temporary / "report.json").write_text(json.dumps(report), encoding="utf-8")
        files = {
            file.name: {"size": file.stat().st_size, "checksum": checksum(file)}
            for file in sorted(self._temporary.iterdir())
        }
        manifest = {"key": self._key, "dtype": self._dtype.name, "files": files}
        manifest["checksum"] = _manifest_checksum(manifest)
        (self._temporary / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
        for file in self._temporary.iterdir():
            _sync(file)
        with locked(self._folder.parent):
            if not self._folder.is_dir() or find_damage(self._folder, self._key) is not None:
                _move(self._temporary, self._folder)
            return _open_committed(self._folder, paths)


def _move(temporary: Path, folder: Path) -> None:
    # A broken store goes aside first: a folder can be renamed only over an empty one.
    aside = folder.with_name(f".{folder.name}.{uuid4().hex[:8]}.tmp")
    with suppress(FileNotFoundError):
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
    try:
        temporary.rename(folder)
    except OSError as error:
        # Where folders cannot be locked, a neighbour may be faster.
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise


def _open_committed(folder: Path, paths: Sequence[str]) -> TokenStore:
    """Open a store that is there, or will be: where folders cannot be locked, a neighbour may just replace it."""
    for _ in range(100):
        with suppress(FileNotFoundError):
            return TokenStore(folder, paths)
        time.sleep(0.02)
    return TokenStore(folder, paths)


def _manifest_checksum(manifest: dict[str, Any]) -> str:
    return checksum_of(json.dumps(manifest, sort_keys=True).encode()).hex()


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _load(path: Path) -> Column:
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


def _map(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    # An empty file cannot be mapped. A plain array is faster to slice than the map itself.
    if path.stat().st_size == 0:
        return np.empty(0, dtype=dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))

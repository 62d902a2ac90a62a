"""The token store: tokenized once, memory-mapped, found again by a key, whole or absent.

A folder holds `ids.bin` and `scored.bin` (each record's shared prefix, then its suffixes), one `.npy` a column of
the index, `records.jsonl` (the texts), `rejects.jsonl`, `report.json`, and `store.json`, written last, which says
how large every other file is.
"""

import json
import os
import shutil
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import numpy as np
import numpy.typing as npt

from dpoctl.data.records import Record, Reject
from dpoctl.data.selection import prompt_digest
from dpoctl.data.sources import location
from dpoctl.data.tokenize import Example

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
ABANDONED_SECONDS = 24 * 3600
BUFFER = 1 << 20

_to_json = json.JSONEncoder(ensure_ascii=False).encode

Column = npt.NDArray[np.int64]


class TokenStore:
    """Tokenized records, read-only. Columns of the index are int64.

    Args:
        folder: What a `StoreWriter` has written.
        paths: The sources' paths, in order, for `texts`.
    """

    token_start: Column
    """`(n + 1,)`: where each record's tokens start in the flat ids."""
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
    """`(n,)`: the response to imitate, as an index of the record's responses; -1 is none."""
    source: Column
    """`(n,)`: the number of the source that the record comes from."""
    prompt_hash: Column
    """`(n,)`: equal where prompts are equal, white space aside."""
    text_start: Column
    """`(n + 1,)`: where each record's line starts in the texts, in bytes."""

    def __init__(self, folder: Path, paths: Sequence[str] = ()) -> None:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        self.folder = folder
        self.key: str = manifest["key"]
        self.report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        for name in COLUMNS:
            setattr(self, name, _load(folder / f"{name}.npy"))
        self._ids = _map(folder / "ids.bin", np.dtype(manifest["dtype"]))
        self._scored = _map(folder / "scored.bin", np.dtype(np.bool_))
        self._paths = tuple(paths)

    def __len__(self) -> int:
        return len(self.shared_len)

    def example(self, index: int) -> Example:
        """Get the tokens of a record."""
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

    def texts(self, index: int) -> Record:
        """Get a record as it was before the template and the tokenizer."""
        start, end = (int(byte) for byte in self.text_start[index : index + 2])
        with (self.folder / "records.jsonl").open("rb") as file:
            file.seek(start)
            fields = json.loads(file.read(end - start))
        source, part, line = fields["at"]
        path = location(self._paths[source], part) if source < len(self._paths) else part
        return Record.from_fields(fields["record"], source=path, line=line)

    def rejects(self, paths: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Read the rows that are not in the store: file, line, reason and detail of each."""
        with (self.folder / "rejects.jsonl").open("rb") as file:
            for line in file:
                row = json.loads(line)
                source, part, number = row["at"]
                file_name = location(paths[source], part)
                yield {"file": file_name, "line": number, "reason": row["reason"], "detail": row["detail"]}


def find_store(folder: Path, key: str, paths: Sequence[str] = ()) -> TokenStore | None:
    """Open a store if it is there and whole."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in manifest["sizes"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if manifest.get("key") != key or sizes != manifest["sizes"]:
        return None
    return TokenStore(folder, paths)


class StoreWriter:
    """Writes a store beside its place; it appears there by `commit`, and without one leaves nothing behind.

    Two processes may write the same store: both write the same bytes, and the first to commit wins.
    """

    def __init__(self, folder: Path, key: str, dtype: Any) -> None:
        self._folder = folder
        self._key = key
        self._dtype = np.dtype(dtype)
        self._temporary = folder.with_name(f"{folder.name}.{uuid4().hex[:8]}.tmp")
        self._columns = {name: array("q", [0] if name.endswith("_start") else []) for name in COLUMNS}
        self._files = ExitStack()

    def __enter__(self) -> Self:
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(self._folder)
        self._temporary.mkdir()
        self._ids, self._scored, self._records, self._rejects = (
            self._files.enter_context((self._temporary / name).open("wb", buffering=BUFFER)) for name in CONTENTS[:4]
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()
        shutil.rmtree(self._temporary, ignore_errors=True)

    def add(self, example: Example, record: Record, at: tuple[int, str, int]) -> None:
        """Append a record.

        Args:
            example: Its tokens.
            record: Its texts.
            at: Its source's number, the file in the source, and the line.
        """
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
        columns["source"].append(at[0])
        columns["prompt_hash"].append(int.from_bytes(prompt_digest(record.topic)[:8], signed=True))
        line = _to_json({"at": at, "record": record.to_fields()}).encode() + b"\n"
        self._records.write(line)
        columns["text_start"].append(columns["text_start"][-1] + len(line))

    def reject(self, reject: Reject, at: tuple[int, str, int]) -> None:
        """Note a row that is not in the store, and why."""
        row = {"at": at, "reason": reject.reason, "detail": reject.detail}
        self._rejects.write(_to_json(row).encode(errors="replace") + b"\n")

    def column(self, name: str) -> Column:
        """Get a column of what has been added so far."""
        values = np.array(self._columns[name], dtype=np.int64)
        return values.reshape(-1, 2) if name == "pairs" else values

    def commit(self, report: dict[str, Any], paths: Sequence[str] = ()) -> TokenStore:
        """Move the store to its place and open it."""
        self._files.close()
        for name in COLUMNS:
            np.save(self._temporary / f"{name}.npy", self.column(name), allow_pickle=False)
        (self._temporary / "report.json").write_text(json.dumps(report), encoding="utf-8")
        sizes = {file.name: file.stat().st_size for file in sorted(self._temporary.iterdir())}
        manifest = {"key": self._key, "dtype": self._dtype.name, "sizes": sizes}
        (self._temporary / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
        for file in self._temporary.iterdir():
            _sync(file)
        if find_store(self._folder, self._key) is None:
            _move(self._temporary, self._folder)
        return TokenStore(self._folder, paths)


def _move(temporary: Path, folder: Path) -> None:
    # A broken store in the way is moved aside first, since a folder is only renamed over an empty one.
    if folder.exists():
        aside = folder.with_name(f"{folder.name}.{uuid4().hex[:8]}.tmp")
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
    try:
        temporary.rename(folder)
    except OSError:
        if not (folder / MANIFEST).is_file():
            raise


def _remove_abandoned(folder: Path) -> None:
    """Remove what killed processes have left of the same store."""
    for left in folder.parent.glob(f"{folder.name}.*.tmp"):
        if time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
            shutil.rmtree(left, ignore_errors=True)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _load(path: Path) -> Column:
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


def _map(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    # An empty file cannot be mapped. The array around the map spares each slice the cost of a subclass.
    if path.stat().st_size == 0:
        return np.empty(0, dtype=dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))

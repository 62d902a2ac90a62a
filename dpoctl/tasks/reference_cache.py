"""The numbers of a reference on disk: shards of responses that are done, each complete, or absent.

A shard is an array in NumPy's format, one element a response, followed by the checksum of its bytes. A pass that is
interrupted leaves its shards, and the next one computes what they lack.
"""

import io
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpoctl import console
from dpoctl.data.cache import Cache, cannot_write, checksum_of
from dpoctl.errors import SetupError
from dpoctl.files import remove_torn, write_atomically

KIND = "reference"
"""The folder of all shards in the cache folder."""
SHARD_SECONDS = 10.0
"""The most work, in seconds, that a kill can undo, beyond the micro-batches that are being computed."""
CHECKSUM_BYTES = len(checksum_of(b""))

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


class ReferenceCache:
    """The shards of one reference and one token store.

    Args:
        cache: The cache folder.
        key: Identifies reference, store and columns.
        columns: The names of the numbers of a response.
    """

    def __init__(self, cache: Cache, key: str, columns: Sequence[str]) -> None:
        self._cache, self._key, self._columns = cache, key, tuple(columns)
        self._dtype = np.dtype([("response", "<i8"), *((name, "<f4") for name in columns)])
        self._pending: list[NDArray[np.void]] = []
        self._committed = time.monotonic()
        self._is_writable = True

    def read(self, num_responses: int) -> tuple[Floats, NDArray[np.bool_]]:
        """Return `[columns, R]` numbers, zero where they are not known, and `[R]`, whether they are known.

        Prints one warning if shards are damaged, and deletes those.
        """
        table = np.zeros((len(self._columns), num_responses), dtype=np.float32)
        known = np.zeros(num_responses, dtype=np.bool_)
        damaged: list[Path] = []
        for file in self._files():
            shard = self._load(file, num_responses)
            if shard is None:
                damaged.append(file)
                continue
            known[shard["response"]] = True
            for row, column in zip(table, self._columns, strict=True):
                row[shard["response"]] = shard[column]
        if damaged:
            names = ", ".join(map(str, damaged))
            console.warn(f"damaged log-probabilities of the reference: {names}; they are computed again")
            self._delete(damaged)
        return table, known

    def add(self, responses: Ints, numbers: Floats) -> None:
        """Keep the `[columns, n]` numbers of some responses; they are on disk soon after."""
        shard = np.empty(len(responses), dtype=self._dtype)
        shard["response"] = responses
        for row, column in zip(numbers, self._columns, strict=True):
            shard[column] = row
        self._pending.append(shard)
        if time.monotonic() - self._committed > SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what is not on disk yet; a folder that cannot be written costs a warning."""
        if not self._pending or not self._is_writable:
            return
        buffer = io.BytesIO()
        np.save(buffer, np.concatenate(self._pending), allow_pickle=False)
        content = buffer.getvalue()
        digest = checksum_of(content)
        try:
            folder = self._cache.writable(KIND)
            remove_torn(folder)
            try:
                # The same numbers have the same name.
                write_atomically(folder / f"{self._key}.{digest.hex()[:16]}.npy", content + digest)
            except OSError as error:
                raise cannot_write(folder.parent, error) from error
        except SetupError as error:
            self._is_writable = False
            console.warn(f"the log-probabilities of the reference are not kept for later runs: {error}")
        self._pending.clear()
        self._committed = time.monotonic()

    def _files(self) -> list[Path]:
        found: list[Path] = []
        for folder in self._cache.folders(KIND):
            try:
                found += sorted(folder.glob(f"{self._key}.*.npy"))
            except OSError:
                continue
        return found

    def _load(self, file: Path, num_responses: int) -> NDArray[np.void] | None:
        """Return a shard; None if it is damaged."""
        try:
            content = file.read_bytes()
            body, digest = content[:-CHECKSUM_BYTES], content[-CHECKSUM_BYTES:]
            if checksum_of(body) != digest:
                return None
            shard: NDArray[np.void] = np.load(io.BytesIO(body), allow_pickle=False)
        except (OSError, ValueError):
            return None
        is_whole = shard.dtype == self._dtype and shard.ndim == 1
        return shard if is_whole and shard["response"].max(initial=-1) < num_responses else None

    def _delete(self, damaged: Sequence[Path]) -> None:
        for file in damaged:
            try:
                file.unlink(missing_ok=True)
            except OSError:
                # In a folder that is read-only it is found damaged again, and not used.
                continue

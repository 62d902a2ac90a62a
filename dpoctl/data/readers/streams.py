"""The bytes of a file or a pipe: decompressed on the way, and refused where they can be no data."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

from dpoctl.data.readers.zstd import open_zstd
from dpoctl.errors import DataError

SUFFIXES = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
"""What the names of compressed files end in."""

MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
LFS_POINTER = b"version https://git-lfs"
FOREIGN = {
    LFS_POINTER: ("a Git LFS pointer, not the data", "run `git lfs pull`"),
    b"\xff\xfe": ("UTF-16 text", "save the file as UTF-8"),
    b"\xfe\xff": ("UTF-16 text", "save the file as UTF-8"),
    b"PK\x03\x04": ("a zip archive, or a spreadsheet", "unpack it; save a sheet as CSV in UTF-8"),
    b"<!DOCTYPE": ("a web page, not the data", "download the file itself"),
    b"<html": ("a web page, not the data", "download the file itself"),
}
"""First bytes of what people take for data: what it is, and what to do."""

OPENERS: dict[str, Callable[[io.BufferedReader], Any]] = {
    "gzip": lambda packed: gzip.GzipFile(fileobj=packed),
    "bzip2": bz2.BZ2File,
    "xz": lzma.LZMAFile,
    "zstd": open_zstd,
}
CHUNK = 1 << 16


def look_at(stream: BinaryIO) -> bytes:
    """Show the first bytes of a stream, which are still to be read."""
    assert isinstance(stream, io.BufferedReader)
    return stream.peek(CHUNK)


def unpack(stream: BinaryIO, name: str) -> io.BufferedReader:
    """Decompress a stream, if its first bytes say that it is compressed.

    Args:
        stream: What stands on disk, or comes through a pipe.
        name: What errors call it; its suffix says what to expect, and the content decides.

    Raises:
        DataError: It is broken, or no data at all.
        SetupError: It is zstd, and there is no library for that.
    """
    file: io.BufferedReader
    file = stream if isinstance(stream, io.BufferedReader) else io.BufferedReader(cast("io.RawIOBase", stream))
    packing = _packing(file)
    if packing is not None:
        file = io.BufferedReader(_Unpacked(OPENERS[packing](file), name, packing), CHUNK)
        if (inner := _packing(file)) is not None:
            raise DataError(f"{name}: {inner} inside {packing}", hint="it was compressed twice; unpack it once")
    start = look_at(file)
    for magic, (what, hint) in FOREIGN.items():
        if start.startswith(magic):
            raise DataError(f"{name}: {what}", hint=hint)
    expected = SUFFIXES.get(Path(name).suffix.lower())
    if packing is None and expected is not None and b"\0" in start:
        raise DataError(f"{name}: not a {expected} file, and not text either", hint="fetch or write it again")
    return file


def _packing(file: io.BufferedReader) -> str | None:
    start = look_at(file)
    return next((name for magic, name in MAGIC.items() if start.startswith(magic)), None)


class _Unpacked(io.RawIOBase):
    """What a decompressor gives, with its many ways to fail as one error that says how far it came."""

    def __init__(self, packed: Any, name: str, packing: str) -> None:
        self._packed = packed
        self._name = name
        self._packing = packing
        self._line = 1

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        try:
            chunk: bytes = self._packed.read1(len(view))
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise DataError(f"{self._name}:{self._line}: broken {self._packing} file: {error}") from error
        self._line += chunk.count(b"\n")
        view[: len(chunk)] = chunk
        return len(chunk)

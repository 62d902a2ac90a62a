"""Byte streams of files and pipes: decompression, errors for what is not data, and numbered lines of UTF-8."""

import bz2
import gzip
import importlib
import io
import lzma
import sys
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

from dpoctl.data.records import Reject, Row
from dpoctl.errors import DataError, SetupError

SUFFIXES = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
"""Suffixes of compressed files."""
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
"""First bytes of files that are not data: the kind of file, and the advice."""
CHUNK = 1 << 16
LONGEST_ROW = 1 << 24
"""The greatest number of bytes of a row: a small compressed file may hold a line that fills all memory."""
TOO_LONG = f"more than {LONGEST_ROW >> 20} MiB"
LARGEST_WINDOW_LOG = 31
"""The window of `zstd --long=31`; the library's default refuses it."""
Line = tuple[int, Row | Reject]
"""The line on which a row starts, counted from 1, and the row or its rejection."""
BOM = b"\xef\xbb\xbf"


def look_at(stream: BinaryIO) -> bytes:
    """Return the first bytes of a stream without reading past them."""
    assert isinstance(stream, io.BufferedReader)
    return stream.peek(CHUNK)


def unpack(stream: BinaryIO, name: str) -> io.BufferedReader:
    """Decompress a stream, if its first bytes are those of compressed data.

    Args:
        stream: The stream of a file or a pipe.
        name: The name in errors; its suffix is compared with the content.

    Raises:
        DataError: The stream is broken, or is not data.
        SetupError: It is zstd, and the library for that is not installed.
    """
    file: io.BufferedReader
    file = stream if isinstance(stream, io.BufferedReader) else io.BufferedReader(cast("io.RawIOBase", stream))
    packing = _packing(file)
    if packing is not None:
        file = io.BufferedReader(_Unpacked(file, name, packing), CHUNK)
        if (inner := _packing(file)) is not None:
            raise DataError(f"{name}: {inner} inside {packing}", hint="it was compressed twice; decompress it once")
    start = look_at(file)
    for magic, (what, hint) in FOREIGN.items():
        if start.startswith(magic):
            raise DataError(f"{name}: {what}", hint=hint)
    expected = SUFFIXES.get(Path(name).suffix.lower())
    if packing is None and expected is not None and b"\0" in start:
        raise DataError(f"{name}: neither a {expected} file nor text", hint="download or write it again")
    return file


def too_long_row() -> Reject:
    """Return the rejection of a row that is longer than any that is read."""
    return Reject("too_long", f"a row of {TOO_LONG}")


def read_lines(file: io.BufferedReader, name: str) -> Iterator[str | None]:
    r"""Read lines with their ends; only `\n` ends one, since a row may hold U+2028 and the like.

    A line that is too long for a row is None.

    Raises:
        DataError: A line is not UTF-8.
    """
    for number, line in enumerate(iter(partial(file.readline, LONGEST_ROW + 1), b""), start=1):
        if len(line) > LONGEST_ROW:
            rest = line
            while rest and not rest.endswith(b"\n"):
                rest = file.readline(CHUNK)
            yield None
            continue
        content = line.removeprefix(BOM) if number == 1 else line
        try:
            yield content.decode()
        except UnicodeDecodeError as error:
            raise not_utf8(name, number, error) from error


def not_utf8(name: str, line: int, error: UnicodeDecodeError) -> DataError:
    """Make the error of bytes of a file, from a line on, that are not UTF-8, with a guess at their encoding."""
    content = error.object
    line += content.count(b"\n", 0, error.start)
    column = error.start - content.rfind(b"\n", 0, error.start)
    place = f"{name}:{line}:{column}"
    try:
        content.decode("cp1252")
    except UnicodeDecodeError:
        return DataError(f"{place}: not UTF-8 text", hint="save the file as UTF-8")
    return DataError(
        f"{place}: not UTF-8 text; it may be Windows-1252 (Excel's plain CSV) or Latin-1",
        hint="save the file as UTF-8 (in Excel: `CSV UTF-8`), or `iconv -f WINDOWS-1252 -t UTF-8`",
    )


def _packing(file: io.BufferedReader) -> str | None:
    start = look_at(file)
    return next((name for magic, name in MAGIC.items() if start.startswith(magic)), None)


class _Unpacked(io.RawIOBase):
    """The content of a compressed stream; an error of its decompressor becomes one that names file and line."""

    def __init__(self, packed: io.BufferedReader, name: str, packing: str) -> None:
        self._unpacked, self._broken = _decompressor(packed, packing)
        self._name = name
        self._packing = packing
        self._line = 1

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        try:
            chunk: bytes = self._unpacked.read1(len(view))
        except (EOFError, OSError, self._broken) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise DataError(f"{self._name}:{self._line}: broken {self._packing} file: {error}") from error
        self._line += chunk.count(b"\n")
        view[: len(chunk)] = chunk
        return len(chunk)


def _decompressor(packed: io.BufferedReader, packing: str) -> tuple[Any, type[Exception]]:
    """Open a compressed stream; also name the error of broken content, where that is neither EOFError nor OSError."""
    if packing == "gzip":
        return gzip.GzipFile(fileobj=packed), zlib.error
    if packing == "bzip2":
        return bz2.BZ2File(packed), OSError
    if packing == "xz":
        return lzma.LZMAFile(packed), lzma.LZMAError
    try:
        zstd = importlib.import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
    except ImportError as error:
        raise SetupError("reading .zst files needs backports.zstd", hint="pip install 'dpoctl[zstd]'") from error
    options = {zstd.DecompressionParameter.window_log_max: LARGEST_WINDOW_LOG}
    return zstd.ZstdFile(packed, options=options), zstd.ZstdError

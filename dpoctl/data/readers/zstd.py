"""Zstandard, by the standard library where it has it (Python 3.14), else by the `zstandard` package."""

import importlib
import io
from typing import Any

from dpoctl.errors import SetupError

LARGEST_WINDOW = 1 << 31
"""What `zstd --long=31` writes; the library's default refuses it."""


def open_zstd(packed: io.BufferedReader) -> Any:
    """Open a compressed stream; what comes back has `read1`, and raises `OSError` or `EOFError` where it is broken.

    Raises:
        SetupError: There is no library for it.
    """
    for name, opener in (("compression.zstd", _Standard), ("zstandard", _Package)):
        try:
            return opener(importlib.import_module(name), packed)
        except ImportError:
            continue
    raise SetupError("reading .zst files needs zstandard", hint="pip install 'dpoctl[zstd]'")


class _Standard:
    def __init__(self, library: Any, packed: io.BufferedReader) -> None:
        largest = {library.DecompressionParameter.window_log_max: LARGEST_WINDOW.bit_length() - 1}
        self._file = library.ZstdFile(packed, options=largest)
        self._error = library.ZstdError

    def read1(self, size: int) -> bytes:
        try:
            return bytes(self._file.read1(size))
        except self._error as error:
            raise OSError(str(error)) from error


class _Package:
    """The package's own file object takes a frame that is cut for its end, so frames are followed here."""

    def __init__(self, library: Any, packed: io.BufferedReader) -> None:
        self._decompressor = library.ZstdDecompressor(max_window_size=LARGEST_WINDOW)
        self._error = library.ZstdError
        self._packed = packed
        self._frame: Any = None
        self._ready = io.BytesIO()

    def read1(self, size: int) -> bytes:
        while not (content := self._ready.read(size)):
            compressed = self._rest() or self._packed.read1(size)
            if not compressed:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError("the stream ends before its last frame does")
                return b""
            if self._frame is None or self._frame.eof:
                self._frame = self._decompressor.decompressobj()
            self._ready = io.BytesIO(self._decompress(compressed))
        return content

    def _rest(self) -> bytes:
        return bytes(self._frame.unused_data) if self._frame is not None and self._frame.eof else b""

    def _decompress(self, compressed: bytes) -> bytes:
        try:
            return bytes(self._frame.decompress(compressed))
        except self._error as error:
            raise OSError(str(error)) from error

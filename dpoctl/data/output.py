"""Outputs of lines: a file that is complete or absent, and stdout, at once or at the end."""

import glob
import gzip
import io
import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from dpoctl import console
from dpoctl.errors import FULL, DiskError, RunError, UsageError, room
from dpoctl.files import remove_torn, temporary_file


class WholeFile:
    """A text file that appears, complete, at the end of the `with` block, or not at all; compressed if named `.gz`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.wanted = True
        """Set to false to leave no file behind."""

    def __enter__(self) -> Self:
        if self._path.is_dir():
            raise UsageError(f"{self._path}: cannot be written: it is a folder")
        self._temporary, self._files = ExitStack(), ExitStack()
        try:
            remove_torn(self._path.parent, f".{glob.escape(self._path.name)}.*.tmp")
            self._written, raw = self._temporary.enter_context(temporary_file(self._path))
        except OSError as error:
            raise UsageError(f"{self._path}: cannot be written: {error.strerror or error}") from error
        file: Any = self._files.enter_context(raw)
        if self._path.suffix == ".gz":
            # No time stamp: the same rows give the same bytes.
            file = self._files.enter_context(gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0))
        # The name of a source may hold bytes that are not text; Python escapes them as JSON does.
        text = io.TextIOWrapper(file, encoding="utf-8", errors="backslashreplace", newline="\n")
        self._text = self._files.enter_context(text)
        return self

    def write(self, line: str) -> None:
        """Add a line.

        Raises:
            DiskError: The disk is full, or fails.
        """
        try:
            self._text.write(line + "\n")
        except OSError as error:
            raise self._failed(error) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._files.close()
            if error is None and self.wanted:
                self._written.replace(self._path)
        except OSError as failure:
            # Closing writes the buffer, and fails again where writing has failed.
            if error is None:
                raise self._failed(failure) from failure
        finally:
            self._temporary.close()

    def _failed(self, error: OSError) -> RunError:
        free = f" ({room(self._path.parent)} free)" if error.errno in FULL else ""
        return DiskError(f"{self._path}: cannot be written: {error.strerror or error}{free}")


class Stdout:
    """Stdout, written line by line, or, with `hold`, at the end of the `with` block if `wanted` is true by then."""

    def __init__(self, *, hold: bool) -> None:
        self._hold = hold
        self._held: IO[str] | None = None
        self.wanted = True

    def __enter__(self) -> Self:
        if self._hold:
            self._held = tempfile.TemporaryFile("w+", encoding="utf-8", newline="\n")
        return self

    def write(self, line: str) -> None:
        """Add a line."""
        if self._held is None:
            console.emit(line)
            if console.has_lost_reader():
                raise BrokenPipeError
        else:
            self._held.write(line + "\n")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._held is None:
            return
        with self._held:
            if error is None and self.wanted:
                self._held.seek(0)
                for line in self._held:
                    console.emit(line.removesuffix("\n"))

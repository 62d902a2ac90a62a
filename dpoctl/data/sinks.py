"""Where converted rows go: a file that is whole or absent, stdout at once or at the end, or nowhere."""

import gzip
import io
import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self
from uuid import uuid4

from dpoctl import console
from dpoctl.errors import RunError, UsageError


class Sink(Protocol):
    """Takes lines, in a `with` block."""

    wanted: bool
    """Set to false to leave nothing behind, where lines are held back until the end."""

    def write(self, line: str) -> None:
        """Add a line."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class WholeFile:
    """A text file that is there whole, after the `with` block, or not at all; compressed if named `.gz`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.tmp")
        self.wanted = True
        """Set to false to leave nothing behind."""

    def __enter__(self) -> Self:
        if self._path.is_dir():
            raise UsageError(f"{self._path}: cannot be written: it is a folder")
        try:
            raw = self._temporary.open("wb")
        except OSError as error:
            raise UsageError(f"{self._path}: cannot be written: {error.strerror or error}") from error
        self._files = ExitStack()
        self._files.enter_context(raw)
        file: Any = raw
        if self._path.suffix == ".gz":
            # No time stamp: the same rows give the same bytes.
            file = self._files.enter_context(gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0))
        # The name of a source may hold bytes that are no text; Python's escapes of them are JSON's too.
        text = io.TextIOWrapper(file, encoding="utf-8", errors="backslashreplace", newline="\n")
        self._text = self._files.enter_context(text)
        return self

    def write(self, line: str) -> None:
        """Add a line.

        Raises:
            RunError: The disk is full, or fails.
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
                self._temporary.replace(self._path)
        except OSError as failure:
            # Closing writes what is buffered, and fails once more where writing has failed.
            if error is None:
                raise self._failed(failure) from failure
        finally:
            self._temporary.unlink(missing_ok=True)

    def _failed(self, error: OSError) -> RunError:
        return RunError(f"{self._path}: cannot be written: {error.strerror or error}")


class Stdout:
    """Lines to stdout, as they come."""

    wanted = True

    def __enter__(self) -> Self:
        return self

    def write(self, line: str) -> None:
        """Add a line."""
        console.emit(line)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class HeldStdout:
    """Lines to stdout at the end of the `with` block, if they are still wanted then."""

    def __init__(self) -> None:
        self.wanted = True

    def __enter__(self) -> Self:
        self._file = tempfile.TemporaryFile("w+", encoding="utf-8", newline="\n")
        return self

    def write(self, line: str) -> None:
        """Add a line."""
        self._file.write(line + "\n")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if error is None and self.wanted:
                self._file.seek(0)
                for line in self._file:
                    console.emit(line.removesuffix("\n"))


class Nowhere(Stdout):
    """No lines at all."""

    def write(self, line: str) -> None:
        """Drop a line."""
        del line

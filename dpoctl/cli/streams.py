"""The standard streams: closed ones, full disks, readers that go away, and terminals that do not know a character."""

import errno
import io
import locale
import os
import re
import sys
from typing import Any, TextIO, cast

from dpoctl.cli.failure import run_directory
from dpoctl.console import printable
from dpoctl.errors import SetupError, UsageError
from dpoctl.files import no_link
from dpoctl.redact import redact_text
from dpoctl.runs.names import LOG, own_folder

NO_STDERR = "DPOCTL_NO_STDERR"
"""Tells the ranks that this process starts that it has no stderr; theirs would be /dev/null."""


def prepare() -> None:
    """Put streams in place of the standard ones that fail in a way that is known; a test's own streams stay."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # The next file that is opened would get the number, and what a library prints would go into it.
            os.open(os.devnull, os.O_RDWR)
    if sys.stdin is None:
        sys.stdin = cast("TextIO", io.TextIOWrapper(io.BufferedReader(_ClosedInput()), "utf-8"))
    if sys.stdout is None:
        sys.stdout = _text(_Closed(), "utf-8", is_terminal=False)
    elif sys.stdout is sys.__stdout__:
        sys.stdout = _replaced(cast("TextIO", sys.stdout), _Stdout)
    if sys.stderr is None or NO_STDERR in os.environ:
        os.environ[NO_STDERR] = "1"
        lost = _Stderr(os.open(os.devnull, os.O_WRONLY), "wb")
        lost.is_lost = True
        sys.stderr = _text(lost, "utf-8", is_terminal=False)
    elif sys.stderr is sys.__stderr__:
        sys.stderr = _replaced(cast("TextIO", sys.stderr), _Stderr)


def speak_utf8(arguments: list[str]) -> None:
    """Start this process anew if the names of its files are not UTF-8, with Python's switch for that."""
    if sys.getfilesystemencoding() == "utf-8" or os.environ.get("PYTHONUTF8") == "1":
        return
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, [sys.executable, "-m", "dpoctl", *arguments])


def flush() -> None:
    """Write what is buffered at the end of the process."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, SetupError):
            continue


class _Stdout(io.FileIO):
    """Data, which must not be lost in silence, unless their reader wants no more; nothing is written after an error."""

    _has_failed = has_lost_reader = False

    def write(self, data: Any) -> int:
        if self._has_failed:
            return len(data)
        try:
            return super().write(data) or 0
        except OSError as error:
            self._has_failed = True
            self.has_lost_reader = isinstance(error, BrokenPipeError)
            if self.has_lost_reader:
                return len(data)
            raise SetupError(f"stdout cannot be written: {error.strerror}", hint=_OTHER_OUTPUT) from error


class _Closed(io.RawIOBase):
    """A stdout that is closed: a command that has nothing to print does not notice."""

    _has_failed = False

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if not self._has_failed:
            self._has_failed = True
            raise SetupError("stdout is closed, and there is something to print", hint=_OTHER_OUTPUT)
        return len(data)


class _ClosedInput(io.RawIOBase):
    """A stdin that is closed."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        raise SetupError("stdin is closed, and there is something to read from it", hint="give it a file or a pipe")


class _Stderr(io.FileIO):
    """Messages, which no run may die of: after an error they go to a file of the run directory."""

    is_lost = False
    _log: io.FileIO | None = None

    def write(self, data: Any) -> int:
        if not self.is_lost:
            try:
                return super().write(data) or 0
            except OSError as error:
                if error.errno == errno.EINTR:
                    raise
                self.is_lost = True
        try:
            if self._log is None and (run := run_directory()) is not None:
                own_folder((run / LOG).parent)
                self._log = io.FileIO(run / LOG, "ab", opener=no_link)
            if self._log is not None:
                self._log.write(data)
        except (OSError, UsageError):
            self._log = None
        return len(data)


_OTHER_OUTPUT = "send it to a file that can be written"


def _replaced(stream: TextIO, kind: type[io.FileIO]) -> TextIO:
    stream.flush()
    is_terminal = stream.isatty()
    # Python takes a terminal of the locale C for one that knows UTF-8.
    named = "PYTHONIOENCODING" in os.environ
    encoding = "utf-8" if not is_terminal else stream.encoding if named else locale.getencoding()
    return _text(kind(stream.fileno(), "wb", closefd=False), encoding, is_terminal=is_terminal)


class _Text(io.TextIOWrapper):
    """Text on its way to a terminal or, on stderr, to people: the last check, for what libraries print."""

    is_terminal = is_for_people = False

    @property
    def has_lost_reader(self) -> bool:
        """Whether nobody reads what is written."""
        return bool(getattr(cast("Any", self.buffer).raw, "has_lost_reader", False))

    def write(self, text: str) -> int:
        shown = redact_text(text) if self.is_for_people else text
        if self.is_terminal:
            # Whatever is printed through `dpoctl.console` has only codes of Rich's own by now.
            parts = enumerate(_CODES.split(shown))
            shown = "".join(part if number % 2 else printable(part, keep="\n\t\r") for number, part in parts)
        super().write(shown)
        return len(text)


_CODES = re.compile(r"(\x1b\[(?:[\d;]*m|\d*[A-HJK]|\?25[hl]))")
"""Codes for styles, movements and the cursor, which progress bars and coloured help need."""


def _text(raw: io.RawIOBase, encoding: str, *, is_terminal: bool) -> TextIO:
    buffer = io.BufferedWriter(cast("Any", raw))
    # Characters that the terminal does not know, and bytes of file names that are not text, are escaped.
    by_line = is_terminal or isinstance(raw, _Stderr)
    text = _Text(buffer, encoding, "backslashreplace", line_buffering=by_line)
    text.is_terminal, text.is_for_people = is_terminal, isinstance(raw, _Stderr)
    return cast("TextIO", text)

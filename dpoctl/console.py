"""Output: data on stdout, everything else on stderr, from rank 0 only.

Functions like `print` over one Rich console, which honours `NO_COLOR`, `FORCE_COLOR` and pipes. Rich is imported on
first use, so that `--help` stays fast.
"""

import io
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, Self

from dpoctl.redact import redact_text

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress as Bar

BAR_SECONDS = 1.0
"""Work that ends sooner shows no bar."""
LINE_SECONDS = 15.0
"""The time between two lines about long work where there is no terminal."""

_UNSAFE = re.compile("[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, characters that break lines or change the writing direction, and bytes that are not text."""


def printable(text: str, *, keep: str = "\n\t") -> str:
    """Escape characters that could control a terminal or a page: data and file names may come from strangers.

    All that is printed on a terminal, or put into a page, goes through here; what goes into a file or a pipe does not.
    """
    return _UNSAFE.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)


def rank() -> int:
    """Return the number of this process among those of its launcher; 0 for the only process."""
    number = os.environ.get("RANK", "0")
    return int(number) if number.isdecimal() else 0


def is_main_process() -> bool:
    """Whether this process may print: it is rank 0, or the only process."""
    return rank() == 0


@cache
def _console_class() -> type["Console"]:
    """Return Rich's console, which escapes all texts but its own codes for styles and movements."""
    from rich.console import Console  # noqa: PLC0415 - start-up time
    from rich.segment import Segment  # noqa: PLC0415

    class Safe(Console):
        def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
            for text, style, control in super().render(renderable, options):
                yield Segment(text if control else printable(text), style, control)

    return Safe


@cache
def stderr() -> "Console":
    """Return the console on stderr."""
    width = None if sys.stderr.isatty() else 200
    # Messages quote recipes and rows: their brackets and colons are not markup.
    return _console_class()(
        stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=not sys.stderr.isatty(), width=width
    )


def say(message: "RenderableType", **kwargs: Any) -> None:
    """Print a message on stderr, on the first rank only."""
    if is_main_process():
        stderr().print(printable(redact_text(message)) if isinstance(message, str) else message, **kwargs)


def note(message: str) -> None:
    """Print a note: worth knowing, but nothing to do."""
    _graded("note", "cyan", message)


def warn(message: str) -> None:
    """Print a warning: the user may want to change something."""
    _graded("warning", "yellow", message)


def error(message: str) -> None:
    """Print the error that ended the command."""
    _graded("error", "bold red", message)


def emit(text: str, *, end: str = "\n") -> None:
    """Print data on stdout, on the first rank only; nothing else goes to stdout."""
    _write(printable(text) if sys.stdout.isatty() else text, end)


def emit_styled(shown: "RenderableType", *, width: int) -> None:
    """Print styled text on stdout, on the first rank only; without styles if it is no terminal."""
    from rich.console import Console  # noqa: PLC0415 - start-up time

    out, is_terminal = io.StringIO(), sys.stdout.isatty()
    kind = _console_class() if is_terminal else Console
    kind(file=out, force_terminal=is_terminal, width=width, soft_wrap=True, highlight=False).print(shown, end="")
    _write(out.getvalue(), "")


def has_lost_reader() -> bool:
    """Whether the reader of stdout has gone, as `head` does: nothing more needs to be made for it."""
    return bool(getattr(sys.stdout, "has_lost_reader", False))


def _write(text: str, end: str) -> None:
    if is_main_process():
        sys.stdout.write(text + end)
        sys.stdout.flush()


class WorkProgress:
    """Shows how far long work is: a bar on a terminal, else a line every 15 seconds, both with the time left.

    Args:
        what: The work, as the line begins.
        total: The number of units; None if it is not known.
        unit: The name of the units, in the plural.
    """

    def __init__(self, what: str, total: int | None = None, unit: str = "rows") -> None:
        self._what, self._total, self._unit = what, total, unit
        self._done, self._began, self._ended = 0, 0.0, Event()
        self._shown = ExitStack()
        self._bar: Bar | None = None

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        if is_main_process():
            # A thread of its own: a single unit may take longer than the time between two lines.
            Thread(target=self._say_now_and_then, name="progress", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._shown.close()

    def advance(self, count: int = 1) -> None:
        """Count units that are done."""
        self._done += count
        if (
            self._bar is None
            and time.monotonic() - self._began > BAR_SECONDS
            and is_main_process()
            and is_interactive()
        ):
            self._bar = self._shown.enter_context(bar(is_transient=True))
            self._task = self._bar.add_task(self._what, total=self._total, numbers="")
            self._shown.callback(self._bar.remove_task, self._task)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)

    def _say_now_and_then(self) -> None:
        while not self._ended.wait(LINE_SECONDS):
            if self._bar is None:
                say(self._line())

    def _line(self) -> str:
        seconds = time.monotonic() - self._began
        if self._total is None and not self._done:
            return f"{self._what}: {duration(seconds)} so far"
        of = "" if self._total is None else f" of {self._total:,}"
        left = 0.0 if self._total is None or not self._done else seconds / self._done * (self._total - self._done)
        return f"{self._what}: {self._done:,}{of} {self._unit}" + (f", eta {duration(left)}" if left else "")


_bars: list["Bar"] = []
"""The bar on the terminal, if there is one: a terminal has room for one, which may have several lines."""


def is_interactive() -> bool:
    """Whether a bar can be shown."""
    return sys.stderr.isatty() and stderr().is_interactive


@contextmanager
def bar(*, is_transient: bool = False) -> Iterator["Bar"]:
    """Show a bar while the context lasts: the one that is there, or a new one.

    Args:
        is_transient: Remove a new bar from the terminal at the end.
    """
    if _bars:
        yield _bars[0]
        return
    from rich.constrain import Constrain  # noqa: PLC0415
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    class Bar(Progress):
        def get_renderables(self) -> Any:
            # Room for `^C`, which the terminal writes itself: a full line would break at it, and be left behind.
            yield Constrain(self.make_tasks_table(self.tasks), stderr().width - 4)

    class Count(MofNCompleteColumn):
        def render(self, task: Any) -> Any:
            return super().render(task) if task.total is not None else Text(f"{task.completed:,.0f}")

    columns = (TextColumn("{task.description}", markup=False), Count(), BarColumn())
    more = (TextColumn("{task.fields[numbers]}", markup=False), TimeRemainingColumn())
    with Bar(*columns, *more, console=stderr(), transient=is_transient) as shown:
        _bars.append(shown)
        try:
            yield shown
        finally:
            _bars.clear()


def duration(seconds: float) -> str:
    """Return a time as people say it."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minutes}m"
    return f"{minutes}m" if minutes >= 10 else f"{minutes}m {seconds}s" if minutes else f"{seconds}s"


def _graded(grade: str, style: str, message: str) -> None:
    from rich.text import Text  # noqa: PLC0415 - start-up time

    say(Text.assemble((f"{grade}: ", style), printable(redact_text(message))))

"""What the program says, and where: data on stdout, everything else on stderr, rank 0 only.

Plain `print`-like functions over one Rich console, which honours `NO_COLOR`, `FORCE_COLOR` and pipes.
Rich is imported on first use, so that `--help` does not pay for it.
"""

import os
import re
import sys
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


_UNSAFE = re.compile("[\0-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, those that turn the direction of writing, and bytes of file names that are no text."""


def printable(text: str, *, keep: str = "\n\t") -> str:
    """Spell out what could steer a terminal: data and file names are made by strangers."""
    return _UNSAFE.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)


def is_main_process() -> bool:
    """Whether this process is the one that speaks: rank 0, or not distributed at all."""
    return int(os.environ.get("RANK", "0")) == 0


@cache
def stderr() -> "Console":
    """The console that people read."""
    from rich.console import Console  # noqa: PLC0415 - start-up time

    width = None if sys.stderr.isatty() else 200
    # What is said holds recipes and rows: brackets and colons in them are no markup.
    return Console(
        stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=not sys.stderr.isatty(), width=width
    )


def say(message: "RenderableType", **kwargs: Any) -> None:
    """Tell the user something; silent on all ranks but the first."""
    if is_main_process():
        stderr().print(printable(message) if isinstance(message, str) else message, **kwargs)


def note(message: str) -> None:
    """Say something worth knowing that asks for no action."""
    _graded("note", "cyan", message)


def warn(message: str) -> None:
    """Say something that the user may want to change."""
    _graded("warning", "yellow", message)


def error(message: str) -> None:
    """Say what ended the command."""
    _graded("error", "bold red", message)


def emit(text: str, *, end: str = "\n") -> None:
    """Write data to stdout: the only thing that ever goes there."""
    if is_main_process():
        sys.stdout.write(text + end)
        sys.stdout.flush()


def _graded(grade: str, style: str, message: str) -> None:
    from rich.text import Text  # noqa: PLC0415 - start-up time

    say(Text.assemble((f"{grade}: ", style), printable(message)))

"""`run_status.json`: whether a run goes on, or why it ended, for whoever started it.

A launcher may turn every exit code into 1; this file keeps the one that was meant.
"""

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from dpoctl.errors import StoppedError, UserError
from dpoctl.runs.files import to_json, write_atomically
from dpoctl.runs.redact import redact_text
from dpoctl.runs.signals import TerminatedError

NAME = "run_status.json"
INTERRUPTED = 130

State = Literal["running", "finished", "stopped", "failed"]


@contextmanager
def reported(folder: Path) -> Iterator[None]:
    """Keep the file true while the context lasts; for the process that owns the run directory."""
    _write(folder, "running")
    try:
        yield
    except BaseException as error:
        _write(folder, *_end_of(error))
        raise
    _write(folder, "finished", 0)


def settle(folder: Path, code: int, message: str) -> None:
    """Say how a job ended whose first rank could not say so itself; what a rank has said stands."""
    try:
        said = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if said.get("state") == "running":
        _write(folder, "failed" if code < 128 else "stopped", code, message)


def _end_of(error: BaseException) -> tuple[State, int, str]:
    if isinstance(error, StoppedError):
        return "stopped", error.exit_code, str(error)
    if isinstance(error, UserError):
        return "failed", error.exit_code, str(error)
    if isinstance(error, TerminatedError):
        return _end_of(StoppedError(error.signum))
    if isinstance(error, KeyboardInterrupt):
        return "stopped", INTERRUPTED, "interrupted"
    return "failed", 1, f"{type(error).__name__}: {error}"


def _write(folder: Path, state: State, code: int | None = None, message: str | None = None) -> None:
    """Write what is known; a run does not fail because its folder is full."""
    about: dict[str, Any] = {
        "state": state,
        "exit_code": code,
        "message": None if message is None else redact_text(message),
        "checkpoint": _latest(folder),
        "pid": os.getpid(),
        "host": platform.node(),
    }
    try:
        write_atomically(folder / NAME, to_json(about))
    except OSError:
        return


def _latest(folder: Path) -> str | None:
    """The checkpoint that a resume would go on from."""
    try:
        return (folder / "LATEST").read_text(encoding="utf-8").strip() or None
    except OSError:
        return None

"""`run_status.json`: the state of a run, and why it ended.

A launcher may turn every exit code into 1; this file keeps the real one.
"""

import contextlib
import json
import os
import platform
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import psutil

from dpoctl.errors import DataError, SetupError, StoppedError, UsageError, UserError
from dpoctl.files import no_link, to_json, write_atomically
from dpoctl.redact import redact_source
from dpoctl.runs.names import LOG
from dpoctl.runs.signals import TerminatedError, at_abort

NAME = "run_status.json"
INTERRUPTED = 130

State = Literal["running", "finished", "stopped", "failed", "died"]


class Status:
    """The state of a run, as it is recorded."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / NAME
        self._before = _bytes(self._file)

    def restore(self) -> bool:
        """Put back what was recorded before; return False if nothing was, or if training has begun."""
        if self._before is None:
            return False
        with contextlib.suppress(OSError):
            write_atomically(self._file, self._before.decode("utf-8", errors="replace"))
        return True

    def train(self) -> None:
        """Note that training begins: from now on, every end is one of this run."""
        self._before = None


@contextmanager
def recorded_status(folder: Path, *, has_begun: bool = False) -> Iterator[Status]:
    """Record the state of the run at the start and the end of the context; for the process that owns the folder.

    Args:
        folder: The run directory.
        has_begun: True if it holds a run: a command that is refused before it trains leaves the state of that run.
    """
    status = Status(folder)
    if not has_begun:
        status.train()
    _write(folder, "running")
    at_abort(lambda signum: _write(folder, *_describe_end(StoppedError(signum))))
    try:
        yield status
    except BaseException as error:
        is_refusal = isinstance(error, UsageError | DataError | SetupError)
        if not (is_refusal and status.restore()):
            _write(folder, *_describe_end(error))
        raise
    finally:
        at_abort(None)
    _write(folder, "finished", 0)


def read_status(folder: Path) -> dict[str, Any] | None:
    """Return the recorded state of a run; None if there is none.

    A run whose process is dead does not run, whatever is recorded: its state is "died".
    """
    try:
        about = json.loads((folder / NAME).read_text(encoding="utf-8"))
        is_dead = about["state"] == "running" and about["host"] == platform.node() and not _is_alive(about)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return {**about, "state": "died", "message": f"process {about['pid']} has ended"} if is_dead else about


def describe_status(about: Mapping[str, Any]) -> str:
    """Return the state of a run in words that follow "the run"."""
    state, message = about.get("state"), str(about.get("message") or "").partition(";")[0]
    why = f" ({message})" if message else ""
    words = {
        "running": f"is running (process {about.get('pid')} on {about.get('host')})",
        "finished": "has finished",
        "stopped": f"was {message or 'stopped'}",
        "failed": f"has failed{why}",
        "died": f"has died{why}",
    }
    return words.get(str(state), "has not finished")


def _is_alive(about: Mapping[str, Any]) -> bool:
    try:
        # The number may be that of another process by now.
        return bool(abs(psutil.Process(about["pid"]).create_time() - about["process_started"]) < 1)
    except (psutil.NoSuchProcess, KeyError, TypeError, ValueError):
        return False
    except psutil.Error:
        return True


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def record_failed_job(folder: Path, code: int, message: str, pids: Collection[int]) -> None:
    """Record how a job ended whose first rank could not record it; an end that a rank has recorded stays.

    Args:
        folder: The run directory.
        code: The exit code of the job.
        message: The ends of its ranks.
        pids: Their process ids: another process's state is that of an earlier run.
    """
    try:
        recorded = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if recorded.get("state") == "running" and recorded.get("pid") in pids:
        _write(folder, "failed" if code < 128 else "stopped", code, message)


def _describe_end(error: BaseException) -> tuple[State, int, str]:
    if isinstance(error, StoppedError):
        return "stopped", error.exit_code, str(error)
    if isinstance(error, UserError):
        return "failed", error.exit_code, str(error)
    if isinstance(error, TerminatedError):
        return _describe_end(error.as_stopped())
    if isinstance(error, KeyboardInterrupt):
        return "stopped", INTERRUPTED, "interrupted"
    return "failed", 1, f"{type(error).__name__}: {error}"


def _write(folder: Path, state: State, code: int | None = None, message: str | None = None) -> None:
    """Write the file, if possible: a full disk here must not end the run."""
    about: dict[str, Any] = {
        "state": state,
        "exit_code": code,
        "message": None if message is None else redact_source(message),
        "checkpoint": _latest(folder),
        # Told only where messages went there.
        **({"log": LOG} if (folder / LOG).is_file() else {}),
        "pid": os.getpid(),
        "process_started": psutil.Process().create_time(),
        "host": platform.node(),
    }
    text = to_json(about)
    with contextlib.suppress(OSError):
        try:
            write_atomically(folder / NAME, text)
        except OSError:
            # On a full disk, a small file can still be written over.
            with open(folder / NAME, "r+", encoding="utf-8", opener=no_link) as file:
                file.write(text)
                file.truncate()


def _latest(folder: Path) -> str | None:
    """Return the name of the checkpoint that --resume would continue from."""
    try:
        return (folder / "LATEST").read_text(encoding="utf-8").strip() or None
    except (OSError, ValueError):
        return None

"""How a command ends that fails: one line for people, one object for machines, a traceback on demand."""

import contextlib
import json
import os
import sys
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dpoctl import console
from dpoctl.errors import LostRanksError, StoppedError, UsageError, UserError
from dpoctl.runs.redact import redact_source

REPORTS = "DPOCTL_WORKER_REPORTS"
UNEXPECTED = 1

_run_directory: Path | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """What is said about an error.

    Args:
        code: The exit code.
        text: For people; may have several lines.
        details: For machines: code, message, and hint, file, line, column where there are any.
        rank: Of the process that failed.
        foreseen: Whether it is a user's error, and no consequence of another rank's.
    """

    code: int
    text: str
    details: dict[str, Any]
    rank: int = 0
    foreseen: bool = True


def remember_run_directory(path: Path) -> None:
    """Name the folder that gets an error.log, once a run has made itself at home there."""
    global _run_directory
    _run_directory = path


def run_directory() -> Path | None:
    """The folder that was named."""
    return _run_directory


def report(error: Exception, *, as_json: bool, debug: bool) -> int:
    """Say what went wrong and return the exit code.

    Args:
        error: What a command raised.
        as_json: Print an object on stdout too.
        debug: Show the traceback.
    """
    keep_log = not (isinstance(error, UsageError | StoppedError) or _is_command_line(error))
    failure = _describe(error, _write_log(error) if keep_log else None)
    if debug:
        failure = replace(failure, text="".join(traceback.format_exception(error)) + failure.text)
    if folder := os.environ.get(REPORTS):
        with contextlib.suppress(OSError):
            Path(folder, f"rank-{failure.rank}.json").write_text(json.dumps(asdict(failure)), encoding="utf-8")
            return failure.code
    # Launchers that are not ours show every rank's stderr; what all ranks refuse alike is said once.
    if failure.rank == 0 or not isinstance(error, UsageError):
        show(failure, as_json=as_json)
    return failure.code


def show(failure: Failure, *, as_json: bool) -> None:
    """Print a failure on stderr, and on stdout where a machine reads."""
    text = console.printable(failure.text if failure.rank == 0 else f"[rank {failure.rank}] {failure.text}")
    if sys.stderr.isatty():
        from rich.text import Text

        coloured = Text(text)
        coloured.highlight_words(["error:"], "bold red")
        console.stderr().print(coloured, soft_wrap=True)
    else:
        sys.stderr.write(text + "\n")
    if as_json:
        sys.stdout.write(json.dumps({"error": failure.details}) + "\n")


def _describe(error: Exception, log: Path | None) -> Failure:
    rank = int(os.environ.get("RANK", "0"))
    if _is_command_line(error):
        message = _first_lower(error.format_message().rstrip("."))  # type: ignore[attr-defined]
        text = f"error: {message}\n{_where_help_is(error)}"
        return Failure(2, text, {"code": 2, "message": message}, rank)
    if isinstance(error, UserError):
        details = {"code": error.exit_code, "message": error.message, "hint": error.hint} | _places(error)
        text = str(error) if "problems" in details else f"error: {console.printable(str(error), keep='')}"
        return Failure(error.exit_code, text, details, rank, foreseen=not _may_follow(error))
    message = f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"
    where = f"traceback in {log}" if log else "pass --debug for the traceback"
    details = {"code": UNEXPECTED, "message": message, "hint": where}
    return Failure(UNEXPECTED, f"error: {message} ({where})", details, rank, foreseen=False)


def _may_follow(error: UserError) -> bool:
    """Whether an error may be a consequence of another rank's: then no answer comes, and a launcher sends a signal."""
    return isinstance(error, LostRanksError) or (isinstance(error, StoppedError) and error.step is None)


def _places(error: UserError) -> dict[str, Any]:
    """The lines and columns of a refused recipe."""
    problems = [
        {
            "file": problem.place.source,
            "line": problem.place.line or None,
            "column": problem.place.column or None,
            "override": problem.place.override or None,
            "message": problem.message,
        }
        for problem in getattr(error, "problems", [])
    ]
    return problems[0] | {"problems": problems} if problems else {}


def _is_command_line(error: Exception) -> bool:
    """Whether the command line itself is wrong; by shape, for Typer's base class has moved between versions."""
    return hasattr(error, "format_message") and hasattr(error, "exit_code")


def _where_help_is(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "dpoctl"
    return f"see `{command} --help`"


def _first_lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _write_log(error: Exception) -> Path | None:
    """Keep the traceback in the run directory, if there is one that a run has opened."""
    if _run_directory is None or not (_run_directory / "recipe.yaml").is_file():
        return None
    rank = int(os.environ.get("RANK", "0"))
    log = _run_directory / ("error.log" if rank == 0 else f"logs/rank-{rank}.error.log")
    try:
        log.parent.mkdir(exist_ok=True)
        log.write_text(redact_source("".join(traceback.format_exception(error))), encoding="utf-8")
    except OSError:
        return None
    return log

"""Report the error that ends a command: one line for people, one object for machines, a traceback with `--debug`."""

import contextlib
import json
import os
import sys
import time
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dpoctl import console
from dpoctl.errors import DataError, DiskError, LostRanksError, SetupError, StoppedError, UsageError, UserError
from dpoctl.files import write_atomically
from dpoctl.redact import redact, redact_source, redact_text, redact_traceback
from dpoctl.runs.names import own_folder

REPORTS = "DPOCTL_WORKER_REPORTS"
UNEXPECTED = 1
FIRST_RANK_SECONDS = 20.0
"""The time that another rank gives rank 0 to print an error that both have."""

_run_directory: Path | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """An error as it is printed.

    Args:
        code: The exit code.
        text: The text for people; may have several lines.
        details: The object for machines: code, message, and hint, file, line, column where there are any.
        rank: Rank of the process that failed.
        is_cause: False if the error may be a consequence of another rank's error.
    """

    code: int
    text: str
    details: dict[str, Any]
    rank: int = 0
    is_cause: bool = True


def remember_run_directory(path: Path) -> None:
    """Remember the folder that gets the error.log once a run has opened it."""
    global _run_directory
    _run_directory = path


def run_directory() -> Path | None:
    """Return the remembered run directory."""
    return _run_directory


def report(error: BaseException, *, as_json: bool, debug: bool) -> int:
    """Print an error and return the exit code.

    Args:
        error: The exception that a command raised.
        as_json: Print an object on stdout as well.
        debug: Show the traceback.
    """
    # Those change nothing in a run that is there, or need no traceback.
    is_refusal = isinstance(error, UsageError | DataError | SetupError | StoppedError | DiskError)
    needs_log = not (is_refusal or _is_command_line_error(error))
    failure = _describe(error, _write_log(error) if needs_log else None)
    if debug:
        failure = replace(failure, text=redact_traceback("".join(traceback.format_exception(error))) + failure.text)
    if folder := os.environ.get(REPORTS):
        with contextlib.suppress(OSError):
            Path(folder, f"rank-{failure.rank}.json").write_text(json.dumps(asdict(failure)), encoding="utf-8")
            return failure.code
    if failure.rank != 0 and isinstance(error, UsageError):
        # Other launchers show the stderr of every rank, and end all of them with the first that ends. Mostly all ranks
        # have this error: rank 0 must come to print it, and this one is ended then. If not, only this rank has it.
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(FIRST_RANK_SECONDS)
    show(failure, as_json=as_json)
    return failure.code


def show(failure: Failure, *, as_json: bool) -> None:
    """Print a failure on stderr and, as JSON, on stdout."""
    text = failure.text if failure.rank == 0 else f"[rank {failure.rank}] {failure.text}"
    text = console.printable(redact_text(text))
    if sys.stderr.isatty():
        from rich.text import Text

        coloured = Text(text)
        coloured.highlight_words(["error:"], "bold red")
        # Lines of a recipe stay whole, so that the mark below them stands where it should.
        console.stderr().print(coloured, soft_wrap="\n" in text)
    else:
        sys.stderr.write(text + "\n")
    if as_json:
        sys.stdout.write(json.dumps({"error": redact(failure.details)}) + "\n")


def _describe(error: BaseException, log: Path | None) -> Failure:
    rank = console.rank()
    if _is_command_line_error(error):
        message = error.format_message().rstrip(".").replace("Value error, ", "")  # type: ignore[attr-defined]
        message = message[:1].lower() + message[1:]
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "dpoctl"
        text = f"error: {message}\nsee `{command} --help`"
        return Failure(2, text, {"code": 2, "message": message}, rank)
    if isinstance(error, UserError):
        details = {"code": error.exit_code, "message": error.message, "hint": error.hint} | _places(error)
        text = str(error) if "problems" in details else f"error: {console.printable(str(error), keep='')}"
        return Failure(error.exit_code, text, details, rank, is_cause=not _may_be_consequence(error))
    message = f"{type(error).__name__}: {' '.join(redact_source(str(error)).split()) or 'no message'}"
    where = f"the traceback is in {log}" if log else "pass --debug for the traceback"
    details = {"code": UNEXPECTED, "message": message, "hint": where}
    return Failure(UNEXPECTED, f"error: {message} ({where})", details, rank, is_cause=False)


def _may_be_consequence(error: UserError) -> bool:
    """Whether another rank's error may have led to this one: that rank falls silent, and launchers signal the rest."""
    return isinstance(error, LostRanksError) or (isinstance(error, StoppedError) and error.step is None)


def _places(error: UserError) -> dict[str, Any]:
    """The lines and columns of a refused recipe."""
    problems = [problem.to_dict() for problem in getattr(error, "problems", [])]
    if not problems:
        return {}
    return {key: problems[0][key] for key in ("file", "line", "column", "override", "message")} | {"problems": problems}


def _is_command_line_error(error: BaseException) -> bool:
    """Whether Typer refused the command line; recognised by attributes, because its class differs between versions."""
    return hasattr(error, "format_message") and hasattr(error, "exit_code")


def _write_log(error: BaseException) -> Path | None:
    """Write the traceback to the run directory, if a run has opened one."""
    if _run_directory is None or not (_run_directory / "recipe.yaml").is_file():
        return None
    rank = console.rank()
    log = _run_directory / ("error.log" if rank == 0 else f"logs/rank-{rank}.error.log")
    try:
        if rank != 0:
            own_folder(log.parent)
        write_atomically(log, redact_traceback("".join(traceback.format_exception(error))))
    except (OSError, UsageError):
        return None
    return log

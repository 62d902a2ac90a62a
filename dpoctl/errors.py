"""The errors that a user can fix, by kind; each kind has its exit code."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

GATE_FAILED = 4
"""The exit code of a command that measured something which a gate of the recipe does not let pass."""

FULL = (errno.ENOSPC, errno.EDQUOT)
OUT_OF_REACH = (
    *(errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ESTALE),
)


class UserError(Exception):
    """An error that a user can fix: one line that says where, what, and what to do.

    Args:
        message: Where and what, in the user's words; lower case, no full stop at the end.
        hint: What to do about it, if the message alone does not say so.
    """

    exit_code: int = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}; {self.hint}"


class RunError(UserError):
    """The run started and failed: out of memory, a loss that is not finite, a failed self-check."""

    exit_code = 1


class DiskError(RunError):
    """A disk is full, or a folder can no longer be written; what is complete there stays as it is."""

    exit_code = 5

    @classmethod
    def of(cls, error: BaseException, folder: Path, then: str) -> Self | None:
        """Return the error of a folder in which something could not be written; None if it is about something else."""
        code, name = getattr(error, "errno", None), getattr(error, "filename", None)
        # safetensors has errors of its own.
        is_full = code in FULL or "os error 28" in str(error)
        place = folder if name is None else Path(os.fsdecode(name))
        is_inside = place.is_relative_to(folder)
        where = folder if is_inside else place.parent
        if is_full:
            message = f"{where} cannot be written: the disk is full ({room(where)} free)"
            return cls(message, hint=f"free some disk space, then {then}")
        if code in OUT_OF_REACH and name is not None and is_inside:
            reason = getattr(error, "strerror", None) or str(error)
            return cls(f"{where} cannot be written: {reason}", hint=f"fix the cause, then {then}")
        return None


class LostRanksError(RunError):
    """The other processes of the run do not respond; their own errors tell why."""


class UsageError(UserError):
    """The command line or the recipe is wrong."""

    exit_code = 2


class DataError(UserError):
    """The data cannot be read, or has no usable rows."""

    exit_code = 3


class SetupError(UserError):
    """Something is missing on this machine: a package, a device, access to a model."""

    exit_code = 5


class StoppedError(UserError):
    """A signal ended the run.

    Args:
        signum: the signal.
        step: the step whose checkpoint was written; None outside the training loop.
        in_step: True if it ended the run in the middle of a step, or of an evaluation.
    """

    def __init__(self, signum: int, step: int | None = None, *, in_step: bool = False) -> None:
        when = "in the middle of a step" if in_step else "outside the training loop"
        if step is not None:
            when = f"after step {step}; a checkpoint was written"
        super().__init__(
            f"stopped by signal {signum} {when}",
            hint="run the same command with --resume to continue",
        )
        self.step = step
        # By convention a process exits with 128 plus the signal that ended it.
        self.exit_code = 128 + signum


@contextmanager
def writing(folder: Path, then: str = "run the same command again") -> Iterator[None]:
    """Turn an error of the system about what is written to a folder into one line.

    Raises:
        DiskError: The disk is full, or the folder can no longer be written.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (problem := DiskError.of(error, folder, then)) is None:
            raise
        raise problem from error


def room(path: Path) -> str:
    """Return how much is free on the disk of a file or folder, which need not exist."""
    existing = next(place for place in (path, *path.absolute().parents) if place.exists())
    return size_text(shutil.disk_usage(existing).free)


def size_text(count: float) -> str:
    """Return a number of bytes in words."""
    for unit in ("bytes", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.2f} GB"

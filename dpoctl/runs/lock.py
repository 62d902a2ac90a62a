"""One process at a time writes a run directory."""

import fcntl
import json
import os
import platform
from io import TextIOWrapper
from pathlib import Path

from dpoctl.errors import UsageError
from dpoctl.runs.files import to_json

NAME = ".lock"


class RunLock:
    """An exclusive lock on a folder, held until `release` or until the process dies, however it dies.

    Args:
        folder: Must exist.

    Raises:
        UsageError: Another process holds it; says which and where.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._file: TextIOWrapper | None = _acquire(self.path)
        self._file.write(to_json({"pid": os.getpid(), "host": platform.node()}))
        self._file.flush()

    def release(self) -> None:
        """Let go, and leave no trace. Doing so twice is harmless."""
        if self._file is not None:
            self.path.unlink(missing_ok=True)
            self._file.close()
            self._file = None


def _acquire(path: Path) -> TextIOWrapper:
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UsageError(
                f"{path.parent}: {_holder(path)} is writing this run",
                hint="wait until it ends, or choose another training.output_dir",
            ) from None
        except OSError:
            file.close()
            raise
        # The holder before us unlinks its lock as it leaves: what we hold must still be the file in the folder.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            file.truncate(0)
            return file
        file.close()


def _holder(path: Path) -> str:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        return f"process {about['pid']} on {about['host']}"
    except (OSError, ValueError, KeyError):
        return "another process"

"""The folders that every command needs of the machine."""

import os
import tempfile
from pathlib import Path

from dpoctl.errors import SetupError


def require_folders() -> None:
    """Make sure that there is a working directory, and a folder for temporary files.

    Raises:
        SetupError: One of them is missing.
    """
    try:
        Path.cwd()
    except OSError as error:
        what = "has been deleted" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        raise SetupError(
            f"the folder in which dpoctl was called {what}", hint="change to another one with cd"
        ) from error
    try:
        tempfile.gettempdir()
    except OSError as error:
        named = f"; TMPDIR is {os.environ['TMPDIR']}" if "TMPDIR" in os.environ else ""
        raise SetupError(
            f"there is no folder for temporary files: neither /tmp nor another usual one can be written{named}",
            hint="set TMPDIR to a folder that can be written, on a disk with room",
        ) from error

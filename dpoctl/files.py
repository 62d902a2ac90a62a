"""Files that are complete or absent: written to a temporary name, synced to disk, then renamed.

A temporary file or folder is locked while its writer lives: containers that share a folder may give the same number to
several processes, and their clocks may differ.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedWriter
from pathlib import Path
from typing import Any, Literal, TextIO
from uuid import uuid4

import xxhash

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

BLOCK = 1 << 22
TORN = ".*.[0-9a-f]*.tmp"
"""The names of temporary files and folders."""
WAIT_SECONDS = 60.0
"""The longest time that a neighbour may keep a folder locked, who may be stopped."""


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file, text in UTF-8, so that no reader ever sees half of it, also after a kill."""
    # Opened first: once the file has its name, another process may rename the folder, as it does with a checkpoint.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with temporary_file(path) as (temporary, file):
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
        os.fsync(folder)
    finally:
        os.close(folder)


def open_here(path: Path, mode: Literal["a", "w"]) -> TextIO:
    """Open a file to write or to append text; a link in its place is an error, and is not followed.

    Raises:
        OSError: It is a link, or cannot be opened.
    """
    return open(path, mode, encoding="utf-8", newline="\n", opener=no_link)


def no_link(path: str, flags: int) -> int:
    """Open a file for `open` or `FileIO` that is no link."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


@contextmanager
def temporary_file(path: Path) -> Iterator[tuple[Path, BufferedWriter]]:
    """Open a new file beside a path; at the end it is removed, if it was not renamed."""
    temporary, descriptor = _temporary(path, lambda new: os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        # The lock stays until the file has its name, also if the writer closes it before.
        with open(os.dup(descriptor), "wb") as file:  # noqa: PTH123 - it is open already
            yield temporary, file
    finally:
        os.close(descriptor)
        temporary.unlink(missing_ok=True)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Make a new folder beside a path; at the end it is removed, if it was not renamed."""

    def make(new: Path) -> int:
        new.mkdir()
        return os.open(new, os.O_RDONLY)

    temporary, descriptor = _temporary(path, make)
    try:
        yield temporary
    finally:
        os.close(descriptor)
        shutil.rmtree(temporary, ignore_errors=True)


def remove_torn(folder: Path, pattern: str = TORN) -> None:
    """Remove the temporary files and folders in a folder whose writers are dead."""
    for left in folder.glob(pattern):
        with suppress(OSError), _opened(left) as descriptor:
            if _lock(descriptor):
                shutil.rmtree(left) if left.is_dir() else left.unlink()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from the same block about a folder, where folders can be locked."""
    deadline = time.monotonic() + WAIT_SECONDS
    with _opened(folder) as descriptor:
        while _lock(descriptor) is False and time.monotonic() < deadline:
            time.sleep(0.02)
        yield


def to_json(value: Any) -> str:
    """Return readable JSON that any parser accepts.

    Raises:
        ValueError: A number is NaN or infinite, which JSON does not have.
    """
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def sync(path: Path) -> None:
    """Force a file, or the list of names in a folder, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum(path: Path) -> str:
    """Return a checksum of a file, in hex: as fast as it can be read, against damage and not against forgery."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _temporary(path: Path, make: Callable[[Path], int]) -> tuple[Path, int]:
    """Make a file or folder beside a path, open and locked."""
    while True:
        new = path.with_name(f".{path.name}.{uuid4().hex[:8]}.tmp")
        try:
            descriptor = make(new)
        except FileNotFoundError:
            if path.parent.is_dir():
                continue
            raise
        if _claim(descriptor, new):
            return new, descriptor
        os.close(descriptor)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    # A link is not followed, and a pipe is not waited for.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _claim(descriptor: int, path: Path) -> bool:
    """Lock what was just made; return False if another process has taken it for torn."""
    try:
        return _lock(descriptor) is not False and os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _lock(descriptor: int) -> bool | None:
    """Lock an open file or folder; return False if another process has locked it, None if it cannot be locked."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (OSError, AttributeError):
        return None
    return True

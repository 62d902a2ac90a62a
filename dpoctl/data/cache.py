"""The cache folder: files that later runs use again, each with a checksum that is verified before it is used."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import xxhash

from dpoctl import console
from dpoctl.errors import FULL, SetupError, room

READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
NO_FOLDER = (errno.EEXIST, errno.ENOTDIR)


def cache_dir() -> Path:
    """Return the folder in which everything derived from data is kept.

    Raises:
        SetupError: The user has no home folder, and names no other.
    """
    if own := os.environ.get("DPOCTL_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base).expanduser() if base else Path.home() / ".cache") / "dpoctl"
    except RuntimeError as error:
        raise SetupError("there is no home folder for the cache folder", hint="set DPOCTL_CACHE to a folder") from error


@dataclass(frozen=True)
class Cache:
    """The cache folder, and what takes its place where it is read-only.

    Attributes:
        folder: the cache folder; it need not exist.
        spare: a folder for new files where the cache folder is read-only; None refuses to go on there.
    """

    folder: Path
    spare: Path | None = None

    def folders(self, kind: str) -> list[Path]:
        """Return the folders that may hold files of a kind."""
        return [base / kind for base in (self.folder, self.spare) if base is not None]

    def writable(self, kind: str) -> Path:
        """Return the folder for new files of a kind, after making it.

        Raises:
            SetupError: No file can be written there.
        """
        try:
            return _made(self.folder / kind)
        except OSError as error:
            if self.spare is None or error.errno not in READ_ONLY:
                raise cannot_write(self.folder, error) from error
            _say_instead(self.folder, self.spare, error.strerror)
        try:
            return _made(self.spare / kind)
        except OSError as error:
            raise cannot_write(self.spare, error) from error


@cache
def _say_instead(folder: Path, spare: Path, reason: str | None) -> None:
    console.note(
        f"the cache folder {folder} cannot be written ({reason}): new files go to {spare}; "
        "set DPOCTL_CACHE to a folder that later runs can use too"
    )


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turn an error of the system about a folder of the cache into one line that says what to do.

    Raises:
        SetupError: A file in it could not be written.
    """
    try:
        yield
    except OSError as error:
        name = error.filename if isinstance(error.filename, str | os.PathLike) else None
        if error.errno in FULL or (name is not None and Path(name).is_relative_to(folder)):
            raise cannot_write(folder, error) from error
        raise


def cannot_write(folder: Path, error: OSError) -> SetupError:
    """Return the error of a folder of the cache that cannot be written."""
    reason = "it is a file, or below one" if error.errno in NO_FOLDER else error.strerror or str(error)
    free = f" ({room(folder)} free)" if error.errno in FULL else ""
    hint = (
        "free some space, or set DPOCTL_CACHE to a folder with more" if free else "set DPOCTL_CACHE to another folder"
    )
    return SetupError(f"the cache folder {folder} cannot be written: {reason}{free}", hint=hint)


def is_folder(path: Path) -> bool:
    """Whether there is a folder that can be looked into."""
    try:
        return path.is_dir()
    except OSError:
        return False


def checksum_of(content: bytes) -> bytes:
    """Return the checksum of some bytes."""
    return xxhash.xxh3_128_digest(content)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    # Whether a file can be written is known after one was written.
    with tempfile.TemporaryFile(dir=folder):
        return folder

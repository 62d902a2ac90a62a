"""The run directory: its lock, its files, and the effect of `--resume` and `--overwrite`."""

import json
import os
import platform
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from dpoctl import console
from dpoctl.errors import FULL, SetupError, UsageError, room
from dpoctl.files import TORN, open_here, remove_torn, to_json, write_atomically
from dpoctl.runs import checkpoint, status
from dpoctl.runs.names import CHECKPOINTS, RESOLVED_RECIPE

MODEL_FILES = (
    *("README.md", "model_manifest.json", "config.json", "generation_config.json", "adapter_config.json"),
    *("*.safetensors", "*.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "sentencepiece.bpe.model", "spiece.model", "chat_template.jinja"),
)
"""The files of a model at the root of a run directory."""
OWN_FILES = (
    *MODEL_FILES,
    *("recipe.yaml", RESOLVED_RECIPE, "env.json", "data_report.json", "rejects.jsonl"),
    *("advice.json", "health.json", "expected.json", "report.html"),
    *("metrics.jsonl", "best.json", "trackers.json", "error.log", checkpoint.LATEST),
)
OWN_FOLDERS = (CHECKPOINTS, "evals", "logs", "merged", "samples", "step-[0-9]*", "tensorboard")
"""With `OWN_FILES`, everything that a run writes at the root of its directory: nothing else is ever deleted there."""
CACHE = "cache"
"""The folder that takes the place of a cache folder that is read-only; a new run uses it again."""
LOCK = ".lock"
LOCK_SECONDS = 0.3
"""A process that is just ending gets this long to release the lock."""


class RunDirectory:
    """The files of a run by name. Rank 0 opens it with `open`, which locks it; other ranks construct it.

    Args:
        path: The `training.output_dir` of the recipe.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).expanduser()
        self._lock: FileLock | None = None

    @classmethod
    def open(cls, path: Path | str, *, resume: bool = False, overwrite: bool = False, clear: bool = True) -> Self:
        """Lock a run directory and prepare it for a run.

        Args:
            path: Created if it does not exist. Write `RESOLVED_RECIPE` first: this file marks the folder as a run.
            resume: Continue the run in it. Start a run if there is none: a scheduler repeats its command.
            overwrite: Delete the run in it. Files that are not part of a run are kept.
            clear: Delete now; if False, the caller calls `clear`, once nothing speaks against the new run.

        Raises:
            UsageError: The directory is not empty and neither option was given, or both were; it holds something
                other than a run; or another process is writing to it.
            SetupError: It cannot be created or written.
        """
        run = cls(path)
        if resume and overwrite:
            raise UsageError("--resume and --overwrite cannot be used together")
        try:
            run._refuse_unless_free(resume=resume, overwrite=overwrite)
            run.path.mkdir(parents=True, exist_ok=True)
            run._acquire_lock()
            # Another process may have written a run since.
            run._refuse_unless_free(resume=resume, overwrite=overwrite)
            if clear and (overwrite or not run.has_begun()):
                run.clear()
            run._recover()
        except UsageError:
            run.close()
            raise
        except OSError as error:
            run.close()
            free = f" ({room(run.path)} free)" if error.errno in FULL else ""
            reason = f"{error.strerror or error}{free}"
            raise SetupError(f"training.output_dir: {run.path} cannot be used: {reason}") from error
        return run

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / CHECKPOINTS

    @property
    def metrics(self) -> Path:
        """The file of the metrics, for `MetricsFile`."""
        return self.path / "metrics.jsonl"

    @property
    def rejects(self) -> Path:
        """The file of the rows that are not trained on, with reasons."""
        return self.path / "rejects.jsonl"

    @property
    def resolved_recipe(self) -> Path:
        """The file of the recipe with all defaults; it marks the folder as a run."""
        return self.path / RESOLVED_RECIPE

    @property
    def cache(self) -> Path:
        """The folder that takes the place of a cache folder that is read-only."""
        return self.path / CACHE

    def write_text(self, name: str, text: str) -> Path:
        """Write a file of the run, completely or not at all; `name` may contain folders."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
        return path

    def write_json(self, name: str, value: Any) -> Path:
        """Write a value as readable JSON, completely or not at all."""
        return self.write_text(name, to_json(value))

    def close(self) -> None:
        """Release the lock and delete its file. Doing so twice is harmless."""
        if self._lock is not None:
            (self.path / LOCK).unlink(missing_ok=True)
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _acquire_lock(self) -> None:
        lock = FileLock(self.path / LOCK, fallback_to_soft=False)
        try:
            lock.acquire(timeout=LOCK_SECONDS)
        except Timeout:
            raise UsageError(
                f"{self.path}: {_holder(self.path / LOCK)} is writing to this run directory",
                hint="wait until it ends, or choose another training.output_dir",
            ) from None
        self._lock = lock
        # For the error message of other processes.
        with open_here(self.path / LOCK, "w") as file:
            file.write(to_json({"pid": os.getpid(), "host": platform.node()}))

    def _entries(self) -> list[Path]:
        if not self.path.exists():
            return []
        # Written before the resolved recipe, so a killed process may leave them alone.
        ignored = (LOCK, status.NAME, CACHE, TORN)
        return sorted(entry for entry in self.path.iterdir() if not _matches(entry, ignored))

    def has_begun(self) -> bool:
        """Whether the run has results: one that failed before its first step has only its own small files."""
        return self.metrics.exists() or self.checkpoints.exists() or any(self.path.glob("*.safetensors"))

    def _refuse_unless_free(self, *, resume: bool, overwrite: bool) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"training.output_dir: {self.path} is a file", hint="choose another training.output_dir")
        self._refuse_links()
        entries = self._entries()
        if not entries:
            return
        if not (resume or overwrite) and (self.has_begun() or not self.resolved_recipe.is_file()):
            raise UsageError(
                f"training.output_dir: {self.path} is not empty",
                hint="pass --resume to continue the run in it, pass --overwrite to delete it, "
                "or choose another training.output_dir",
            )
        if not self.resolved_recipe.is_file():
            raise UsageError(
                f"training.output_dir: {self.path} is not a run of dpoctl: "
                f"it contains {entries[0].name}, but no {RESOLVED_RECIPE}",
                hint="choose another training.output_dir",
            )

    def _refuse_links(self) -> None:
        """Refuse names that a run writes or deletes and that are links to another place."""
        own = (*OWN_FILES, *OWN_FOLDERS, LOCK, status.NAME, CACHE)
        entries = self.path.iterdir() if self.path.is_dir() else ()
        links = sorted(entry.name for entry in entries if entry.is_symlink() and _matches(entry, own))
        if links:
            raise UsageError(
                f"{self.path}: {', '.join(links)} is a symbolic link, which no run follows",
                hint="remove the link, or choose another training.output_dir",
            )
        lock = self.path / LOCK
        if lock.exists() and (not lock.is_file() or lock.stat().st_nlink > 1):
            raise UsageError(f"{lock} is no file of a run: another name has the same content", hint="remove it")

    def _recover(self) -> None:
        """Delete files that a killed process left half-written."""
        for folder in (self.path, *(self.path / name for name in OWN_FOLDERS)):
            remove_torn(folder)
        checkpoint.recover(self.checkpoints)

    def clear(self) -> None:
        """Delete the run in the folder. Files that no run writes are kept."""
        # The resolved recipe goes last, so that a deletion that was killed can be repeated.
        own = [entry for entry in self._entries() if _is_own(entry) and entry != self.resolved_recipe]
        for entry in [*own, self.resolved_recipe]:
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)
        if kept := [entry.name for entry in self._entries()]:
            console.note(f"{self.path}: --overwrite kept files that are not part of a run: {', '.join(kept)}")


def _is_own(entry: Path) -> bool:
    if entry.is_symlink():
        return _matches(entry, OWN_FILES + OWN_FOLDERS)
    return _matches(entry, OWN_FOLDERS if entry.is_dir() else OWN_FILES)


def _matches(entry: Path, patterns: tuple[str, ...]) -> bool:
    return any(entry.match(pattern) for pattern in patterns)


def _holder(path: Path) -> str:
    """Return the name of the process that holds a lock."""
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        return f"process {about['pid']} on {about['host']}"
    except (OSError, ValueError, KeyError):
        return "another process"

"""The run directory: who may write it, what it holds, and what `--resume` and `--overwrite` do to it."""

import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dpoctl import console
from dpoctl.errors import SetupError, UsageError
from dpoctl.runs import checkpoint, lock, status
from dpoctl.runs.files import to_json, write_atomically
from dpoctl.runs.lock import RunLock

RESOLVED_RECIPE = "recipe.resolved.yaml"
MODEL_FILES = (
    *("README.md", "config.json", "generation_config.json", "adapter_config.json"),
    *("*.safetensors", "*.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "sentencepiece.bpe.model", "spiece.model", "chat_template.jinja"),
)
"""What makes up a model at the root of a run directory."""
OWN_FILES = (
    *MODEL_FILES,
    *("recipe.yaml", RESOLVED_RECIPE, "env.json", "data_report.json", "rejects.jsonl"),
    *("advice.json", "health.json", "report.html"),
    *("metrics.jsonl", "eval.json", "trackers.json", "error.log", checkpoint.LATEST),
)
OWN_FOLDERS = ("checkpoints", "logs", "merged", "samples", "tensorboard")
"""With `OWN_FILES`, all that a run writes at the root of its directory: nothing else is ever deleted there."""
_TORN = ".*.[0-9]*.tmp"  # what a killed `write_atomically` leaves
_STAGING = ".export-*"  # where a model is written before its files are moved to the root


class RunDirectory:
    """A run's files by name. Rank 0 makes one with `open`, which locks it; other ranks construct it.

    Args:
        path: The `training.output_dir` of the recipe.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).expanduser()
        self._lock: RunLock | None = None

    @classmethod
    def open(cls, path: Path | str, *, resume: bool = False, overwrite: bool = False) -> Self:
        """Take possession of a run directory.

        Args:
            path: Created if need be. Write `RESOLVED_RECIPE` first: it is what makes the folder a run.
            resume: Go on with the run that is there. With nothing there, start: a scheduler repeats its command.
            overwrite: Delete the run that is there. Files that no run writes are kept.

        Raises:
            UsageError: The directory is not empty and neither was asked for, both were, it holds something
                else than a run, or another process is writing it.
            SetupError: It cannot be created or written.
        """
        run = cls(path)
        if resume and overwrite:
            raise UsageError("--resume and --overwrite exclude each other", hint="give one of them")
        try:
            run._refuse_unless_free(resume=resume, overwrite=overwrite)
            run.path.mkdir(parents=True, exist_ok=True)
            run._lock = RunLock(run.path)
            if overwrite or not run._has_begun():
                run._delete_own()
            run._recover()
        except OSError as error:
            run.close()
            raise SetupError(f"{run.path}: cannot be used as an output directory: {error}") from error
        return run

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """The file for `MetricsFile`."""
        return self.path / "metrics.jsonl"

    @property
    def rejects(self) -> Path:
        """Rows that are not trained on, with their reasons."""
        return self.path / "rejects.jsonl"

    @property
    def resolved_recipe(self) -> Path:
        """The recipe with all defaults filled in; its presence makes a folder a run."""
        return self.path / RESOLVED_RECIPE

    def write_text(self, name: str, text: str) -> Path:
        """Write a file of the run, whole or not at all; `name` may hold folders."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
        return path

    def write_json(self, name: str, value: Any) -> Path:
        """Write a value as readable JSON, whole or not at all."""
        return self.write_text(name, to_json(value))

    def close(self) -> None:
        """Let other processes have it."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _entries(self) -> list[Path]:
        if not self.path.exists():
            return []
        # What is written before the mark of a run; a kill in between leaves it alone there.
        ignored = (lock.NAME, status.NAME, _TORN, _STAGING)
        return sorted(entry for entry in self.path.iterdir() if not _matches(entry, ignored))

    def _has_begun(self) -> bool:
        """Whether there is anything to lose: a run that failed before its first step leaves only its own notes."""
        return self.metrics.exists() or self.checkpoints.exists() or any(self.path.glob("*.safetensors"))

    def _refuse_unless_free(self, *, resume: bool, overwrite: bool) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"{self.path} is a file, not a directory", hint="choose another training.output_dir")
        entries = self._entries()
        if not entries:
            return
        if not (resume or overwrite) and (self._has_begun() or not self.resolved_recipe.is_file()):
            raise UsageError(
                f"{self.path} is not empty",
                hint="go on with the run in it with --resume, delete it with --overwrite, "
                "or choose another training.output_dir",
            )
        if not self.resolved_recipe.is_file():
            raise UsageError(
                f"{self.path} is not a run of dpoctl: it holds {entries[0].name} and no {RESOLVED_RECIPE}",
                hint="choose another training.output_dir",
            )
        links = [entry.name for entry in entries if overwrite and _is_own(entry) and entry.is_symlink()]
        if links:
            raise UsageError(
                f"{self.path}: {', '.join(links)} is a symbolic link, and --overwrite follows none",
                hint="remove the link yourself, or choose another training.output_dir",
            )

    def _recover(self) -> None:
        """Remove what a killed process was writing; nothing of it was ever read."""
        for torn in self.path.glob(_TORN):
            torn.unlink()
        for staging in self.path.glob(_STAGING):
            shutil.rmtree(staging, ignore_errors=True)
        checkpoint.recover(self.checkpoints)

    def _delete_own(self) -> None:
        # The mark of a run goes last: a deletion that is killed can then be repeated.
        own = [entry for entry in self._entries() if _is_own(entry) and entry != self.resolved_recipe]
        for entry in [*own, self.resolved_recipe]:
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)
        if kept := [entry.name for entry in self._entries()]:
            console.note(f"{self.path}: kept what no run writes: {', '.join(kept)}")


def _is_own(entry: Path) -> bool:
    if entry.is_symlink():
        return _matches(entry, OWN_FILES + OWN_FOLDERS)
    return _matches(entry, OWN_FOLDERS if entry.is_dir() else OWN_FILES)


def _matches(entry: Path, patterns: tuple[str, ...]) -> bool:
    return any(entry.match(pattern) for pattern in patterns)

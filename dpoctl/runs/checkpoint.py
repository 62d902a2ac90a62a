"""Checkpoints that survive anything: killed, torn or flipped, the newest good one is found again.

A save is copied to the host and written while training goes on: to `.tmp-step-000100`, synced, given a manifest of
checksums, and renamed to `step-000100` by rank 0 once every rank is done. Old checkpoints are retired only after that.
Weights, optimizer and random states are safetensors and JSON: reading a checkpoint runs no code.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from dpoctl import console
from dpoctl.errors import RunError
from dpoctl.runs import manifest
from dpoctl.runs.environment import installed_version
from dpoctl.runs.files import sync, to_json, write_atomically
from dpoctl.runs.tree import copy_tree, read_tree, tree_bytes, write_tree

LATEST = "LATEST"
POLL_SECONDS = 0.05
PATIENCE = 600.0
"""Seconds that a run which fails gives its last checkpoint."""
_STEP = r"step-\d{6,}"


@dataclass
class Checkpoint:
    """All that a run needs to go on as if it had never stopped."""

    step: int
    """Optimizer steps done; also the position in the data."""
    weights: dict[str, Tensor]
    """The trainable tensors by name."""
    optimizer: dict[str, Any]
    """A torch optimizer's `state_dict()`."""
    rng: dict[str, Any]
    """What `dpoctl.runs.rng.capture` returned; empty when read by a rank that did not exist at the save."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Anything else that is plain data: counters, the token budget, the recipe's fingerprint."""
    reference: dict[str, Tensor] = field(default_factory=dict)
    """The tensors of a reference that moves with the run, by name; empty where it stays what it was."""
    world_size: int = 1
    """How many processes wrote it; set by `load`."""


class Saver:
    """Writes checkpoints while training goes on; every rank has one, and calls it at the same steps.

    Args:
        checkpoints: The folder that holds them all; `LATEST` is written beside it.
        rank: This process.
        world_size: Number of processes.
        barrier: Returns once every rank has called it. All ranks meet it equally often, also when one of them fails.
        keep: How many good checkpoints to keep at least; None keeps all.
        sharded: Whether weights and optimizer differ from rank to rank.
    """

    def __init__(
        self,
        checkpoints: Path,
        *,
        rank: int = 0,
        world_size: int = 1,
        barrier: Callable[[], None] = lambda: None,
        keep: int | None = None,
        sharded: bool = False,
    ) -> None:
        self._checkpoints, self._rank, self._world_size = checkpoints, rank, world_size
        self._barrier, self._keep, self._sharded = barrier, keep, sharded
        self._current: _Save | None = None

    def save(self, checkpoint: Checkpoint) -> None:
        """Copy a checkpoint to the host and begin to write it; the one before is finished first.

        Args:
            checkpoint: Random states are written by every rank, the rest by rank 0 alone unless `sharded`.

        Raises:
            RunError: On every rank, if any could not write the one before. A single process also says at once that it
                cannot begin this one.
        """
        self.wait()
        save = _Save(self._checkpoints, checkpoint)
        if self._rank == 0:
            save.problem = _attempt(save.prepare)
        self._barrier()
        if save.problem is None:
            save.checkpoint = copied(checkpoint)
            save.start(self._rank, self._world_size, self._keep, self._sharded)
        self._current = save
        if save.problem is not None and self._world_size == 1:
            self.wait()

    def wait(self) -> None:
        """Finish the checkpoint that is being written, on all ranks.

        Raises:
            RunError: On every rank, if any could not write its part. Older checkpoints are untouched.
        """
        save, self._current = self._current, None
        if save is None:
            return
        save.wait_for_part()
        self._barrier()
        save.finish()
        self._barrier()
        if save.problem or not save.final.exists():
            self._barrier()
            if self._rank == 0:
                shutil.rmtree(save.temporary, ignore_errors=True)
            raise save.failure()

    def abandon(self) -> None:
        """Let what is being written come to its end if it can, without the other ranks; for a run that fails."""
        if self._current is not None:
            self._current.join(PATIENCE)
            self._current = None


def save(checkpoints: Path, checkpoint: Checkpoint, **options: Any) -> Path:
    """Write a checkpoint and wait for it; every rank calls this at the same step.

    Args:
        checkpoints: The folder that holds them all.
        checkpoint: What to write.
        options: Of `Saver`.

    Returns:
        The folder of the new checkpoint.

    Raises:
        RunError: On every rank, if any could not write its part. Older checkpoints are untouched.
    """
    saver = Saver(checkpoints, **options)
    saver.save(checkpoint)
    saver.wait()
    return checkpoints / f"step-{checkpoint.step:06d}"


class _Save:
    """One checkpoint on its way to the disk, in a thread of its own."""

    def __init__(self, checkpoints: Path, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.final = checkpoints / f"step-{checkpoint.step:06d}"
        self.temporary = checkpoints / f".tmp-{self.final.name}"
        self.problem: str | None = None
        self.thread: Thread | None = None
        self._part_is_written, self._all_have_tried = Event(), Event()

    def prepare(self) -> None:
        self.temporary.parent.mkdir(parents=True, exist_ok=True)
        if self.temporary.exists():
            shutil.rmtree(self.temporary)
        if shutil.disk_usage(self.temporary.parent).free < self._bytes():
            raise OSError("the disk is too full for it")
        self.temporary.mkdir()

    def start(self, rank: int, world_size: int, keep: int | None, sharded: bool) -> None:
        about = {"step": self.checkpoint.step, "world_size": world_size, "sharded": sharded}
        self.thread = Thread(target=self._write, args=(rank, about, keep), name="checkpoint", daemon=True)
        self.thread.start()

    def wait_for_part(self) -> None:
        if self.thread is not None:
            self._part_is_written.wait()

    def finish(self) -> None:
        self._all_have_tried.set()
        self.join(None)

    def join(self, seconds: float | None) -> None:
        if self.thread is not None:
            self.thread.join(seconds)

    def failure(self) -> RunError:
        gib = 2**30
        folder = next(parent for parent in self.temporary.parents if parent.exists())
        free = shutil.disk_usage(folder).free / gib
        problem = self.problem or "another rank could not write its part"
        return RunError(
            f"{self.temporary.parent}: the checkpoint of step {self.checkpoint.step} could not be saved: {problem}",
            hint=f"it needs about {self._bytes() / gib:.2f} GiB and {free:.2f} GiB are free; make room, "
            "then go on with --resume",
        )

    def _bytes(self) -> int:
        saved = self.checkpoint
        return tree_bytes([saved.weights, saved.optimizer, saved.reference, saved.rng])

    def _write(self, rank: int, about: dict[str, Any], keep: int | None) -> None:
        self.problem = _attempt(lambda: _write_part(self.temporary, self.checkpoint, rank, about["sharded"]))
        self._part_is_written.set()
        if rank != 0 or self.problem is not None:
            return
        parts = [self.temporary / _part(other) for other in range(about["world_size"])]
        # A part is there once it is whole. When all have tried, one that is missing will not come any more.
        while not all(part.exists() for part in parts) and not self._all_have_tried.wait(POLL_SECONDS):
            pass
        if all(part.exists() for part in parts):
            self.problem = _attempt(lambda: _commit(self.temporary, self.final, about))
        if self.problem is None and self.final.exists():
            _publish(self.final)
            _retire(self.final.parent, self.final, keep)


def newest(checkpoints: Path) -> Path | None:
    """The newest checkpoint whose every byte is as it was written; None if none was ever written.

    Warns once if newer ones are damaged.

    Raises:
        RunError: There are checkpoints, and all are damaged.
    """
    damaged: list[str] = []
    for folder in reversed(_steps(checkpoints)):
        damage = manifest.find_damage(folder)
        if damage is None:
            if damaged:
                console.warn(f"damaged checkpoint: {'; '.join(damaged)}; going back to {folder.name}")
            return folder
        damaged.append(f"{folder.name} ({damage})")
    if damaged:
        raise RunError(
            f"{checkpoints}: no checkpoint is usable: {'; '.join(damaged)}",
            hint="restore one from a backup, or start again with --overwrite",
        )
    return None


def copied(checkpoint: Checkpoint) -> Checkpoint:
    """Return a copy on the host, which further training does not change."""
    copies: dict[Any, Tensor] = {}
    parts = (checkpoint.weights, checkpoint.optimizer, checkpoint.rng, checkpoint.extra, checkpoint.reference)
    weights, optimizer, rng, extra, reference = (copy_tree(part, copies) for part in parts)
    return replace(checkpoint, weights=weights, optimizer=optimizer, rng=rng, extra=extra, reference=reference)


def load(path: Path, rank: int = 0) -> Checkpoint:
    """Read a rank's part of a checkpoint; tensors are on the CPU.

    Raises:
        RunError: The checkpoint cannot be read, or it is sharded and holds nothing for this rank.
    """
    try:
        about = manifest.read_manifest(path)
        known = rank < about["world_size"]
        if about["sharded"] and not known:
            raise ValueError(f"it is cut into {about['world_size']} shards and has none for rank {rank}")
        shard = _suffix(rank, about["sharded"])
        state = read_tree(path, "state")
        return Checkpoint(
            step=state["step"],
            weights=read_tree(path, f"weights{shard}"),
            optimizer=read_tree(path, f"optimizer{shard}"),
            rng=read_tree(path, f"rng-rank-{rank}") if known else {},
            extra=state["extra"],
            reference=read_tree(path, f"reference{shard}") if (path / f"reference{shard}.json").exists() else {},
            world_size=about["world_size"],
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise RunError(f"{path}: checkpoint cannot be read: {error}") from error


def recover(checkpoints: Path) -> None:
    """Finish or remove what a killed save left behind; rank 0 calls this before it looks for the newest.

    A temporary folder whose manifest verifies lacks nothing but its name; any other is removed.
    """
    for folder in _leftovers(checkpoints, "tmp"):
        final = folder.with_name(folder.name.removeprefix(".tmp-"))
        if not final.exists() and manifest.find_damage(folder) is None:
            folder.rename(final)
            _publish(final)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    for folder in _leftovers(checkpoints, "trash"):
        shutil.rmtree(folder, ignore_errors=True)


def _attempt(action: Callable[[], None]) -> str | None:
    """Why an action failed, or None: a rank that raised here would leave the others waiting."""
    try:
        action()
    except (OSError, SafetensorError) as error:
        return str(error)
    return None


def _suffix(rank: int, sharded: bool) -> str:
    return f"-rank-{rank}" if sharded else ""


def _write_part(folder: Path, checkpoint: Checkpoint, rank: int, sharded: bool) -> None:
    names = write_tree(folder, f"rng-rank-{rank}", checkpoint.rng)
    if rank == 0 or sharded:
        names += write_tree(folder, f"weights{_suffix(rank, sharded)}", checkpoint.weights)
        names += write_tree(folder, f"optimizer{_suffix(rank, sharded)}", checkpoint.optimizer)
        if checkpoint.reference:
            names += write_tree(folder, f"reference{_suffix(rank, sharded)}", checkpoint.reference)
    if rank == 0:
        names += write_tree(folder, "state", {"step": checkpoint.step, "extra": checkpoint.extra})
    # Written last, so that rank 0 takes a missing one for a rank that failed.
    write_atomically(folder / _part(rank), to_json(manifest.describe_files(folder, names)))


def _part(rank: int) -> str:
    return f"part-rank-{rank}.json"


def _commit(temporary: Path, final: Path, about: dict[str, Any]) -> None:
    files: dict[str, Any] = {}
    for part in [temporary / _part(rank) for rank in range(about["world_size"])]:
        files |= json.loads(part.read_text(encoding="utf-8"))
        part.unlink()
    versions = {name: installed_version(name) for name in ("dpoctl", "torch", "safetensors")}
    manifest.write_manifest(temporary, {**about, "versions": versions, "files": files})
    if final.exists():  # a damaged one of the same step, met again after falling back behind it
        _discard(final)
    # The one moment that decides: whatever fails after it, the checkpoint is there for every rank.
    temporary.rename(final)


def _publish(final: Path) -> None:
    try:
        sync(final.parent)
        write_atomically(final.parent.with_name(LATEST), final.name + "\n")
    except OSError as error:
        console.warn(f"{LATEST} could not be updated to {final.name}: {error}")


def _retire(checkpoints: Path, final: Path, keep: int | None) -> None:
    """Remove all but the newest good checkpoints. A damaged one counts for nothing and is left for its owner."""
    good = [folder for folder in _steps(checkpoints) if manifest.find_damage(folder, hashes=False) is None]
    try:
        for folder in good[:-keep] if keep else []:
            if folder != final:
                _discard(folder)
        for trash in _leftovers(checkpoints, "trash"):
            shutil.rmtree(trash)
    except OSError as error:
        console.warn(f"an old checkpoint could not be removed: {error}")


def _discard(folder: Path) -> None:
    trash = folder.with_name(f".trash-{folder.name}")
    shutil.rmtree(trash, ignore_errors=True)
    folder.rename(trash)


def _leftovers(checkpoints: Path, kind: str) -> list[Path]:
    return [folder for folder in _folders(checkpoints) if re.fullmatch(rf"\.{kind}-{_STEP}", folder.name)]


def _steps(checkpoints: Path) -> list[Path]:
    """The finished checkpoints, oldest first, good or not."""
    steps = [folder for folder in _folders(checkpoints) if re.fullmatch(_STEP, folder.name)]
    return sorted(steps, key=lambda folder: int(folder.name.removeprefix("step-")))


def _folders(checkpoints: Path) -> list[Path]:
    if not checkpoints.is_dir():
        return []
    return [entry for entry in checkpoints.iterdir() if entry.is_dir() and not entry.is_symlink()]

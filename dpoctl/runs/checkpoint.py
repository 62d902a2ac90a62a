"""Checkpoints: after a kill at any instant, or damage to files, the newest good one is found again.

A checkpoint is copied to the CPU and written in a thread while training continues: to `.tmp-step-000100`, synced, given
a manifest of checksums, and renamed to `step-000100` by rank 0 once every rank has written its part. Old checkpoints
are deleted only after that. All files are safetensors and JSON: reading a checkpoint runs no code.
"""

import hashlib
import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from dpoctl import console
from dpoctl.errors import DiskError, RunError, room, size_text
from dpoctl.files import sha256, sync, to_json, write_atomically
from dpoctl.runs.environment import installed_version
from dpoctl.runs.names import MANIFEST, own_folder
from dpoctl.runs.serialization import copy_tree, read_rows, read_tree, tree_bytes, write_tree

LATEST = "LATEST"
POLL_SECONDS = 0.05
ABANDON_SECONDS = 600.0
"""How long a failing run waits for its part of the checkpoint that is being written."""
OTHERS_SECONDS = 30.0
"""How long it then waits for the parts of the other ranks, which may be dead."""
_STEP = r"step-\d{6,}"
FORMAT = 2
SHARDED = ("weights", "optimizer", "reference")
"""The trees of a checkpoint that are divided, if the model is."""


@dataclass
class Checkpoint:
    """Everything that a run needs to continue as if it had never stopped."""

    step: int
    """Number of optimizer steps done; also the position in the data."""
    weights: dict[str, Tensor]
    """The trainable tensors by name."""
    optimizer: dict[str, Any]
    """A torch optimizer's `state_dict()`."""
    rng: dict[str, Any]
    """The random states from `capture_rng`; empty for a rank that did not exist when the checkpoint was written."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Other plain data: counters, the token budget, fingerprints of what the run depends on."""
    reference: dict[str, Tensor] = field(default_factory=dict)
    """The tensors of a reference that follows the policy, by name; empty for a fixed reference."""
    best: int | None = None
    """The step of the best checkpoint so far, which is kept as long as this one; None if there is none."""
    world_size: int = 1
    """Number of processes that wrote it; set by `load`."""

    def random_states(self) -> "Checkpoint":
        """Return the part of a rank that writes nothing but its random states."""
        return Checkpoint(self.step, {}, {}, self.rng)

    def release(self) -> None:
        """Drop all tensors, once they are restored."""
        for part in (self.weights, self.optimizer, self.rng, self.reference):
            part.clear()


class Saver:
    """The checkpoint writer: writes in a thread; every rank has one, and calls it at the same steps.

    Args:
        checkpoints: The folder of all checkpoints; `LATEST` is written next to it.
        rank: Rank of this process.
        world_size: Number of processes.
        barrier: Returns once every rank has called it. All ranks call it equally often, also if one of them fails.
        keep: Number of good checkpoints to keep; None keeps all.
        shards: The number of parts that weights and optimizer state are divided into; rank n holds part n, and ranks
            above hold copies.
    """

    def __init__(
        self,
        checkpoints: Path,
        *,
        rank: int = 0,
        world_size: int = 1,
        barrier: Callable[[], None] = lambda: None,
        keep: int | None = None,
        shards: int = 1,
    ) -> None:
        self._checkpoints, self._rank, self._world_size = checkpoints, rank, world_size
        self._barrier, self._keep, self._shards = barrier, keep, shards
        self._current: _Save | None = None

    def save(self, checkpoint: Checkpoint) -> None:
        """Copy a checkpoint to the CPU and start to write it; first finish the one before.

        Args:
            checkpoint: Every rank writes its random states; the ranks that hold a part first write that too.

        Raises:
            RunError: On every rank, if any rank could not write the checkpoint before. A single process also raises at
                once if it cannot start this one.
        """
        self.wait()
        save = _Save(self._checkpoints, checkpoint)
        if self._rank == 0:
            save.problem = _attempt(save.prepare)
        self._barrier()
        if save.problem is None:
            # A rank copies what it writes, and nothing else.
            own = checkpoint if self._rank < self._shards else checkpoint.random_states()
            save.checkpoint = copied(own)
            save.start(self._rank, self._world_size, self._keep, self._shards)
        self._current = save
        if save.problem is not None and self._world_size == 1:
            self.wait()

    def wait(self) -> None:
        """Wait until the checkpoint is written, on all ranks.

        Raises:
            RunError: On every rank, if any rank could not write its part. Older checkpoints are not changed.
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

    def check(self) -> None:
        """Look whether the checkpoint that is being written has failed; without the other ranks, after every step.

        Raises:
            RunError: It has, and there are no other ranks; with others it is only a warning, until they all `wait`.
        """
        save = self._current
        if save is None or save.problem is None or save.is_alive or save.is_told:
            return
        save.is_told = True
        if self._world_size == 1:
            self.wait()
        console.warn(str(save.failure()))

    def abandon(self) -> None:
        """Wait a limited time for the checkpoint that is being written, without the other ranks; for a failing run."""
        if self._current is not None:
            self._current.wait_for_part(ABANDON_SECONDS)
            self._current.join(ABANDON_SECONDS if self._world_size == 1 else OTHERS_SECONDS)
            self._current = None


def newest(checkpoints: Path) -> Path | None:
    """Return the newest checkpoint whose files all have the right checksum; None if there are no checkpoints.

    Prints one warning if newer ones are damaged.

    Raises:
        RunError: There are checkpoints, and all are damaged.
    """
    damaged: list[str] = []
    for folder in reversed(_steps(checkpoints)):
        damage = find_damage(folder)
        if damage is None:
            if damaged:
                console.warn(f"damaged checkpoint: {'; '.join(damaged)}; using {folder.name} instead")
            return folder
        damaged.append(f"{folder.name} ({damage})")
    if damaged:
        raise RunError(
            f"{checkpoints}: all checkpoints are damaged: {'; '.join(damaged)}",
            hint="restore one from a backup, or start again with --overwrite",
        )
    return None


def folder_of(checkpoints: Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
    return checkpoints / f"step-{step:06d}"


def copied(checkpoint: Checkpoint) -> Checkpoint:
    """Return a copy on the CPU, which further training does not change."""
    copies: dict[Any, Tensor] = {}
    parts = (checkpoint.weights, checkpoint.optimizer, checkpoint.rng, checkpoint.extra, checkpoint.reference)
    weights, optimizer, rng, extra, reference = (copy_tree(part, copies) for part in parts)
    return replace(checkpoint, weights=weights, optimizer=optimizer, rng=rng, extra=extra, reference=reference)


def load(path: Path, rank: int = 0, shards: int = 1) -> Checkpoint:
    """Read the part of a rank from a checkpoint; its tensors are on the CPU.

    Args:
        path: The folder of the checkpoint.
        rank: The rank.
        shards: The number of parts that weights and optimizer state are divided into now; the checkpoint may have
            another number.

    Raises:
        RunError: The checkpoint cannot be read, or its optimizer state cannot be divided into that number of parts.
    """
    try:
        about = read_manifest(path)
        trees = {name: _read_shard(path, name, about["shards"], rank % shards, shards) for name in SHARDED}
        state = read_tree(path, "state")
        return Checkpoint(
            step=state["step"],
            rng=read_tree(path, f"rng-rank-{rank}") if rank < about["world_size"] else {},
            extra=state["extra"],
            best=about.get("best"),
            world_size=about["world_size"],
            **trees,
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise RunError(f"{path}: the checkpoint cannot be read: {error}") from error


def load_weights(path: Path, rank: int = 0, shards: int = 1) -> dict[str, Tensor]:
    """Read only the trainable tensors of a rank's part of a checkpoint; arguments and errors as of `load`."""
    try:
        return _read_shard(path, "weights", read_manifest(path)["shards"], rank % shards, shards)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise RunError(f"{path}: the checkpoint cannot be read: {error}") from error


def _read_shard(path: Path, name: str, stored: int, index: int, shards: int) -> dict[str, Any]:
    """Read a part of a tree, cut out of the stored parts if these are of another number."""
    if not (path / f"{name}{suffix_of(0, stored)}.json").exists():
        return {}
    if stored == shards:
        tree = read_tree(path, f"{name}{suffix_of(index, stored)}")
    else:
        tree = read_rows(path, [f"{name}{suffix_of(number, stored)}" for number in range(stored)], index, shards)
    return dict(tree)


def suffix_of(index: int, shards: int) -> str:
    """Return the end of the names of the files that hold a part."""
    return f"-shard-{index}" if shards > 1 else ""


def recover(checkpoints: Path) -> None:
    """Clean up after a killed process; rank 0 calls this before it looks for the newest checkpoint.

    A temporary folder with a valid manifest is complete and gets its final name; any other is deleted.
    """
    for folder in _leftovers(checkpoints, "tmp"):
        final = folder.with_name(folder.name.removeprefix(".tmp-"))
        if not final.exists() and find_damage(folder) is None:
            folder.rename(final)
            _publish(final)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    for folder in _leftovers(checkpoints, "trash"):
        shutil.rmtree(folder, ignore_errors=True)


def describe_files(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of each file on disk."""
    return {name: {"size": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in names}


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Write the manifest that makes a folder a complete checkpoint.

    Args:
        folder: The folder, with all its files.
        content: Plain data; its `files` come from `describe_files`.
    """
    body = {"format": FORMAT, **content}
    write_atomically(folder / MANIFEST, to_json({**body, "checksum": _checksum(body)}))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and verify the manifest of a folder.

    Raises:
        ValueError: It is missing or damaged, or a newer version wrote it; the text says which.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        checksum = content.pop("checksum")
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST} is missing") from None
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        raise ValueError(f"{MANIFEST} cannot be read") from None
    if checksum != _checksum(content):
        raise ValueError(f"{MANIFEST} is damaged")
    if content["format"] != FORMAT:
        raise ValueError(f"{MANIFEST} has format {content['format']}, but this version reads format {FORMAT}")
    return dict(content)


def find_damage(folder: Path, *, hashes: bool = True) -> str | None:
    """Compare a folder with its manifest; return the first difference, or None.

    Args:
        folder: The folder of a checkpoint.
        hashes: Compare checksums too; if False, only names and sizes.
    """
    try:
        files = read_manifest(folder)["files"]
    except ValueError as error:
        return str(error)
    for name, expected in files.items():
        file = folder / name
        if Path(name).name != name or file.is_symlink():
            return f"{name} is not a file of this checkpoint"
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["size"]:
            return f"{name} has {file.stat().st_size} bytes instead of {expected['size']}"
        if hashes and sha256(file) != expected["sha256"]:
            return f"{name} has a wrong checksum"
    return None


def capture_rng() -> dict[str, Any]:
    """Return the random states of torch (CPU and each CUDA device), numpy and Python, for `restore_rng`."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "python": random.getstate(),
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Set the random generators to captured states; states of CUDA devices that no longer exist are ignored."""
    torch.set_rng_state(state["torch"])
    for device, device_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(device_state, device)
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    random.setstate(state["python"])


class _Save:
    """One checkpoint that is being written, in its own thread."""

    def __init__(self, checkpoints: Path, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._size = tree_bytes([checkpoint.weights, checkpoint.optimizer, checkpoint.reference, checkpoint.rng])
        self.final = folder_of(checkpoints, checkpoint.step)
        self.temporary = checkpoints / f".tmp-{self.final.name}"
        self.problem: BaseException | None = None
        self.is_told = False
        self.thread: Thread | None = None
        self._part_is_written, self._all_have_tried = Event(), Event()

    def prepare(self) -> None:
        own_folder(self.temporary.parent)
        if self.temporary.exists():
            shutil.rmtree(self.temporary)
        if shutil.disk_usage(self.temporary.parent).free < self._size:
            raise OSError("not enough disk space")
        self.temporary.mkdir()

    def start(self, rank: int, world_size: int, keep: int | None, shards: int) -> None:
        step, best = self.checkpoint.step, self.checkpoint.best
        about = {"step": step, "best": best, "world_size": world_size, "shards": shards}
        self.thread = Thread(target=self._write, args=(rank, about, keep), name="checkpoint", daemon=True)
        self.thread.start()

    @property
    def is_alive(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def wait_for_part(self, seconds: float | None = None) -> None:
        if self.thread is not None:
            self._part_is_written.wait(seconds)

    def finish(self) -> None:
        self._all_have_tried.set()
        self.join(None)

    def join(self, seconds: float | None) -> None:
        if self.thread is not None:
            self.thread.join(seconds)

    def failure(self) -> RunError:
        problem = "another rank could not write its part" if self.problem is None else _describe(self.problem)
        folder, step = self.temporary.parent, self.checkpoint.step
        message = f"{folder}: cannot save the checkpoint of step {step}: {problem}"
        if not isinstance(self.problem, OSError | SafetensorError | None):
            return RunError(message, hint="fix the cause, then continue with --resume")
        need = f"it needs about {size_text(self._size)}, and {room(folder)} are free"
        return DiskError(message, hint=f"{need}; free some disk space, then continue with --resume")

    def _write(self, rank: int, about: dict[str, Any], keep: int | None) -> None:
        # In a thread of its own, no signal arrives; and the errors of libraries in Rust are no Exceptions.
        self.problem = _attempt(
            lambda: _write_part(self.temporary, self.checkpoint, rank, about["shards"]), BaseException
        )
        self._part_is_written.set()
        if rank == 0 and self.problem is None:
            self.problem = _attempt(lambda: self._commit_when_complete(about, keep), BaseException)

    def _commit_when_complete(self, about: dict[str, Any], keep: int | None) -> None:
        parts = [self.temporary / _part(other) for other in range(about["world_size"])]
        # A part appears once it is complete. When all ranks have tried, a missing part will not appear any more.
        while not all(part.exists() for part in parts) and not self._all_have_tried.wait(POLL_SECONDS):
            pass
        if all(part.exists() for part in parts):
            _commit(self.temporary, self.final, about)
            _publish(self.final)
            _retire(self.final.parent, self.final, keep)


def _attempt(action: Callable[[], None], kind: type[BaseException] = Exception) -> BaseException | None:
    """Run an action; return its exception, or None. A rank that raised here would let the others wait forever."""
    try:
        action()
    except kind as error:
        return error
    return None


def _describe(error: BaseException) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error) if isinstance(error, SafetensorError) else f"{type(error).__name__}: {error}"


def _write_part(folder: Path, checkpoint: Checkpoint, rank: int, shards: int) -> None:
    names = write_tree(folder, f"rng-rank-{rank}", checkpoint.rng)
    if rank < shards:
        suffix = suffix_of(rank, shards)
        names += write_tree(folder, f"weights{suffix}", checkpoint.weights)
        names += write_tree(folder, f"optimizer{suffix}", checkpoint.optimizer)
        if checkpoint.reference:
            names += write_tree(folder, f"reference{suffix}", checkpoint.reference)
    if rank == 0:
        names += write_tree(folder, "state", {"step": checkpoint.step, "extra": checkpoint.extra})
    # Written last: if it is missing, rank 0 knows that this rank failed.
    write_atomically(folder / _part(rank), to_json(describe_files(folder, names)))


def _part(rank: int) -> str:
    return f"part-rank-{rank}.json"


def _commit(temporary: Path, final: Path, about: dict[str, Any]) -> None:
    files: dict[str, Any] = {}
    for part in [temporary / _part(rank) for rank in range(about["world_size"])]:
        files |= json.loads(part.read_text(encoding="utf-8"))
        part.unlink()
    versions = {name: installed_version(name) for name in ("dpoctl", "torch", "safetensors")}
    write_manifest(temporary, {**about, "versions": versions, "files": files})
    if final.exists():  # a damaged one of the same step, which this run has redone
        _discard(final)
    # This rename commits: whatever fails after it, the checkpoint exists for every rank.
    temporary.rename(final)


def _publish(final: Path) -> None:
    def publish() -> None:
        sync(final.parent)
        write_atomically(final.parent.with_name(LATEST), final.name + "\n")

    if (error := _attempt(publish)) is not None:
        console.warn(f"cannot update {LATEST} to {final.name}: {_describe(error)}")


def _retire(checkpoints: Path, final: Path, keep: int | None) -> None:
    """Delete all but the newest good checkpoints, and the best one that each of them names.

    Damaged ones are not counted, and are kept.
    """

    def retire() -> None:
        good = [folder for folder in _steps(checkpoints) if find_damage(folder, hashes=False) is None]
        newest = good[-keep:] if keep else good
        # A run can go on from any of them, and then exports the best one that it knows.
        bests: set[int] = {read_manifest(folder).get("best") or 0 for folder in newest}
        kept = {final, *newest, *(folder_of(checkpoints, step) for step in bests)}
        for folder in good:
            if folder not in kept:
                _discard(folder)
        for trash in _leftovers(checkpoints, "trash"):
            shutil.rmtree(trash)

    if (error := _attempt(retire)) is not None:
        console.warn(f"cannot delete an old checkpoint: {_describe(error)}")


def _discard(folder: Path) -> None:
    trash = folder.with_name(f".trash-{folder.name}")
    shutil.rmtree(trash, ignore_errors=True)
    folder.rename(trash)


def _leftovers(checkpoints: Path, kind: str) -> list[Path]:
    return [folder for folder in _folders(checkpoints) if re.fullmatch(rf"\.{kind}-{_STEP}", folder.name)]


def _steps(checkpoints: Path) -> list[Path]:
    """Return the finished checkpoints, oldest first, damaged ones included."""
    steps = [folder for folder in _folders(checkpoints) if re.fullmatch(_STEP, folder.name)]
    return sorted(steps, key=lambda folder: int(folder.name.removeprefix("step-")))


def _folders(checkpoints: Path) -> list[Path]:
    if not checkpoints.is_dir():
        return []
    return [entry for entry in checkpoints.iterdir() if entry.is_dir() and not entry.is_symlink()]


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

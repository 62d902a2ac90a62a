import contextlib
import copy
import errno
import os
import signal
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_samples import flip, names, small, tree_equal
from safetensors import SafetensorError

from dpoctl.errors import RunError
from dpoctl.runs import checkpoint as module
from dpoctl.runs import tree
from dpoctl.runs.checkpoint import Checkpoint, load, newest, recover, save
from dpoctl.runs.manifest import find_damage

# Kill -9 before every call that touches the disk, one after the other.

TOUCHING = [("os", name) for name in ("mkdir", "open", "fsync", "replace", "rename", "unlink", "rmdir")]


def die_at(call: int | None, counts: list[int]) -> None:
    """Replace the calls that touch the disk; the one of that number kills the process first."""

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            counts[0] += 1
            if counts[0] == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return wrapped

    for _, name in TOUCHING:
        setattr(os, name, wrap(getattr(os, name)))
    tree.save_file = wrap(tree.save_file)


def killed_save(checkpoints: Path, step: int, call: int) -> bool:
    """Save in a child that dies before the given call; whether it died."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork of a process with threads, from 3.12 on
        child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            die_at(call, [0])
            save(checkpoints, small(step), keep=1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def test_a_save_killed_at_any_call_loses_nothing_and_leaves_nothing(tmp_path):
    kept_old = kept_new = 0
    for call in range(1, 200):
        checkpoints = tmp_path / f"call-{call}" / "checkpoints"
        save(checkpoints, small(10), keep=1)
        died = killed_save(checkpoints, 20, call)
        recover(checkpoints)
        best = newest(checkpoints)
        kept_old += best.name == "step-000010"
        kept_new += best.name == "step-000020"
        assert tree_equal(load(best).weights, small(load(best).step).weights)
        assert not [name for name in names(checkpoints) if not name.startswith("step-")]
        save(checkpoints, small(30), keep=1)
        assert names(checkpoints) == ["step-000030"]
        assert (checkpoints.parent / "LATEST").read_text() == "step-000030\n"
        if not died:
            break
    assert kept_old > 20
    assert kept_new > 3
    assert not died, "the calls of a save were not exhausted"


def test_replacing_a_damaged_checkpoint_survives_a_kill_at_any_call(tmp_path):
    for call in range(1, 200):
        checkpoints = tmp_path / f"call-{call}" / "checkpoints"
        save(checkpoints, small(10))
        flip(save(checkpoints, small(20)) / "state.json", 0)
        died = killed_save(checkpoints, 20, call)
        recover(checkpoints)
        assert newest(checkpoints).name in ("step-000010", "step-000020")
        if not died:
            break
    assert not died
    assert newest(checkpoints).name == "step-000020"


def test_a_finished_save_that_only_lacks_its_name_is_given_it(tmp_path):
    path = save(tmp_path / "checkpoints", small(10))
    path.rename(path.with_name(".tmp-step-000010"))
    recover(tmp_path / "checkpoints")
    assert newest(tmp_path / "checkpoints").name == "step-000010"


def test_files_are_synced_before_the_manifest_and_the_manifest_before_the_rename(tmp_path, monkeypatch):
    events: list[str] = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def name_of(descriptor: int) -> str:
        return Path(f"/proc/self/fd/{descriptor}").readlink().name

    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(f"sync {name_of(fd)}"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(f"put {Path(b).name}"), replace(a, b))[1])
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append(f"rename {Path(b).name}"), rename(a, b))[1])
    save(tmp_path / "checkpoints", small(10))
    manifest = events.index("put manifest.json")
    renamed = events.index("rename step-000010")
    for name in ("weights", "optimizer"):
        assert events.index(f"sync {name}.safetensors") < manifest
    assert manifest < events.index("sync .tmp-step-000010", manifest) < renamed
    assert renamed < events.index("sync checkpoints", renamed) < events.index("put LATEST")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("os error 28")])
def test_a_full_disk_keeps_the_old_checkpoint_and_says_what_is_needed(tmp_path, monkeypatch, error):
    checkpoints = tmp_path / "checkpoints"
    save(checkpoints, small(10), keep=1)

    def full(*args: Any) -> None:
        raise error

    monkeypatch.setattr(tree, "save_file", full)
    with pytest.raises(RunError, match="step 20 could not be saved") as failure:
        save(checkpoints, small(20), keep=1)
    assert "GiB are free" in failure.value.hint
    assert names(checkpoints) == ["step-000010"]
    assert newest(checkpoints).name == "step-000010"
    monkeypatch.undo()
    save(checkpoints, small(20), keep=1)
    assert names(checkpoints) == ["step-000020"]


def test_a_folder_that_cannot_be_made_is_a_run_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="could not be saved"):
        save(tmp_path / "file" / "checkpoints", small(10))


# Two ranks, played by two threads.


def on_two_ranks(action: Callable[[int, Callable[[], None]], Any]) -> list[Any]:
    meeting = threading.Barrier(2, timeout=20)
    results: list[Any] = [None, None]

    def play(rank: int) -> None:
        try:
            results[rank] = action(rank, lambda: meeting.wait() and None)
        except RunError as error:
            results[rank] = error

    threads = [threading.Thread(target=play, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def of_rank(step: int, rank: int) -> Checkpoint:
    saved = copy.deepcopy(small(step))
    saved.rng = {"torch": torch.full((4,), rank, dtype=torch.uint8)}
    saved.weights["w"] += rank
    return saved


def test_each_rank_gets_its_own_random_state_and_the_weights_of_rank_0(tmp_path):
    def act(rank: int, barrier: Callable[[], None]) -> Path:
        return save(tmp_path, of_rank(10, rank), rank=rank, world_size=2, barrier=barrier, keep=1)

    paths = on_two_ranks(act)
    assert paths == [tmp_path / "step-000010"] * 2
    assert find_damage(paths[0]) is None
    for rank in range(2):
        back = load(paths[0], rank)
        assert back.rng["torch"].tolist() == [rank] * 4
        assert torch.equal(back.weights["w"], small(10).weights["w"])
        assert back.world_size == 2
    assert load(paths[0], 2).rng == {}


def test_sharded_ranks_get_their_own_weights_and_no_others(tmp_path):
    def act(rank: int, barrier: Callable[[], None]) -> Path:
        return save(tmp_path, of_rank(10, rank), rank=rank, world_size=2, barrier=barrier, sharded=True)

    path = on_two_ranks(act)[0]
    for rank in range(2):
        assert torch.equal(load(path, rank).weights["w"], small(10).weights["w"] + rank)
    with pytest.raises(RunError, match="2 shards and has none for rank 2"):
        load(path, 2)


@pytest.mark.parametrize("failing", [0, 1])
def test_when_one_rank_cannot_write_all_ranks_say_so_and_the_old_checkpoint_stays(tmp_path, monkeypatch, failing):
    save(tmp_path / "checkpoints", small(10))
    original = module.write_tree

    def write(folder: Path, name: str, value: Any) -> list[str]:
        if name == f"rng-rank-{failing}":
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(folder, name, value)

    monkeypatch.setattr(module, "write_tree", write)

    def act(rank: int, barrier: Callable[[], None]) -> Path:
        return save(tmp_path / "checkpoints", of_rank(20, rank), rank=rank, world_size=2, barrier=barrier, keep=1)

    results = on_two_ranks(act)
    assert all(isinstance(result, RunError) for result in results)
    assert "No space left" in str(results[failing])
    assert names(tmp_path / "checkpoints") == ["step-000010"]

import contextlib
import copy
import errno
import os
import signal
import threading
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_samples import flip, names, save, small, tree_equal
from safetensors import SafetensorError

from dpoctl.errors import RunError
from dpoctl.runs import checkpoint as module
from dpoctl.runs import serialization
from dpoctl.runs.checkpoint import Checkpoint, find_damage, load, newest, recover

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
    serialization.save_file = wrap(serialization.save_file)


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

    monkeypatch.setattr(serialization, "save_file", full)
    with pytest.raises(RunError, match="cannot save the checkpoint of step 20") as failure:
        save(checkpoints, small(20), keep=1)
    assert " are free; free some disk space" in failure.value.hint
    assert names(checkpoints) == ["step-000010"]
    assert newest(checkpoints).name == "step-000010"
    monkeypatch.undo()
    save(checkpoints, small(20), keep=1)
    assert names(checkpoints) == ["step-000020"]


def test_a_folder_that_cannot_be_made_is_a_run_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot save the checkpoint"):
        save(tmp_path / "file" / "checkpoints", small(10))


class Panic(BaseException):
    """The error of a library in Rust."""


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA error: an illegal memory access"), Panic("w")])
@pytest.mark.parametrize("function", ["write_tree", "_commit"])
def test_any_exception_of_the_writer_reaches_the_loop(tmp_path, monkeypatch, error, function):
    """A thread that died of it would let the loop wait forever."""
    save(tmp_path / "checkpoints", small(10))

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(module, function, broken)
    outcome: list[Any] = []

    def run() -> None:
        try:
            save(tmp_path / "checkpoints", small(20))
        except RunError as failure:
            outcome.append(failure)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "the loop waits for a writer that has died"
    assert f"cannot save the checkpoint of step 20: {type(error).__name__}: " in str(outcome[0])
    assert outcome[0].hint == "fix the cause, then continue with --resume"
    assert names(tmp_path / "checkpoints") == ["step-000010"]


def test_a_writer_that_has_failed_is_noticed_at_the_next_step(tmp_path, monkeypatch):
    saver = module.Saver(tmp_path / "checkpoints")
    saver.check()
    may_go_on = threading.Event()
    monkeypatch.setattr(module, "write_tree", lambda *args: may_go_on.wait() and 1 // 0)
    saver.save(small(20))
    saver.check()
    may_go_on.set()
    saver._current.join(20)
    with pytest.raises(RunError, match="cannot save the checkpoint of step 20: ZeroDivisionError"):
        saver.check()
    saver.check()
    saver.wait()
    assert names(tmp_path / "checkpoints") == []


def test_a_failing_clean_up_after_the_commit_only_warns(tmp_path, monkeypatch, capsys):
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(module, "_discard", broken)
    save(tmp_path / "checkpoints", small(10), keep=1)
    save(tmp_path / "checkpoints", small(20), keep=1)
    assert newest(tmp_path / "checkpoints").name == "step-000020"
    assert "cannot delete an old checkpoint: RuntimeError: no such luck" in capsys.readouterr().err


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


def test_a_failing_run_does_not_wait_long_for_dead_ranks(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "OTHERS_SECONDS", 0.2)
    saver = module.Saver(tmp_path, rank=0, world_size=2)
    saver.save(of_rank(10, 0))
    thread = threading.Thread(target=saver.abandon, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert newest(tmp_path) is None


def test_a_rank_that_writes_no_weights_copies_none(tmp_path, monkeypatch):
    copied: dict[int, int] = {}
    original = module.copied

    def watched(checkpoint: Checkpoint) -> Checkpoint:
        copy = original(checkpoint)
        copied[int(copy.rng["torch"][0])] = len(copy.weights) + len(copy.optimizer) + len(copy.reference)
        return copy

    monkeypatch.setattr(module, "copied", watched)
    on_two_ranks(lambda rank, barrier: save(tmp_path, of_rank(10, rank), rank=rank, world_size=2, barrier=barrier))
    assert copied == {0: 4, 1: 0}
    assert find_damage(tmp_path / "step-000010") is None


def test_a_restored_checkpoint_lets_go_of_its_tensors():
    saved = small(10)
    kept = [weakref.ref(tensor) for tensor in [*saved.weights.values(), saved.optimizer["state"][0]["m"]]]
    saved.release()
    assert all(tensor() is None for tensor in kept)


def test_sharded_ranks_get_their_own_weights_and_no_others(tmp_path):
    def act(rank: int, barrier: Callable[[], None]) -> Path:
        return save(tmp_path, of_rank(10, rank), rank=rank, world_size=2, barrier=barrier, shards=2)

    path = on_two_ranks(act)[0]
    for rank in range(2):
        assert torch.equal(load(path, rank, 2).weights["w"], small(10).weights["w"] + rank)
    both = torch.cat([small(10).weights["w"] + rank for rank in range(2)])
    assert torch.equal(load(path).weights["w"], both)
    assert torch.equal(load(path, 2, 3).weights["w"], both.chunk(3)[2])


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

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from dpoctl.errors import SetupError, UsageError
from dpoctl.runs.checkpoint import Checkpoint, newest, save
from dpoctl.runs.directory import RESOLVED_RECIPE, RunDirectory
from dpoctl.runs.files import write_atomically


def finished_run(path):
    with RunDirectory.open(path) as run:
        run.write_text(RESOLVED_RECIPE, "version: 1\n")
        run.write_json("env.json", {"a": 1})
        run.write_text("samples/before.jsonl", "{}\n")
        run.write_text("model.safetensors", "weights")
        save(run.checkpoints, Checkpoint(10, {"w": torch.ones(2)}, {}, {}))
    return run


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_a_new_directory_is_made_with_its_parents_and_left_without_a_lock(tmp_path):
    run = finished_run(tmp_path / "runs" / "first")
    assert run.resolved_recipe.read_text() == "version: 1\n"
    assert json.loads((run.path / "env.json").read_text()) == {"a": 1}
    assert names(run.path) == sorted(
        ["LATEST", "checkpoints", "env.json", "model.safetensors", "recipe.resolved.yaml", "samples"]
    )


def test_a_directory_that_is_not_empty_is_refused_with_both_ways_out(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty") as refusal:
        RunDirectory.open(tmp_path)
    assert "--resume" in refusal.value.hint
    assert "--overwrite" in refusal.value.hint
    assert names(tmp_path) == ["notes.txt"]


@pytest.mark.parametrize("how", ["resume", "overwrite"])
def test_a_folder_that_is_no_run_is_neither_resumed_nor_overwritten(tmp_path, how):
    (tmp_path / "model.safetensors").write_text("precious")
    with pytest.raises(UsageError, match="not a run of dpoctl: it holds model"):
        RunDirectory.open(tmp_path, **{how: True})
    assert names(tmp_path) == ["model.safetensors"]


def test_resume_and_overwrite_exclude_each_other(tmp_path):
    with pytest.raises(UsageError, match="exclude each other"):
        RunDirectory.open(tmp_path / "x", resume=True, overwrite=True)
    assert not (tmp_path / "x").exists()


def test_resume_keeps_everything(tmp_path):
    before = names(finished_run(tmp_path / "run").path)
    with RunDirectory.open(tmp_path / "run", resume=True) as run:
        assert newest(run.checkpoints).name == "step-000010"
    assert names(tmp_path / "run") == before


def test_resuming_nothing_starts(tmp_path):
    with RunDirectory.open(tmp_path / "run", resume=True) as run:
        assert run.path.is_dir()


def test_a_run_killed_while_writing_its_first_file_can_be_started_again(tmp_path):
    (tmp_path / f".{RESOLVED_RECIPE}.123.tmp").write_text("ver")
    (tmp_path / ".lock").write_text("")
    with RunDirectory.open(tmp_path) as run:
        assert names(run.path) == [".lock"]


def test_overwrite_deletes_what_a_run_writes_and_nothing_else(tmp_path, capsys):
    run = finished_run(tmp_path / "run")
    (run.path / "notes.txt").write_text("mine")
    (run.path / "tokenizer.json").mkdir()
    RunDirectory.open(run.path, overwrite=True).close()
    assert names(run.path) == ["notes.txt", "tokenizer.json"]
    assert "kept what no run writes: notes.txt, tokenizer.json" in capsys.readouterr().err


def test_overwrite_follows_no_link_and_touches_nothing_when_it_meets_one(tmp_path):
    run = finished_run(tmp_path / "run")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "step-000010").mkdir()
    (run.path / "logs").symlink_to(elsewhere)
    before = names(run.path)
    with pytest.raises(UsageError, match="logs is a symbolic link"):
        RunDirectory.open(run.path, overwrite=True)
    assert names(run.path) == before
    assert names(elsewhere) == ["step-000010"]


def test_an_overwrite_that_was_killed_can_be_repeated(tmp_path):
    run = finished_run(tmp_path / "run")
    (run.path / "model.safetensors").unlink()
    RunDirectory.open(run.path, overwrite=True).close()
    assert names(run.path) == []


def test_a_file_in_place_of_the_directory_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        RunDirectory.open(tmp_path / "run")
    with pytest.raises(SetupError, match="cannot be used"):
        RunDirectory.open(tmp_path / "run" / "deeper")


HOLD = """
import sys, time
from dpoctl.runs.directory import RunDirectory
run = RunDirectory.open(sys.argv[1])
run.write_text("recipe.resolved.yaml", "")
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    yield process
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize("how", ["resume", "overwrite"])
def test_a_second_process_is_refused_with_the_first_ones_id_until_that_one_is_dead(tmp_path, holder, how):
    with pytest.raises(UsageError, match=f"process {holder.pid} on .* is writing this run"):
        RunDirectory.open(tmp_path / "run", **{how: True})
    assert (tmp_path / "run" / RESOLVED_RECIPE).exists()
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with RunDirectory.open(tmp_path / "run", **{how: True}):
        assert (tmp_path / "run" / ".lock").exists()
    assert not (tmp_path / "run" / ".lock").exists()


def test_the_same_process_may_not_open_it_twice_either(tmp_path):
    with (
        RunDirectory.open(tmp_path / "run"),
        pytest.raises(UsageError, match=f"process {os.getpid()} on"),
    ):
        RunDirectory.open(tmp_path / "run", resume=True)


def test_a_lock_that_its_last_holder_unlinks_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    flock, calls = fcntl.flock, []

    def late(file, operation):
        if not calls:
            (tmp_path / ".lock").unlink()
        calls.append(operation)
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with RunDirectory.open(tmp_path):
        assert len(calls) == 2
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()


def test_leftovers_of_a_killed_process_are_gone_at_the_next_start(tmp_path):
    run = finished_run(tmp_path / "run")
    for name in (".tmp-step-000020", ".trash-step-000005"):
        (run.checkpoints / name).mkdir()
        (run.checkpoints / name / "weights.safetensors").write_text("torn")
    (run.path / ".export-abc").mkdir()
    (run.path / ".metrics.jsonl.77.tmp").write_text("torn")
    RunDirectory.open(run.path, resume=True).close()
    assert names(run.checkpoints) == ["step-000010"]
    assert not [name for name in names(run.path) if name.startswith(".")]


def test_a_file_that_fails_to_be_written_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "env.json"
    write_atomically(path, "old")

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert names(tmp_path) == ["env.json"]
    assert path.read_text() == "old"


def test_json_that_no_parser_accepts_is_not_written(tmp_path):
    with RunDirectory.open(tmp_path / "run") as run, pytest.raises(ValueError, match="JSON"):
        run.write_json("env.json", {"x": float("nan")})

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from checkpoint_samples import save

from dpoctl.errors import DiskError, SetupError, UsageError, writing
from dpoctl.files import temporary_file, temporary_folder, write_atomically
from dpoctl.runs.checkpoint import Checkpoint, newest
from dpoctl.runs.directory import RunDirectory
from dpoctl.runs.metrics import MetricsFile
from dpoctl.runs.names import RESOLVED_RECIPE, own_folder


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
    with pytest.raises(UsageError, match="not a run of dpoctl: it contains model"):
        RunDirectory.open(tmp_path, **{how: True})
    assert names(tmp_path) == ["model.safetensors"]


def test_resume_and_overwrite_exclude_each_other(tmp_path):
    with pytest.raises(UsageError, match="cannot be used together"):
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
    assert "--overwrite kept files that are not part of a run: notes.txt, tokenizer.json" in capsys.readouterr().err


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


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}], ids=["new", "resume", "overwrite"])
@pytest.mark.parametrize("name", [".lock", "run_status.json", "metrics.jsonl", "checkpoints", "evals", "error.log"])
def test_a_planted_link_is_refused_and_never_followed(tmp_path, name, how):
    run = finished_run(tmp_path / "run").path if how else tmp_path
    target = tmp_path / "precious"
    if name in ("checkpoints", "evals"):
        target.mkdir()
        shutil.rmtree(run / name, ignore_errors=True)
    elif name != "error.log":  # the target of a link may not exist yet
        target.write_text("mine")
    (run / name).symlink_to(target)
    with pytest.raises(UsageError, match=f"{name} is a symbolic link, which no run follows"):
        RunDirectory.open(run, **how)
    assert target.is_dir() or not target.exists() or target.read_text() == "mine"
    assert not target.is_dir() or names(target) == []
    assert name == ".lock" or not (run / ".lock").exists()


def test_a_lock_that_is_another_name_of_a_file_is_refused(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "run").mkdir()
    os.link(tmp_path / "precious", tmp_path / "run" / ".lock")
    with pytest.raises(UsageError, match=r"\.lock is no file of a run"):
        RunDirectory.open(tmp_path / "run")
    assert (tmp_path / "precious").read_text() == "mine"


def test_what_appears_while_the_lock_is_waited_for_counts(tmp_path, monkeypatch):
    """The one that held the lock wrote a run meanwhile, and was killed."""
    acquire = RunDirectory._acquire_lock
    finished = finished_run(tmp_path / "other").path
    monkeypatch.setattr(RunDirectory, "_acquire_lock", lambda run: finished.rename(run.path) and acquire(run))
    with pytest.raises(UsageError, match="is not empty; pass --resume"):
        RunDirectory.open(tmp_path / "run")
    monkeypatch.setattr(RunDirectory, "_acquire_lock", acquire)
    assert not (tmp_path / "run" / ".lock").exists()
    RunDirectory.open(tmp_path / "run", resume=True).close()


def test_links_that_are_planted_during_a_run_are_not_followed(tmp_path):
    (tmp_path / "precious").write_text("mine")
    for name in ("metrics.jsonl", "evals"):
        (tmp_path / name).symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic link"):
        MetricsFile(tmp_path / "metrics.jsonl").append({"step": 1})
    with pytest.raises(UsageError, match="evals is a symbolic link"):
        own_folder(tmp_path / "evals")
    assert (tmp_path / "precious").read_text() == "mine"


def test_an_overwrite_that_was_killed_can_be_repeated(tmp_path):
    run = finished_run(tmp_path / "run")
    (run.path / "model.safetensors").unlink()
    RunDirectory.open(run.path, overwrite=True).close()
    assert names(run.path) == []


def test_a_file_in_place_of_the_directory_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        RunDirectory.open(tmp_path / "run")
    with pytest.raises(SetupError, match="cannot be used: "):
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
    with pytest.raises(UsageError, match=f"process {holder.pid} on .* is writing to this run directory"):
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
    (run.path / ".export.0a1b2c3d.tmp").mkdir()
    (run.path / ".export.0a1b2c3d.tmp" / "model.safetensors").write_text("torn")
    (run.path / ".metrics.jsonl.77.tmp").write_text("torn")
    (run.path / "samples" / ".step-000002.jsonl.78.tmp").write_text("torn")
    RunDirectory.open(run.path, resume=True).close()
    assert names(run.checkpoints) == ["step-000010"]
    assert not [name for name in names(run.path) if name.startswith(".")]
    assert not [name for name in names(run.path / "samples") if name.startswith(".")]


def test_a_file_that_another_process_writes_into_a_run_is_none_that_was_left(tmp_path):
    run = finished_run(tmp_path / "run")
    with temporary_file(run.path / "report.html") as (temporary, file), temporary_folder(run.path / "merged") as folder:
        file.write(b"page")
        RunDirectory.open(run.path, resume=True).close()
        assert folder.is_dir()
        temporary.replace(run.path / "report.html")
    assert "report.html" in names(run.path)


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


def test_a_folder_in_the_place_of_a_file_is_one_line(tmp_path):
    (tmp_path / "recipe.yaml").mkdir()
    with pytest.raises(DiskError, match=r"cannot be written: Is a directory"), writing(tmp_path):
        write_atomically(tmp_path / "recipe.yaml", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_json_that_no_parser_accepts_is_not_written(tmp_path):
    with RunDirectory.open(tmp_path / "run") as run, pytest.raises(ValueError, match="JSON"):
        run.write_json("env.json", {"x": float("nan")})


def test_the_folder_of_a_file_may_be_renamed_as_soon_as_the_file_is_there(tmp_path, monkeypatch):
    folder, final, kind = tmp_path / ".tmp-step", tmp_path / "step", type(tmp_path)
    replace = kind.replace
    folder.mkdir()

    def replaced(self, target):
        new = replace(self, target)
        folder.rename(final)
        return new

    monkeypatch.setattr(kind, "replace", replaced)
    write_atomically(folder / "part", "all of it")
    assert [file.name for file in final.iterdir()] == ["part"]
    assert (final / "part").read_text() == "all of it"

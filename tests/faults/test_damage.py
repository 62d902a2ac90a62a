"""Checkpoints that are cut, flipped or gone, disks that are full, folders that may not be written."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from fault_runs import KINDS, Scene, at_step, base_recipe, die, leftovers, outcome, wait_for

KEEPING = KINDS["dpo"] | {"training.save_total_limit": None}


@pytest.fixture(scope="module")
def at_step_7(warm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed at step 7, with good checkpoints at 2, 4 and 6."""
    scene = Scene(tmp_path_factory.mktemp("killed"), base_recipe(warm)).changed(KEEPING)
    out = scene.folder / "run"
    written = out / "checkpoints" / "step-000006"
    faults = [at_step(7, lambda: wait_for(written) or die())]
    assert scene.run(out, faults=faults, DPOCTL_CACHE=str(scene.folder / "cache")).code == -9
    return out


@pytest.fixture
def killed(scene: Scene, at_step_7: Path) -> tuple[Scene, Path]:
    """A copy of that run, for a test to damage."""
    return scene.changed(KEEPING), shutil.copytree(at_step_7, scene.folder / "killed")


def flipped(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content))
    return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]


CUTS = {
    "nothing left": lambda content, rng: b"",
    "one byte": lambda content, rng: content[:1],
    "half": lambda content, rng: content[: len(content) // 2],
    "all but the last byte": lambda content, rng: content[:-1],
    "a byte more": lambda content, rng: content + b"\0",
    "one bit flipped": flipped,
    "zeros": lambda content, rng: bytes(len(content)),
}


def test_a_checkpoint_that_is_damaged_in_any_file_is_never_used(
    killed: tuple[Scene, Path], whole: bool, tally: Any
) -> None:
    from dpoctl.runs.checkpoint import find_damage

    _, run = killed
    good, rng, found = run / "checkpoints" / "step-000006", random.Random(0), []
    for file in sorted(good.iterdir()):
        content = file.read_bytes()
        for name, cut in CUTS.items():
            for _ in range(20 if whole and cut is flipped else 3 if cut is flipped else 1):
                file.write_bytes(cut(content, rng))
                found.append(find_damage(good) is not None)
                # What ends the manifest is a newline that says nothing.
                assert found.pop() or (file.name, name) == ("manifest.json", "all but the last byte")
                found.append(True)
        file.unlink()
        found.append(find_damage(good) is not None)
        file.write_bytes(content)
        assert find_damage(good) is None
    tally("a damaged file is recognised", *found)


def test_a_run_whose_newest_checkpoint_is_damaged_goes_back_to_the_one_before(
    killed: tuple[Scene, Path], whole: bool, tally: Any
) -> None:
    scene, run = killed
    survived = []
    for number, file in enumerate(sorted(path.name for path in (run / "checkpoints" / "step-000006").iterdir())):
        if not whole and number % 3:
            continue
        out = scene.folder / f"damaged-{number}"
        shutil.copytree(run, out)
        hurt = out / "checkpoints" / "step-000006" / file
        hurt.write_bytes(flipped(hurt.read_bytes(), random.Random(number)))
        ended = scene.finish(out)
        warnings = [line for line in ended.err.splitlines() if line.startswith("warning: damaged checkpoint")]
        assert len(warnings) == 1
        assert "step-000006" in warnings[0]
        assert "using step-000004 instead" in warnings[0]
        survived.append(outcome(out) == scene.undisturbed().outcome and not leftovers(out))
    tally("the newest checkpoint is damaged", *survived)
    assert all(survived)


def test_a_run_without_any_good_checkpoint_never_starts_anew_in_silence(killed: tuple[Scene, Path], tally: Any) -> None:
    scene, run = killed
    for folder in (run / "checkpoints").iterdir():
        (folder / "weights.safetensors").write_bytes(b"")
    ended = scene.run(run, "--resume")
    assert ended.code == 1
    assert "all checkpoints are damaged" in ended.last
    assert "weights.safetensors has 0 bytes" in ended.last
    assert "Traceback" not in ended.err
    tally("every checkpoint is damaged", True)


def test_strangers_in_the_folder_of_checkpoints_are_left_alone(killed: tuple[Scene, Path], tally: Any) -> None:
    scene, run = killed
    checkpoints, elsewhere = run / "checkpoints", scene.folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("x")
    (checkpoints / "step-abc").mkdir()
    (checkpoints / "step-000099").symlink_to(elsewhere)
    (checkpoints / "step-009999").mkdir()
    scene.finish(run)
    assert (elsewhere / "precious").exists()
    assert (checkpoints / "step-abc").exists()
    survived = outcome(run) == scene.undisturbed().outcome
    tally("strangers among the checkpoints", survived)
    assert survived


def limited(size: int) -> Any:
    """No file may grow beyond this size from the second save on."""

    def install() -> None:
        from dpoctl.runs import checkpoint

        save, saves = checkpoint.Saver.save, [0]

        def limiting(self: Any, saved: Any) -> None:
            saves[0] += 1
            save(self, saved)
            if saves[0] == 1:
                self.wait()
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

        checkpoint.Saver.save = limiting  # type: ignore[method-assign]

    return install


def test_a_full_disk_keeps_the_old_checkpoint_and_says_what_is_needed(scene: Scene, tally: Any) -> None:
    scene = scene.changed(KINDS["dpo"])
    out = scene.folder / "run"
    ended = scene.run(out, faults=[limited(50_000)])
    assert ended.code == 5, ended.err[-2000:]
    assert "cannot save the checkpoint" in ended.last
    assert " are free; free some disk space" in ended.last
    assert "Traceback" not in ended.err
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-000002"]
    scene.finish(out)
    survived = outcome(out) == scene.undisturbed().outcome and not leftovers(out)
    tally("a full disk", survived)
    assert survived


def crowded(free: int) -> Any:
    """Say that so many bytes are free."""

    def install() -> None:
        usage = shutil.disk_usage
        shutil.disk_usage = lambda path: usage(path)._replace(free=free)  # type: ignore[assignment]

    return install


def test_a_disk_that_cannot_hold_a_checkpoint_is_noticed_before_a_byte_is_written(scene: Scene, tally: Any) -> None:
    scene = scene.changed(KINDS["dpo"])
    out = scene.folder / "run"
    ended = scene.run(out, faults=[crowded(100_000)])
    assert ended.code == 5
    assert "cannot save the checkpoint of step 2: not enough disk space" in ended.last
    assert "it needs about" in ended.last
    assert not list((out / "checkpoints").glob("*"))
    scene.finish(out)
    tally("a disk that is too full", True)


def small_disk(folder: Path) -> bool:
    """Mount a disk of two megabytes."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_a_real_small_disk_that_fills_up(scene: Scene, tally: Any) -> None:
    disk = scene.folder / "disk"
    if not small_disk(disk):
        pytest.skip("mounting needs a privilege that this process has not")
    try:
        scene = scene.changed(KINDS["dpo"] | {"training.save_total_limit": None, "training.save_steps": 1})
        ended = scene.run(disk / "run")
        assert ended.code == 5
        assert "cannot save the checkpoint" in ended.last
        assert "Traceback" not in ended.err
        kept = sorted(path.name for path in (disk / "run" / "checkpoints").iterdir())
        assert kept
        assert not leftovers(disk / "run")
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        scene.finish(disk / "run")
        survived = outcome(disk / "run") == scene.undisturbed().outcome
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)
    tally("a small disk that fills up", survived)
    assert survived


def read_only() -> None:
    """Lose the right to write, as on a disk that was mounted read-only after an error."""
    opening = os.open

    def refuse(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return opening(path, flags, *args, **options)

    from dpoctl import files
    from dpoctl.runs import serialization

    class Refusing(type(Path())):  # type: ignore[misc]
        def open(self, mode: str = "r", *args: Any, **options: Any) -> Any:
            if set(mode) & set("wax+"):
                raise OSError(errno.EROFS, "Read-only file system", str(self))
            return super().open(mode, *args, **options)

    os.open = refuse
    original = files.write_atomically
    files.write_atomically = serialization.write_atomically = lambda path, text: original(Refusing(path), text)


def test_a_folder_that_becomes_read_only_ends_the_run_in_one_line(scene: Scene, tally: Any) -> None:
    scene = scene.changed(KINDS["dpo"])
    ended = scene.run(scene.folder / "run", faults=[at_step(3, read_only)])
    assert ended.code == 5
    assert "Read-only file system" in ended.last
    assert "Traceback" not in ended.err
    scene.finish(scene.folder / "run")
    survived = outcome(scene.folder / "run") == scene.undisturbed().outcome
    tally("a folder that becomes read-only", survived)
    assert survived


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_loaded(scene: Scene, tally: Any) -> None:
    (scene.folder / "file").write_text("")
    for out in (scene.folder / "file" / "run", Path("/proc/run")):
        ended = scene.start_at(out, scene.folder / "refused")
        assert ended.code == 5, ended.err
        assert " cannot be used: " in ended.last
        assert "Traceback" not in ended.err
    tally("a folder that cannot be written", True, True)


def test_two_runs_never_share_a_folder(scene: Scene, tally: Any) -> None:
    scene = scene.changed(KINDS["dpo"])
    out = scene.folder / "run"
    first = scene.start(
        out, faults=[at_step(3, lambda: ((out / "waits").write_text("") and None) or wait_for(out / "go"))]
    )
    while not (out / "waits").exists():
        assert first.poll() is None
    for options in (("--resume",), ("--overwrite",), ()):
        second = scene.run(out, *options)
        assert second.code == 2
        assert options == () or "is writing to this run directory" in second.last
    (out / "go").write_text("")
    assert first.wait().code == 0
    assert json.loads((out / "run_status.json").read_text())["state"] == "finished"
    survived = outcome(out) == scene.undisturbed().outcome
    tally("two runs in one folder", survived, survived, survived)
    assert survived


def test_a_folder_that_vanishes_under_a_run_ends_it_in_one_line(scene: Scene, tally: Any) -> None:
    scene = scene.changed(KINDS["dpo"])
    out = scene.folder / "run"

    def vanish() -> None:
        # A save that goes on meanwhile could leave half of a checkpoint.
        wait_for(out / "LATEST")
        shutil.rmtree(out)

    ended = scene.run(out, faults=[at_step(3, vanish)])
    assert ended.code == 5
    assert f"{out} cannot be written: No such file or directory; fix the cause" in ended.last
    assert "Traceback" not in ended.err
    scene.finish(out)
    survived = outcome(out) == scene.undisturbed().outcome
    tally("a folder that vanishes", survived)
    assert survived

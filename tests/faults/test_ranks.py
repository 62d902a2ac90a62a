"""Ranks that die, sleep, differ or never meet: the run ends in bounded time and says who it was."""

import os
import platform
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import forked
import pytest
from fault_runs import KINDS, Scene, at_step, children_of, die, kill, outcome, rows_of, wait_for, wait_until
from forked import only_on
from safetensors.torch import load_file, save_file

from dpoctl.cli import launch
from dpoctl.cli.launch import _free_port

TWO = ("--num-processes", "2")
QUICK = KINDS["dpo"] | {"training.ddp_timeout": 6}


def failing(message: str) -> Any:
    def fail() -> None:
        raise ValueError(message)

    return fail


WAYS = {
    "dies": (die, "rank 1 was ended by SIGKILL"),
    "leaves": (lambda: os._exit(3), None),
    "sleeps": (lambda: time.sleep(600), "rank 0 got no answer from the other ranks"),
    "raises": (failing("a fault of rank 1"), "a fault of rank 1"),
}


@pytest.mark.long("sleeps", "leaves")
@pytest.mark.parametrize("way", WAYS)
def test_a_rank_that_fails_ends_the_run_in_bounded_time(way: str, scene: Scene, tally: Any) -> None:
    fault, said = WAYS[way]
    scene = scene.changed(QUICK)
    out = scene.folder / "run"
    began = time.monotonic()
    impatient = partial(setattr, launch, "GRACE_SECONDS", 1.0)
    ended = scene.run(out, *TWO, faults=[impatient, only_on(1, at_step(5, fault))])
    assert time.monotonic() - began < 40
    assert ended.code != 0
    assert "Traceback" not in ended.err
    if said is not None:
        assert said in ended.err, ended.err[-1500:]
    if way == "sleeps":
        assert "rank 1 did not respond and was killed" in ended.last
    scene.finish(out, *TWO)
    survived = outcome(out) == scene.undisturbed(*TWO).outcome
    tally(f"a rank {way}", survived)
    assert survived


def test_a_rank_that_stops_in_the_middle_of_a_save_loses_nothing(scene: Scene, tally: Any) -> None:
    scene = scene.changed(QUICK)
    out = scene.folder / "run"

    def unwilling() -> None:
        from dpoctl.runs import checkpoint

        write = checkpoint._write_part

        def dying(folder: Path, saved: Any, rank: int, shards: int) -> None:
            if saved.step == 6:
                die()
            write(folder, saved, rank, shards)

        checkpoint._write_part = dying

    ended = scene.run(out, *TWO, faults=[only_on(1, unwilling)])
    assert ended.code == 1
    assert sorted(path.name for path in (out / "checkpoints").glob("step-*")) == ["step-000002", "step-000004"]
    scene.finish(out, *TWO)
    survived = outcome(out) == scene.undisturbed(*TWO).outcome
    tally("a rank dies in a save", survived)
    assert survived


def drifting() -> None:
    """Change one number of this rank's weights by its last bit, where nothing else would notice."""
    import torch

    from dpoctl.tasks.recorder import Recorder

    advance = Recorder.advance

    def drift(self: Any, step: int) -> None:
        advance(self, step)
        if step == 3:
            with torch.no_grad():
                parameter = next(iter(self._policy.trainable_state().values()))
                parameter.view(-1)[0] = torch.nextafter(parameter.view(-1)[0], torch.tensor(9.0))

    Recorder.advance = drift  # type: ignore[method-assign]


def replanning() -> None:
    """Let this rank take the steps in another order."""
    from dpoctl.core.planner import Plan

    step = Plan.step
    Plan.step = lambda self, number: step(self, max(0, number - 1))  # type: ignore[method-assign]


def renaming() -> None:
    """Let this rank read another recipe."""
    from dpoctl.tasks import train

    resolved_yaml = train.resolved_yaml
    train.resolved_yaml = lambda recipe: resolved_yaml(recipe) + "# another\n"


def exchanging() -> None:
    """Let this rank read another model, as on a machine whose folder has another one of that name."""
    from dpoctl.model import source

    find = source.find_source

    def found(name: str, **options: Any) -> Any:
        return find(str(Path(name).with_name("another")), **options)

    source.find_source = found


DIFFERENT = {
    "weights": (drifting, "rank 1 differs from rank 0 in its weights"),
    "plan": (replanning, "rank 1 is not at the same step as rank 0"),
    "recipe": (renaming, "rank 1 differs from rank 0 in its recipe or dpoctl version"),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_a_rank_that_differs_is_named(what: str, scene: Scene, tally: Any) -> None:
    fault, said = DIFFERENT[what]
    out = scene.folder / "run"
    ended = scene.changed(QUICK).run(out, *TWO, faults=[only_on(1, fault)])
    assert ended.code == 1
    assert said in ended.last, ended.err[-1500:]
    assert "Traceback" not in ended.err
    tally("a rank that differs", True)


def test_a_rank_that_divides_another_model_is_named_before_the_first_step(scene: Scene, tally: Any) -> None:
    tiny = Path(scene.recipe["model"]["model_name_or_path"])
    shutil.copytree(tiny, tiny.with_name("another"), dirs_exist_ok=True)
    weights = load_file(tiny / "model.safetensors")
    weights["lm_head.weight"][-1, -1] += 1
    save_file(weights, tiny.with_name("another") / "model.safetensors", metadata={"format": "pt"})
    out = scene.folder / "run"
    ended = scene.changed(QUICK | {"training.sharding": "full"}).run(out, *TWO, faults=[only_on(1, exchanging)])
    assert ended.code == 1
    assert "rank 1 differs from rank 0 in its model" in ended.last, ended.err[-1500:]
    assert not (out / "metrics.jsonl").exists()
    tally("a rank that differs", True)


def numbered(number: int, world: int, port: str) -> dict[str, str]:
    """The variables of a rank as a launcher of others sets them."""
    ranks = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(world)}
    return ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def test_ranks_that_do_not_see_each_other_end_in_bounded_time(scene: Scene, tally: Any) -> None:
    scene = scene.changed(QUICK | {"training.ddp_timeout": 2})
    began = time.monotonic()
    # Each waits for the other at a door of its own.
    ranks = [scene.start(scene.folder / "run", **numbered(number, 2, str(_free_port()))) for number in range(2)]
    for child in ranks:
        ended = child.wait(60)
        assert ended.code == 5, ended.err
        assert "cannot reach the other ranks" in ended.last
        assert "Traceback" not in ended.err
    assert time.monotonic() - began < 40
    tally("ranks that do not see each other", True)


def test_two_machines_with_one_rank_and_one_cache_each_give_the_bits_of_one_machine(scene: Scene, tally: Any) -> None:
    """As torchrun starts them, with a shared run directory."""
    scene, port = scene.changed(KINDS["dpo"]), str(_free_port())
    out, one = scene.folder / "run", scene.folder / "one"
    ranks = []
    for number in range(2):
        env = numbered(number, 2, port) | {"LOCAL_RANK": "0", "DPOCTL_CACHE": str(scene.folder / f"cache-{number}")}
        ranks.append(scene.start(out, **env, LOCAL_WORLD_SIZE="1", GROUP_WORLD_SIZE="2"))
    for child in ranks:
        assert child.wait().code == 0
    assert scene.run(one, *TWO).code == 0
    survived = outcome(out) == outcome(one)
    tally("two machines", survived)
    assert survived


@pytest.mark.parametrize("earlier", [False, True], ids=["new", "overwritten"])
def test_a_run_directory_that_is_not_shared_is_refused_before_anything_is_written(
    earlier: bool, scene: Scene, tally: Any
) -> None:
    from dpoctl.core import guard

    scene, port = scene.changed(QUICK), str(_free_port())
    places = [scene.folder / f"machine-{number}" / "run" for number in range(2)]
    before = {}
    for place in places:
        place.parent.mkdir()
    if earlier:
        scene.finish(places[0])
        before = {file: file.read_bytes() for file in places[0].rglob("*") if file.is_file()}
    options = ("--overwrite",) if earlier else ()
    impatient = [lambda: setattr(guard, "SHARED_SECONDS", 0.5)]
    ranks = [
        scene.start(places[number], *options, faults=impatient, **numbered(number, 2, port)) for number in range(2)
    ]
    for number, child in enumerate(ranks):
        ended = child.wait(60)
        assert ended.code == 5, ended.err
        assert "Traceback" not in ended.err
        assert (
            f"rank 1 on {platform.node()} cannot read what rank 0 wrote to the run directory {places[1]}" in ended.last
        )
        assert "training.output_dir must be a folder that all machines share" in ended.last
        assert places[number].exists() == (earlier and number == 0)
    assert all(file.read_bytes() == content for file, content in before.items())
    tally("a run directory that is not shared", True)


def read_only() -> None:
    """Let this machine have the folder of the run, and no right to write to it."""
    touch = Path.touch

    def refusing(self: Path, *args: Any, **options: Any) -> None:
        if self.parent.name == "run":
            raise OSError(30, "Read-only file system")
        touch(self, *args, **options)

    Path.touch = refusing  # type: ignore[method-assign]


def test_a_run_directory_that_a_machine_cannot_write_to_is_refused_at_the_start(scene: Scene, tally: Any) -> None:
    out = scene.folder / "run"
    ended = scene.changed(QUICK).run(out, *TWO, faults=[only_on(1, read_only)])
    assert ended.code == 5, ended.err
    assert f"rank 1 on {platform.node()} cannot write to the run directory {out}" in ended.last
    assert not out.exists()
    tally("a run directory that is read-only on one machine", True)


def test_processes_that_do_not_know_of_each_other_do_not_train_into_one_folder(scene: Scene, tally: Any) -> None:
    scene, out = scene.changed(KINDS["dpo"]), scene.folder / "run"
    first = scene.start(out, faults=[at_step(2, lambda: wait_for(scene.folder / "go"))])
    wait_until(lambda: (out / "metrics.jsonl").exists(), first)
    recipe = out.with_name("run.yaml")
    second = forked.run("dpo", recipe, "--output-dir", out, "--resume", files=scene.folder / "second")
    assert second.code == 2
    assert "is writing to this run directory" in second.last
    (scene.folder / "go").touch()
    assert first.wait().code == 0
    under_slurm = forked.run("dpo", recipe, files=scene.folder / "slurm", env={"SLURM_STEP_NUM_TASKS": "2"})
    assert under_slurm.code == 2
    assert "srun started 2 processes" in under_slurm.last
    tally("a launcher that starts strangers", True, True)


def test_no_rank_outlives_its_launcher(scene: Scene, tally: Any) -> None:
    scene, out = scene.changed(KINDS["dpo"]), scene.folder / "run"
    child = scene.start(out, *TWO)
    wait_until(lambda: (out / "metrics.jsonl").exists(), child)
    ranks = children_of(child.pid)
    assert len(ranks) == 2
    kill(child, 0, signal.SIGKILL)
    child.wait()
    deadline = time.monotonic() + 5
    while any(alive(pid) for pid in ranks) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(alive(pid) for pid in ranks)
    scene.finish(out, *TWO)
    survived = outcome(out) == scene.undisturbed(*TWO).outcome
    tally("a launcher that is killed", survived)
    assert survived


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_another_number_of_ranks_goes_on_with_the_same_maths(scene: Scene, tally: Any) -> None:
    scene = scene.changed(KINDS["dpo"] | {"model.disable_dropout": True})
    scene.finish(scene.folder / "whole")
    out = scene.folder / "run"
    assert scene.run(out, faults=[at_step(7, die)]).code == -9
    ended = scene.finish(out, *TWO)
    assert "resumed from step 4" in ended.err or "resumed from step 6" in ended.err
    rows, same = rows_of(out), rows_of(scene.folder / "whole")
    survived = all(
        row[key] == pytest.approx(other[key], rel=1e-4, abs=1e-5)
        for row, other in zip(rows, same, strict=True)
        for key in other
    )
    tally("another number of ranks", survived)
    assert survived


def test_a_rank_that_sleeps_ends_a_run_with_replicas_in_bounded_time_too(scene: Scene, whole: bool, tally: Any) -> None:
    """Its shards and its replicas are groups of their own, which have their own patience."""
    if not whole:
        pytest.skip("in the whole suite only")
    scene = scene.changed(QUICK | {"training.sharding": "full", "training.replicas": 2, "training.logging_steps": 9})
    began = time.monotonic()
    sleeping = [only_on(3, at_step(3, lambda: time.sleep(600)))]
    ended = scene.run(scene.folder / "run", "--num-processes", "4", faults=sleeping)
    assert time.monotonic() - began < 60
    assert ended.code == 1
    assert "got no answer from the other ranks" in ended.err
    assert "rank 3 did not respond and was killed" in ended.last
    tally("a rank of a replica sleeps", True)

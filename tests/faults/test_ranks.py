"""Ranks that die, sleep, differ or never meet: the run ends in bounded time and says who it was."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import forked
import pytest
from fault_runs import KINDS, Scene, at_step, die, kill, outcome, wait_until
from forked import Child, only_on

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


@pytest.mark.parametrize("way", WAYS)
def test_a_rank_that_fails_ends_the_run_in_bounded_time(way: str, scene: Scene, tally: Any) -> None:
    fault, said = WAYS[way]
    scene = scene.changed(QUICK)
    out = scene.folder / "run"
    began = time.monotonic()
    ended = scene.run(out, *TWO, faults=[only_on(1, at_step(5, fault))])
    assert time.monotonic() - began < 40
    assert ended.code != 0
    assert "Traceback" not in ended.err
    if said is not None:
        assert said in ended.err, ended.err[-1500:]
    if way == "sleeps":
        assert "rank 1 did not answer" in ended.last
    scene.finish(out, *TWO)
    scene.finish(scene.folder / "whole", *TWO)
    survived = outcome(out) == outcome(scene.folder / "whole")
    tally(f"a rank {way}", survived)
    assert survived


def test_a_rank_that_stops_in_the_middle_of_a_save_loses_nothing(scene: Scene, tally: Any) -> None:
    scene = scene.changed(QUICK)
    out = scene.folder / "run"

    def unwilling() -> None:
        from dpoctl.runs import checkpoint

        write = checkpoint._write_part

        def dying(folder: Path, saved: Any, rank: int, sharded: bool) -> None:
            if saved.step == 6:
                die()
            write(folder, saved, rank, sharded)

        checkpoint._write_part = dying

    ended = scene.run(out, *TWO, faults=[only_on(1, unwilling)])
    assert ended.code == 1
    assert sorted(path.name for path in (out / "checkpoints").glob("step-*")) == ["step-000002", "step-000004"]
    scene.finish(out, *TWO)
    scene.finish(scene.folder / "whole", *TWO)
    survived = outcome(out) == outcome(scene.folder / "whole")
    tally("a rank dies in a save", survived)
    assert survived


def drifting() -> None:
    """Change one number of this rank's weights by its last bit, where nothing else would notice."""
    import torch

    from dpoctl.tasks.journal import Journal

    advance = Journal.advance

    def drift(self: Any, step: int) -> None:
        advance(self, step)
        if step == 3:
            with torch.no_grad():
                parameter = next(iter(self._policy.trainable_state().values()))
                parameter.view(-1)[0] = torch.nextafter(parameter.view(-1)[0], torch.tensor(9.0))

    Journal.advance = drift  # type: ignore[method-assign]


def replanning() -> None:
    """Let this rank take the steps in another order."""
    from dpoctl.core.planner import Plan

    step = Plan.step
    Plan.step = lambda self, number: step(self, max(0, number - 1))  # type: ignore[method-assign]


def renaming() -> None:
    """Let this rank read another recipe."""
    from dpoctl.recipe.schema import Recipe

    to_yaml = Recipe.to_yaml
    Recipe.to_yaml = lambda self: to_yaml(self) + "# another\n"  # type: ignore[method-assign]


DIFFERENT = {
    "weights": (drifting, "rank 1 has other weights than rank 0"),
    "plan": (replanning, "rank 1 is not at the same step as rank 0"),
    "recipe": (renaming, "rank 1 has other recipe or version than rank 0"),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_a_rank_that_has_parted_is_named(what: str, scene: Scene, tally: Any) -> None:
    fault, said = DIFFERENT[what]
    out = scene.folder / "run"
    ended = scene.changed(QUICK).run(out, *TWO, faults=[only_on(1, fault)])
    assert ended.code == 1
    assert said in ended.last, ended.err[-1500:]
    assert "Traceback" not in ended.err
    tally("a rank that has parted", True)


def rank(scene: Scene, out: Path, number: int, world: int, port: str) -> Child:
    """A rank as a launcher of others starts it."""
    env = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(world)}
    return scene.start(out, **env, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)


def test_ranks_that_do_not_see_each_other_end_in_bounded_time(scene: Scene, tally: Any) -> None:
    from dpoctl.cli.workers import _free_port

    scene = scene.changed(QUICK)
    began = time.monotonic()
    # Each waits for the other at a door of its own.
    ranks = [rank(scene, scene.folder / "run", number, 2, str(_free_port())) for number in range(2)]
    for child in ranks:
        ended = child.wait(60)
        assert ended.code == 5, ended.err
        assert "did not find the others" in ended.last
        assert "Traceback" not in ended.err
    assert time.monotonic() - began < 40
    tally("ranks that do not see each other", True)


def test_processes_that_do_not_know_of_each_other_do_not_train_into_one_folder(scene: Scene, tally: Any) -> None:
    scene, out = scene.changed(KINDS["dpo"]), scene.folder / "run"
    first = scene.start(out, faults=[at_step(2, lambda: time.sleep(4))])
    wait_until(lambda: (out / "metrics.jsonl").exists(), first)
    recipe = out.with_name("run.yaml")
    second = forked.run("dpo", recipe, "--output-dir", out, "--resume", files=scene.folder / "second")
    assert second.code == 2
    assert "is writing this run" in second.last
    assert first.wait().code == 0
    under_slurm = forked.run("dpo", recipe, files=scene.folder / "slurm", env={"SLURM_STEP_NUM_TASKS": "2"})
    assert under_slurm.code == 2
    assert "srun started 2 processes" in under_slurm.last
    tally("a launcher that starts strangers", True, True)


def test_no_rank_outlives_its_launcher(scene: Scene, tally: Any) -> None:
    from fault_runs import children_of

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
    scene.finish(scene.folder / "whole", *TWO)
    survived = outcome(out) == outcome(scene.folder / "whole")
    tally("a launcher that is killed", survived)
    assert survived


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_another_number_of_ranks_goes_on_with_the_same_maths(scene: Scene, tally: Any) -> None:
    from fault_runs import rows_of

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

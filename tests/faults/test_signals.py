"""A signal to any process of a run: all ranks stop at the same step, after a checkpoint, and say so."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from fault_runs import KINDS, Scene, at_step, kill, leftovers, outcome, rows_of, wait_until
from forked import only_on

SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 138}
TWO = ("--num-processes", "2")


def to_itself(signum: int) -> Any:
    return lambda: os.kill(os.getpid(), signum)


def status_of(run: Path) -> dict[str, Any]:
    status: dict[str, Any] = json.loads((run / "run_status.json").read_text())
    return status


@pytest.mark.parametrize("signum", SIGNALS)
@pytest.mark.parametrize("rank", [None, 0, 1])
def test_a_signal_to_one_process_stops_all_at_the_same_step(
    rank: int | None, signum: signal.Signals, scene: Scene, whole: bool, tally: Any
) -> None:
    if not whole and (rank, signum) not in [(None, signal.SIGINT), (0, signal.SIGUSR1), (1, signal.SIGTERM)]:
        pytest.skip("part of the whole suite")
    scene = scene.changed(KINDS["dpo"] | {"training.save_steps": None})
    options = () if rank is None else TWO
    scene.finish(scene.folder / "whole", *options)
    out = scene.folder / "stopped"
    fault = at_step(3, to_itself(signum))
    ended = scene.run(out, *options, faults=[fault if rank is None else only_on(rank, fault)])
    assert ended.code == SIGNALS[signum], ended.err[-2000:]
    # The last thing that a step does is to look for signals, so one that comes behind that waits for the next step.
    assert f"error: stopped by signal {signum} after step 4; a checkpoint was written" in ended.last
    assert "Traceback" not in ended.err
    assert status_of(out)["state"] == "stopped"
    assert status_of(out)["exit_code"] == SIGNALS[signum]
    assert status_of(out)["checkpoint"] == "step-000004"
    assert not list(out.glob("*.safetensors"))
    assert all(abs(row["loss"]) < 100 for row in rows_of(out) if "loss" in row)
    scene.finish(out, *options)
    survived = outcome(out) == outcome(scene.folder / "whole") and not leftovers(out)
    tally("a signal to one process", survived)
    assert survived
    assert status_of(out)["state"] == "finished"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(signum: signal.Signals, scene: Scene, tally: Any) -> None:
    scene = scene.changed(KINDS["dpo"])
    child = scene.start(scene.folder / "run", faults=[at_step(5, lambda: time.sleep(60))])
    wait_until(lambda: rows_until(scene.folder / "run", 4), child)
    child.send_signal(signum)
    time.sleep(0.3)
    began = time.monotonic()
    child.send_signal(signum)
    ended = child.wait(5)
    assert time.monotonic() - began < 1
    assert ended.code == -signum
    scene.finish(scene.folder / "run")
    scene.finish(scene.folder / "whole")
    survived = outcome(scene.folder / "run") == outcome(scene.folder / "whole")
    tally("a second signal", survived)
    assert survived


def rows_until(run: Path, step: int) -> bool:
    return (run / "metrics.jsonl").exists() and any(row["step"] >= step for row in rows_of(run))


def test_a_storm_of_signals_leaves_one_good_checkpoint(scene: Scene, tally: Any) -> None:
    scene = scene.changed(KINDS["dpo"])
    child = scene.start(scene.folder / "run", *TWO)
    wait_until(lambda: rows_until(scene.folder / "run", 2), child)
    for _ in range(10):
        kill(child, signum=signal.SIGTERM)
    assert child.wait().code in (143, -15, 1)
    scene.finish(scene.folder / "run", *TWO)
    scene.finish(scene.folder / "whole", *TWO)
    survived = outcome(scene.folder / "run") == outcome(scene.folder / "whole")
    tally("ten signals to every process", survived)
    assert survived


MOMENTS = {
    "while the data are read": "dpoctl.tasks.train:read_data",
    "while the model is loaded": "dpoctl.tasks.train:load_policy",
    "while the model is exported": "dpoctl.tasks.train:refresh_report",
}


@pytest.mark.parametrize("options", [(), TWO], ids=["one process", "two processes"])
@pytest.mark.parametrize("signum", SIGNALS)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_while_no_step_is_taken_ends_the_run_and_says_so(
    moment: str, signum: signal.Signals, options: tuple[str, ...], scene: Scene, whole: bool, tally: Any
) -> None:
    if not whole and options and (moment, signum) != ("while the model is loaded", signal.SIGTERM):
        pytest.skip("part of the whole suite")
    out = scene.folder / "run"
    fault = before(MOMENTS[moment], to_itself(signum))
    ended = scene.run(out, *options, faults=[fault], DPOCTL_CACHE=str(scene.folder / "cache"))
    assert ended.code == SIGNALS[signum], ended.err[-2000:]
    assert "Traceback" not in ended.err
    status = status_of(out)
    assert (status["state"], status["exit_code"]) == ("stopped", SIGNALS[signum])
    assert leftovers(out) == []
    scene.finish(out)
    tally("a signal while no step is taken", True)
    assert status_of(out)["state"] == "finished"


def before(place: str, fault: Any) -> Any:
    """Do something before a function is called, by its dotted name."""

    def install() -> None:
        import importlib

        module, _, name = place.partition(":")
        owner = importlib.import_module(module)
        original = getattr(owner, name)

        def first(*args: Any, **options: Any) -> Any:
            fault()
            return original(*args, **options)

        setattr(owner, name, first)

    return install


def test_a_signal_of_somebody_else_finds_the_run_as_it_stands(scene: Scene, tally: Any) -> None:
    child = scene.start(scene.folder / "run", DPOCTL_CACHE=str(scene.folder / "cache"))
    wait_until(lambda: (scene.folder / "run" / "recipe.yaml").exists(), child)
    child.send_signal(signal.SIGTERM)
    assert child.wait().code == 143
    assert status_of(scene.folder / "run")["state"] == "stopped"
    assert not list((scene.folder / "run").glob("*.safetensors"))
    scene.finish(scene.folder / "run")
    tally("a signal before the first step", True)


def test_a_scheduler_that_starts_again_needs_no_option(scene: Scene, tally: Any) -> None:
    scene = scene.changed(KINDS["dpo"] | {"training.resume": "auto"})
    scene.finish(scene.folder / "whole")
    out = scene.folder / "run"
    assert scene.run(out, faults=[at_step(5, to_itself(signal.SIGUSR1))]).code == 138
    ended = scene.run(out)
    assert ended.code == 0, ended.err
    assert "resumed from step 6" in ended.err
    survived = outcome(out) == outcome(scene.folder / "whole")
    tally("stopped and started again by a scheduler", survived)
    assert survived

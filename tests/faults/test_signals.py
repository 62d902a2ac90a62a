"""A signal to any process of a run: all ranks stop at the same step, after a checkpoint, and say so."""

import hashlib
import itertools
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import forked
import pytest
from fault_runs import KINDS, Scene, at_step, kill, leftovers, outcome, rows_of, wait_until
from forked import only_on

from dpoctl.runs.status import read_status

SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 138, signal.SIGHUP: 129, signal.SIGXCPU: 152}
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
    survived = outcome(out) == scene.undisturbed(*options).outcome and not leftovers(out)
    tally("a signal to one process", survived)
    assert survived
    assert status_of(out)["state"] == "finished"


@pytest.mark.long("2")
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once_with_a_status(signum: signal.Signals, scene: Scene, tally: Any) -> None:
    scene = scene.changed(KINDS["dpo"])
    child = scene.start(scene.folder / "run", faults=[at_step(6, lambda: time.sleep(60))])
    wait_until(lambda: latest(scene.folder / "run") == "step-000004" and rows_until(scene.folder / "run", 5), child)
    child.send_signal(signum)
    wait_until(lambda: "stopping after this step" in child.said(), child, 2)
    child.send_signal(signum)
    ended = child.wait(20)
    assert ended.code == 128 + signum
    assert "stopping now" in ended.err
    assert f"stopped by signal {signum} in the middle of a step" in ended.last
    status = status_of(scene.folder / "run")
    assert (status["state"], status["exit_code"], status["checkpoint"]) == ("stopped", 128 + signum, "step-000004")
    scene.finish(scene.folder / "run")
    survived = outcome(scene.folder / "run") == scene.undisturbed().outcome
    tally("a second signal", survived)
    assert survived


@pytest.mark.long("1", "2")
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_in_the_middle_of_one_long_operation_is_answered_at_once_and_the_third_ends(
    signum: signal.Signals, scene: Scene, tally: Any
) -> None:
    child = scene.start(scene.folder / "run", faults=[at_step(3, one_long_operation)])
    wait_until(lambda: rows_until(scene.folder / "run", 2), child)
    time.sleep(0.5)
    for answer in ("stopping after this step", "stopping now"):
        child.send_signal(signum)
        wait_until(lambda answer=answer: answer in child.said(), child, 2)  # type: ignore[misc]
    child.send_signal(signum)
    began = time.monotonic()
    ended = child.wait(5)
    assert time.monotonic() - began < 2
    assert ended.code == 128 + signum
    status = status_of(scene.folder / "run")
    assert (status["state"], status["exit_code"]) == ("stopped", 128 + signum)
    scene.finish(scene.folder / "run")
    tally("a third signal", True)


def one_long_operation() -> None:
    """One call of half a minute that gives Python no chance to run a handler before it ends, as a backward pass."""
    hashlib.pbkdf2_hmac("sha256", b"", b"", 60_000_000)


@pytest.mark.long("two processes")
@pytest.mark.parametrize("options", [(), TWO], ids=["one process", "two processes"])
def test_no_evaluation_runs_on_after_a_signal_and_it_is_made_up_for(
    options: tuple[str, ...], scene: Scene, tally: Any
) -> None:
    scene = scene.changed(KINDS["dpo"] | {"training.save_steps": None, "training.global_batch_size": 2})
    out = scene.folder / "run"

    def install() -> None:
        from dpoctl.core.objective import Objective

        original, calls = Objective.evaluate, itertools.count(1)

        def evaluate(self: Any, *arguments: Any) -> None:
            original(self, *arguments)
            # None before the first step; this one is the first of three after the fourth.
            if next(calls) == 1 and os.environ.get("RANK", "0") == "0":
                os.kill(os.getpid(), signal.SIGTERM)

        Objective.evaluate = evaluate  # type: ignore[method-assign]

    ended = scene.run(out, *options, faults=[install])
    assert ended.code == 143, ended.err[-2000:]
    assert "stopping after this step" in ended.err
    assert "error: stopped by signal 15 after step 4; a checkpoint was written" in ended.last
    assert [row["step"] for row in rows_of(out) if "eval_loss" in row] == [0]
    scene.finish(out, *options)
    survived = outcome(out) == scene.undisturbed(*options).outcome
    tally("a signal during an evaluation", survived)
    assert survived


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGXCPU])
@pytest.mark.parametrize("phase", ["loading", "reference", "export", "report"])
@pytest.mark.parametrize("options", [(), TWO], ids=["one process", "two processes"])
def test_the_status_tells_of_a_signal_in_every_phase(
    options: tuple[str, ...], phase: str, signum: signal.Signals, scene: Scene, whole: bool, tally: Any
) -> None:
    if not whole and (bool(options), phase, signum) not in PHASES_TRIED:
        pytest.skip("part of the whole suite")

    def install() -> None:
        from dpoctl.tasks import train
        from dpoctl.tasks.reference import Reference

        owner: Any
        owner, name = {
            "loading": (train, "load_policy"),
            "reference": (Reference, "read_into"),
            "export": (train, "export_model"),
            "report": (train, "refresh_report"),
        }[phase]
        original = getattr(owner, name)

        def interrupted(*arguments: Any, **more: Any) -> Any:
            os.kill(os.getppid() if options else os.getpid(), signum)
            time.sleep(0.5)
            return original(*arguments, **more)

        setattr(owner, name, interrupted)

    out = scene.folder / "run"
    ended = scene.run(out, *options, faults=[only_on(0, install)])
    assert ended.code == 128 + signum, ended.err[-2000:]
    status = status_of(out)
    survived = (status["state"], status["exit_code"]) == ("stopped", 128 + signum)
    tally("a signal outside the steps", survived)
    assert survived, status
    scene.finish(out, *options)


PHASES_TRIED = [(False, "loading", signal.SIGHUP), (False, "export", signal.SIGXCPU), (True, "loading", signal.SIGXCPU)]


@pytest.mark.long("12")
@pytest.mark.parametrize("signum", [signal.SIGQUIT, signal.SIGUSR2, signal.SIGALRM, signal.SIGABRT, signal.SIGKILL])
def test_every_reader_tells_of_a_run_that_a_signal_has_killed(
    signum: signal.Signals, scene: Scene, whole: bool, tally: Any
) -> None:
    if not whole and signum not in (signal.SIGQUIT, signal.SIGUSR2):
        pytest.skip("part of the whole suite")
    out = scene.folder / "run"
    assert scene.run(out, faults=[at_step(3, to_itself(signum))]).code == -signum
    told = [read_status(out), forked.run("eval", out, files=scene.folder / "eval")]
    told += [forked.run(command, out, files=scene.folder / command) for command in ("report", "merge", "chat")]
    assert told[0]["state"] == "died"
    assert "has died (process " in told[1].err
    assert "has died (process " in (out / "report.html").read_text()
    assert all("has died (process " in one.err for one in told[3:])
    scene.finish(out)
    tally("a signal that kills", True)


def latest(run: Path) -> str:
    return (run / "LATEST").read_text().strip() if (run / "LATEST").exists() else ""


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
    survived = outcome(scene.folder / "run") == scene.undisturbed(*TWO).outcome
    tally("ten signals to every process", survived)
    assert survived


MOMENTS = {
    "while the data are read": "dpoctl.tasks.train:read_data",
    "while the model is loaded": "dpoctl.tasks.train:load_policy",
    "while the model is exported": "dpoctl.tasks.train:refresh_report",
}
MOMENTS_TRIED = {
    (False, "while the data are read", signal.SIGINT),
    (False, "while the data are read", signal.SIGHUP),
    (False, "while the model is exported", signal.SIGUSR1),
    (False, "while the model is loaded", signal.SIGXCPU),
    (True, "while the model is loaded", signal.SIGTERM),
}
"""With two processes, the moment and the signal: each signal and each moment once in the short form."""


@pytest.mark.parametrize("options", [(), TWO], ids=["one process", "two processes"])
@pytest.mark.parametrize("signum", SIGNALS)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_while_no_step_is_taken_ends_the_run_and_says_so(
    moment: str, signum: signal.Signals, options: tuple[str, ...], scene: Scene, whole: bool, tally: Any
) -> None:
    if not whole and (bool(options), moment, signum) not in MOMENTS_TRIED:
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
    out = scene.folder / "run"
    assert scene.run(out, faults=[at_step(5, to_itself(signal.SIGUSR1))]).code == 138
    ended = scene.run(out)
    assert ended.code == 0, ended.err
    assert "resumed from step 6" in ended.err
    survived = outcome(out) == scene.undisturbed().outcome
    tally("stopped and started again by a scheduler", survived)
    assert survived

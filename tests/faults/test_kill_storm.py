"""Kill a run at random instants and at every call inside a save: the same command ends with the same bits."""

import random
import shutil
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
from fault_runs import KINDS, Scene, die, kill, leftovers, outcome

from dpoctl.runs import serialization

RANKS = {1: (), 2: ("--num-processes", "2")}
SHORT = {("sft, best", 1), ("dpo", 2), ("dpo, LoRA", 1), ("beta-dpo", 2)}
"""Kinds of runs and ranks of the short form."""
TOUCHING = ("mkdir", "open", "fsync", "replace", "rename", "unlink", "rmdir")


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_at_random_instants_ends_with_the_same_bits(
    kind: str, ranks: int, scene: Scene, whole: bool, tally: Any
) -> None:
    if (kind, ranks) not in SHORT and not whole:
        pytest.skip("in the whole suite only")
    scene, options = scene.changed(KINDS[kind]), RANKS[ranks]
    expected, takes = scene.undisturbed(*options)
    rng = random.Random(zlib.crc32(f"{kind} {ranks}".encode()))
    survived = []
    while len(survived) < (13 if whole else 3 - ranks):
        out = scene.folder / f"killed-{len(survived)}"
        if not killed(scene, out, options, rng, takes):
            shutil.rmtree(out)
            continue
        scene.finish(out, *options, DPOCTL_CACHE=str(out) + "-cache")
        survived.append(outcome(out) == expected and not leftovers(out))
    tally(f"kill at random: {kind}, {ranks} rank{'s' * (ranks > 1)}", *survived)
    assert all(survived)


def killed(scene: Scene, out: Path, options: tuple[str, ...], rng: random.Random, takes: float) -> bool:
    """Kill a run once or twice, whole or one of its processes; whether it died of it."""
    died = False
    for _ in range(rng.choice([1, 1, 2])):
        child = scene.start(out, *options, "--resume", DPOCTL_CACHE=str(out) + "-cache")
        time.sleep(rng.uniform(0.05, 0.95) * takes)
        kill(child, rng.choice([None, 0, 1, 2]) if options else None)
        died |= child.wait().code != 0
    return died


def dying_in_save(number: int, call: int) -> Any:
    """Die before a call that touches the disk, inside the save of that number."""

    def install() -> None:
        import os

        from dpoctl.runs import checkpoint

        saves, calls, save, wait = [0], [0], checkpoint.Saver.save, checkpoint.Saver.wait

        def wrap(original: Any) -> Any:
            def wrapped(*args: Any, **options: Any) -> Any:
                if saves[0] == number:
                    calls[0] += 1
                    if calls[0] == call:
                        die()
                return original(*args, **options)

            return wrapped

        def counting(self: Any, saved: Any) -> None:
            wait(self)
            saves[0] += 1
            save(self, saved)
            wait(self)
            if saves[0] == number:
                (self._checkpoints.parent / "calls").write_text(str(calls[0]))
                die()

        for name in TOUCHING:
            setattr(os, name, wrap(getattr(os, name)))
        serialization.save_file = wrap(serialization.save_file)
        checkpoint.Saver.save = counting  # type: ignore[method-assign]

    return install


@pytest.mark.long("dpo")
@pytest.mark.parametrize("kind", ["dpo", "dpo, LoRA"])
def test_a_run_killed_at_any_call_inside_a_save_ends_with_the_same_bits(
    kind: str, scene: Scene, whole: bool, tally: Any
) -> None:
    scene = scene.changed(KINDS[kind])
    expected = scene.undisturbed().outcome
    scene.run(scene.folder / "counted", faults=[dying_in_save(3, 10**6)])
    calls = int((scene.folder / "counted" / "calls").read_text())
    assert calls > 20
    points = range(1, calls + 1, 1 if whole and kind == "dpo" else 16)
    survived = []
    for call in points:
        out = scene.folder / f"call-{call}"
        assert scene.run(out, faults=[dying_in_save(3, call)]).code == -9
        scene.finish(out)
        survived.append(outcome(out) == expected and not leftovers(out))
    tally(f"kill at a call inside a save: {kind}", *survived)
    assert all(survived)


def test_a_run_killed_before_its_first_step_after_its_last_and_in_between_is_the_same(
    scene: Scene, whole: bool, tally: Any
) -> None:
    scene = scene.changed(KINDS["dpo"])
    expected = scene.undisturbed().outcome
    survived = []
    for name, fault in list(MOMENTS.items())[:: 1 if whole else 2]:
        out = scene.folder / name.replace(" ", "-")
        env = {"DPOCTL_CACHE": f"{out}-cache"}
        assert scene.run(out, "--resume", faults=[fault], **env).code == -9, name
        scene.finish(out, **env)
        survived.append(outcome(out) == expected and not leftovers(out))
    tally("kill at a named moment", *survived)
    assert all(survived)


def before(place: str, number: int = 1) -> Any:
    """Die before the call of that number of a function, by its dotted name."""

    def install() -> None:
        import importlib

        module, _, rest = place.partition(":")
        owner: Any = importlib.import_module(module)
        *above, name = rest.split(".")
        for part in above:
            owner = getattr(owner, part)
        calls, original = [0], getattr(owner, name)

        def wrapped(*args: Any, **options: Any) -> Any:
            calls[0] += 1
            if calls[0] == number:
                die()
            return original(*args, **options)

        setattr(owner, name, wrapped)

    return install


MOMENTS = {
    "before the recipe is written": before("dpoctl.tasks.train:_write_first_files"),
    "while it reads data": before("dpoctl.data.store:StoreWriter.commit"),
    "before the reference is kept": before("dpoctl.tasks.reference:Reference.read_into", 2),
    "in the first step": before("dpoctl.core.objective:Objective.backward", 1),
    "in the first evaluation": before("dpoctl.core.objective:Objective.evaluate", 1),
    "in a later evaluation": before("dpoctl.core.objective:Objective.evaluate", 3),
    "in the first step of an epoch": before("dpoctl.core.objective:Objective.backward", 6),
    "in the last step": before("dpoctl.core.objective:Objective.backward", 10),
    "before the model is written": before("dpoctl.tasks.train:export_model"),
    "before the report": before("dpoctl.tasks.train:refresh_report"),
}

"""Kill the ranks of a sharded run at random instants: the same command ends with the same bits."""

import random
import shutil
import time
import zlib
from typing import Any

import pytest
from fault_runs import KINDS, Scene, kill, leftovers, outcome

SHARDED = {"training.sharding": "full"}
STORMS = {("dpo", 2): 20, ("dpo", 4): 20, ("dpo, LoRA", 2): 10, ("beta-dpo", 2): 10}
"""Kinds of runs, ranks, and how often one is killed in the whole suite."""


@pytest.mark.parametrize(("kind", "ranks"), STORMS)
def test_a_sharded_run_killed_at_random_instants_ends_with_the_same_bits(
    kind: str, ranks: int, scene: Scene, whole: bool, tally: Any
) -> None:
    if not whole and (kind, ranks) != ("dpo", 2):
        pytest.skip("in the whole suite only")
    scene, options = scene.changed(KINDS[kind] | SHARDED), ("--num-processes", str(ranks))
    began = time.monotonic()
    scene.finish(scene.folder / "whole", *options)
    takes = time.monotonic() - began
    expected, rng = outcome(scene.folder / "whole"), random.Random(zlib.crc32(f"{kind} {ranks}".encode()))
    survived: list[bool] = []
    while len(survived) < (STORMS[kind, ranks] if whole else 1):
        out = scene.folder / f"killed-{len(survived)}"
        cache = str(out) + "-cache"
        child = scene.start(out, *options, "--resume", DPOCTL_CACHE=cache)
        time.sleep(rng.uniform(0.05, 0.95) * takes)
        kill(child, rng.choice([None, *range(ranks + 1)]))
        if child.wait().code == 0:
            shutil.rmtree(out)
            continue
        scene.finish(out, *options, DPOCTL_CACHE=cache)
        survived.append(outcome(out) == expected and not leftovers(out))
    tally(f"kill a sharded run: {kind}, {ranks} ranks", *survived)
    assert all(survived)

"""One cache folder of many runs: bits that flip, neighbours in other containers, clocks that differ, killed writers."""

import ctypes
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fault_runs import FULL, KINDS, Scene, outcome
from forked import Child, Fault, fork
from tiny_runs import write_rows

from dpoctl.data.records import Record
from dpoctl.data.store import StoreWriter, find_damage
from dpoctl.data.tokenize import TRAINED, Answer, build_example

NEW_PID_NAMESPACE = 0x20000000
HOUR = 3600.0


def kto(folder: Path) -> dict[str, Any]:
    rows = [
        {"prompt": f"question {number % 5}:", "completion": f" {'yes' if number % 2 else 'no'} {number}"}
        for number in range(12)
    ]
    rows = write_rows(folder / "kto.jsonl", [row | {"label": bool(number % 2)} for number, row in enumerate(rows)])
    return FULL | {
        "data": {"train": [str(rows)], "eval": {}},
        "dpo.loss": {"type": "kto"},
        "training.eval_steps": None,
    }


def flip(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


@pytest.mark.long("sft-34", "kto-34")
@pytest.mark.parametrize(("kind", "runs"), [("sft", 34), ("dpo", 17), ("kto", 34)])
def test_every_flipped_bit_is_found_before_the_file_is_used(
    kind: str, runs: int, scene: Scene, whole: bool, tally: Any
) -> None:
    scene = scene.changed(kto(scene.folder) if kind == "kto" else KINDS[kind])
    rng, cache = random.Random(kind), scene.folder / "cache"
    scene.finish(scene.folder / "clean", DPOCTL_CACHE=str(cache))
    stores = sorted((cache / "tokens").iterdir())
    shards = sorted((cache / "reference").glob("*.npy")) if kind != "sft" else []
    assert len(shards) == (0 if kind == "sft" else len(stores))
    for number in range(runs if whole else 1):
        victims = [rng.choice([file for file in store.iterdir() if file.stat().st_size]) for store in stores]
        for victim in victims + shards:
            flip(victim, rng)
        out = scene.folder / f"run-{number}"
        ended = scene.finish(out, DPOCTL_CACHE=str(cache))
        said = [line for line in ended.err.splitlines() if line.startswith("warning: damaged")]
        survived = outcome(out) == outcome(scene.folder / "clean")
        for victim in victims + shards:
            told = sum(str(victim) in line for line in said) == 1
            tally("a bit of the cache flips", told and survived)
            assert told, (victim, said)
        assert len(said) == len(victims + shards)
        assert survived


def in_another_container(hours: float) -> Fault:
    """Number processes from one, if that is permitted, and let the clock differ."""

    def install() -> None:
        now = time.time
        time.time = lambda: now() + hours * HOUR
        if ctypes.CDLL(None).unshare(NEW_PID_NAMESPACE) == 0 and (pid := os.fork()):
            _, status = os.waitpid(pid, 0)
            os._exit(os.waitstatus_to_exitcode(status) % 256)

    return install


def test_neighbours_in_other_containers_share_a_broken_cache(scene: Scene, whole: bool, tally: Any) -> None:
    scene = scene.changed(KINDS["dpo"])
    cache, rng = scene.folder / "cache", random.Random(0)
    scene.finish(scene.folder / "clean", DPOCTL_CACHE=str(cache))
    clean = outcome(scene.folder / "clean")
    for store in (cache / "tokens").iterdir():
        flip(store / "ids.bin", rng)
    for shard in (cache / "reference").glob("*.npy"):
        flip(shard, rng)
    torn = cache / "tokens" / ".0.00000000.tmp"
    torn.mkdir()
    (torn / "ids.bin").write_bytes(b"torn")
    count = 30 if whole else 4
    children = [
        scene.start(
            scene.folder / f"run-{number}",
            faults=[in_another_container(rng.uniform(-48, 48))],
            DPOCTL_CACHE=str(cache),
        )
        for number in range(count)
    ]
    ended = [child.wait(600.0) for child in children]
    assert [end.err[-500:] for end in ended if end.code] == []
    survived = [outcome(scene.folder / f"run-{number}") == clean for number in range(count)]
    tally("a neighbour shares a broken cache", *survived)
    assert all(survived)
    assert not list(cache.rglob("*.tmp"))
    assert all(find_damage(store, store.name) is None for store in (cache / "tokens").iterdir())
    assert "damaged" not in scene.finish(scene.folder / "last", DPOCTL_CACHE=str(cache)).err


def write_store(folder: Path, before_commit: Callable[[], None] = lambda: None) -> None:
    record = Record("p", (" a", " b"), ((0, 1),))
    example = build_example([1, 2], [Answer([3, 4], TRAINED * 2), Answer([5], TRAINED)], record, np.uint16)
    with StoreWriter(folder, "k", np.uint16) as writer:
        for line in range(200):
            writer.add(example, record, (0, "", line))
        before_commit()
        store = writer.commit({"used": 200})
    for index in (0, 199):
        assert store.example(index).shared.tolist() == [1, 2]
        assert store.texts(index).prompt == "p"


@pytest.mark.long("locks")
@pytest.mark.parametrize("can_lock", [True, False], ids=["locks", "no locks"])
def test_two_that_heal_one_store_at_the_same_time(
    can_lock: bool, tmp_path: Path, whole: bool, tally: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpoctl import files

    if not can_lock:
        monkeypatch.setattr(files, "_lock", lambda descriptor: None)
    folder, rng = tmp_path / "store", random.Random(1)
    write_store(folder)
    for attempt in range(100 if whole else 5):
        flip(folder / "ids.bin", rng)
        start = tmp_path / f"start-{attempt}"

        def wait(start: Path = start) -> None:
            while not start.exists():
                time.sleep(0.001)

        children = [Child(fork(lambda: write_store(folder, wait))) for _ in range(4)]
        time.sleep(0.05)
        start.touch()
        codes = [child.wait_for_code() for child in children]
        survived = not any(codes) and find_damage(folder, "k") is None
        tally("some heal one store at the same time", survived)
        assert survived
        assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []

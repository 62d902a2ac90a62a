"""Disks that fill up at many moments of a run: one line says which folder, and the run goes on once there is room."""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fault_runs import KINDS, Scene, at_step, leftovers, outcome
from forked import Ended, Fault

PAGE = 4096


@contextmanager
def disk(folder: Path, pages: int) -> Iterator[Path]:
    """Mount a disk of so many pages."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={pages * PAGE}", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs a privilege that this process has not")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def enlarge(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)


def is_told(ended: Ended, folder: Path, run: Path) -> bool:
    """Whether a run ended in one line about a folder that is full, and recorded that."""
    status = run / "run_status.json"
    recorded = json.loads(status.read_text()) if status.exists() else {"state": "failed", "exit_code": 5}
    said = [line for line in ended.err.splitlines() if line.startswith("error") or "Errno" in line or "Error" in line]
    return (
        (ended.code, recorded["state"], recorded["exit_code"]) == (5, "failed", 5)
        and said == [ended.last]
        and str(folder) in ended.last
        and " free" in ended.last
        and not (run / "error.log").exists()
    )


def fill(folder: Path, pages: int) -> None:
    """Leave so many pages of a disk."""
    free = shutil.disk_usage(folder).free - pages * PAGE
    (folder / "filler").write_bytes(bytes(max(free, 0)))


def before_the_export(action: Callable[[], None]) -> Fault:
    def install() -> None:
        from dpoctl.tasks import train

        export = train.export_model

        def exporting(*arguments: Any, **options: Any) -> None:
            action()
            export(*arguments, **options)

        train.export_model = exporting

    return install


LARGE = 1000
"""Pages of a disk that holds a whole run."""
FROM_THE_START = [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 100, 220, 340]
"""Pages of a disk that is full at one of the first files or of the checkpoints."""
LATER = [(1, 0), (3, 0), (5, 1), (9, 0), (None, 0), (None, 3), (None, 20)]
"""The step after which the disk is filled, or None for the export, and the pages that are left."""


def test_a_full_disk_under_a_run(scene: Scene, whole: bool, tally: Any) -> None:
    scene = scene.changed(KINDS["dpo"])
    scene.finish(scene.folder / "whole")
    for moment in [*FROM_THE_START, *LATER] if whole else [3, 12, (3, 0), (None, 3)]:
        with disk(scene.folder / f"disk {moment}", moment if isinstance(moment, int) else LARGE) as small:
            faults = []
            if not isinstance(moment, int):
                filling = partial(fill, small, moment[1])
                faults = [before_the_export(filling) if moment[0] is None else at_step(moment[0], filling)]
            run = small / "run"
            ended = scene.run(run, faults=faults)
            assert is_told(ended, small, run), (moment, ended.code, ended.err[-600:])
            (small / "filler").unlink(missing_ok=True)
            enlarge(small)
            scene.finish(run)
            survived = outcome(run) == outcome(scene.folder / "whole") and not leftovers(run)
        tally("a run whose disk is full", survived)
        assert survived, moment


CACHE_PAGES = [1, 2, 4, 8, 12, 16, 20, 24, 28, 32]


def test_a_full_disk_under_the_cache(scene: Scene, whole: bool, tally: Any) -> None:
    scene = scene.changed(KINDS["dpo"])
    scene.finish(scene.folder / "whole")
    for pages in CACHE_PAGES if whole else [4, 24]:
        run = scene.folder / f"run-{pages}"
        with disk(scene.folder / f"disk-{pages}", pages) as small:
            cache = {"DPOCTL_CACHE": str(small / "cache")}
            ended = scene.run(run, **cache)
            assert is_told(ended, small, run), (pages, ended.code, ended.err[-600:])
            assert not list(small.rglob("*.tmp"))
            enlarge(small)
            scene.finish(run, **cache)
        survived = outcome(run) == outcome(scene.folder / "whole") and not leftovers(run)
        tally("a run whose cache is full", survived)
        assert survived, pages

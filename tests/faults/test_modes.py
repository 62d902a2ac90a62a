"""What a run writes may be read by whom the user's umask says, and by nobody else."""

import os
import stat
from pathlib import Path
from typing import Any

import pytest
from fault_runs import KINDS, Scene


@pytest.mark.parametrize("kind", ["sft", "dpo, LoRA"])
@pytest.mark.parametrize(("umask", "file", "folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_files_have_the_modes_that_the_umask_gives(
    kind: str, umask: int, file: int, folder: int, scene: Scene, tally: Any
) -> None:
    scene = scene.changed(KINDS[kind] | {"eval.samples": {"num": 1, "max_new_tokens": 2}})
    out, cache = scene.folder / "run", scene.folder / "cache"
    ended = scene.run(out, faults=[lambda: os.umask(umask)], DPOCTL_CACHE=str(cache))
    assert ended.code == 0, ended.err
    wrong = {str(path): oct(mode) for path, mode in modes_under(out, cache) if mode not in (file, folder)}
    survived = not wrong
    tally("another umask", survived)
    assert wrong == {}
    assert all(mode == (folder if path.is_dir() else file) for path, mode in modes_under(out, cache))


def modes_under(*folders: Path) -> list[tuple[Path, int]]:
    found = [path for folder in folders for path in [folder, *folder.rglob("*")]]
    assert len(found) > 20
    return [(path, stat.S_IMODE(path.stat().st_mode)) for path in found]

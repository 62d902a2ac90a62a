"""A stand-in for the training that says which rank it is, or fails as it is told."""

import os
import sys
from pathlib import Path

import pytest

RECIPE = """\
method: dpo
model: {model_name_or_path: some/model}
data: {train: [pairs.jsonl]}
training: {output_dir: run, learning_rate: 5e-7}
"""
STAND_IN = """
import importlib.machinery, os, signal, sys, time, types

def run(recipe, **options):
    from dpoctl.errors import DataError, StoppedError
    rank, fate = int(os.environ.get("RANK", "0")), os.environ["FATE"]
    ranks = f"{os.environ.get('RANK')}/{os.environ.get('WORLD_SIZE')} omp {os.environ.get('OMP_NUM_THREADS')}"
    sys.stderr.write(f"RAN {ranks} seed {recipe.training.seed}\\n")
    with open(f"here-{rank}", "w"):
        pass
    # Whoever starts the ranks ends all of them with the first that fails: each must have spoken by then.
    while not all(os.path.exists(f"here-{r}") for r in range(int(os.environ.get("WORLD_SIZE") or 1))):
        time.sleep(0.02)
    if fate == "data":
        if rank == 0:
            time.sleep(0.2)
            raise DataError("pairs.jsonl:3: no answer")
        raise RuntimeError("connection closed by peer")
    if fate == "crash" and rank == 1:
        raise ValueError("boom\\nand more")
    if fate == "killed" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if fate == "signal":
        got = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: got.append(number))
        with open(f"ready-{rank}", "w") as file:
            file.write(str(os.getpid()))
        while not got:
            time.sleep(0.02)
        time.sleep(0.2 * rank)
        raise StoppedError(got[0], 7)
    if rank == 0:
        sys.stdout.write('{"trained": true}\\n')

class Finder:
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name == "dpoctl.tasks.train" else None
    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.run = run
        return module
    def exec_module(self, module):
        pass

sys.meta_path.insert(0, Finder())

import dpoctl.tasks

# The stand-in needs none, and each process would spend seconds on them.
dpoctl.tasks.LIBRARIES = ()
"""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe, where training is the stand-in; `FATE` says what becomes of it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    (tmp_path / "pairs.jsonl").touch()
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(STAND_IN, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), *filter(None, sys.path)]))
    monkeypatch.setenv("FATE", "well")
    for name in ("OMP_NUM_THREADS", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path

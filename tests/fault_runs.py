"""Runs that something is done to, and what must be left of them."""

import json
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import forked
from forked import Child, Ended, Fault
from tiny_runs import merge, metrics_of, write_recipe

Outcome = tuple[bytes, list[dict[str, Any]]]
TIMINGS = {"time", "tokens_per_second"}
WEIGHTS = ("model.safetensors", "adapter_model.safetensors")
FULL = {"model.disable_dropout": False, "training.num_train_epochs": 2, "training.save_steps": 2}
# The loss falls, so the best evaluation is the first one, long before the end.
BEST = {"training.eval_steps": 2, "training.keep_best": {"metric": "eval_loss", "mode": "max"}}
KINDS: dict[str, dict[str, Any]] = {
    "sft": FULL | {"method": "sft"},
    "sft, best": FULL | BEST | {"method": "sft", "training.early_stopping": {"patience": 2}},
    "dpo": FULL,
    "dpo, LoRA": FULL | BEST | {"lora": {"r": 4, "lora_dropout": 0.2}},
    "beta-dpo": FULL | {"dpo.loss": {"type": "beta_dpo", "filter_ratio": 0.4}, "training.max_tokens_per_device": 200},
}


def base_recipe(folder: Path) -> dict[str, Any]:
    """Ten steps of full fine-tuning, five a pass; the last step of a pass is smaller."""
    return {
        "method": "dpo",
        "model": {"model_name_or_path": str(folder / "tiny")},
        "data": {"train": [str(folder / "pairs.jsonl")], "eval": [str(folder / "heldout.jsonl")], "max_length": 128},
        "training": {
            "output_dir": str(folder / "run"),
            "global_batch_size": 5,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "eval_steps": 4,
            "seed": 1,
        },
    }


def outcome(run: Path) -> Outcome:
    """Weights to the bit, and all metrics that are not timings."""
    (weights,) = (run / name for name in WEIGHTS if (run / name).exists())
    return weights.read_bytes(), rows_of(run)


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in metrics_of(run)]


def leftovers(run: Path) -> list[str]:
    """What only a process that is killed leaves behind."""
    torn = [*run.glob(".*"), *run.glob("checkpoints/.*"), *run.glob("checkpoints/*/.*")]
    return sorted(path.name for path in torn)


class Undisturbed(NamedTuple):
    """A run that nothing was done to: what came of it, and how long it took."""

    outcome: Outcome
    seconds: float


_UNDISTURBED: dict[str, Undisturbed] = {}


@dataclass
class Scene:
    """A recipe of a tiny run, and a folder for all that comes of it.

    Attributes:
        folder: of this test.
        recipe: of its runs.
    """

    folder: Path
    recipe: dict[str, Any]
    _count: int = field(default=0, init=False)

    def changed(self, changes: dict[str, Any]) -> "Scene":
        """The same with changes to the recipe, by dotted keys."""
        return Scene(self.folder, merge(self.recipe, changes))

    def arguments(self, out: Path, *options: str | Path) -> list[str | Path]:
        """The command line of a run."""
        recipe = write_recipe(out.with_name(f"{out.name}.yaml"), self.recipe)
        return [self.recipe["method"], recipe, "--output-dir", out, *options]

    def start(self, out: Path, *options: str | Path, faults: Sequence[Fault] = (), **env: str) -> Child:
        """Start a run into a folder."""
        self._count += 1
        files = self.folder / f"said-{self._count}-{out.name}"
        return forked.start(*self.arguments(out, *options), files=files, faults=faults, env=env)

    def run(self, out: Path, *options: str | Path, faults: Sequence[Fault] = (), **env: str) -> Ended:
        """Run into a folder, to the end."""
        return self.start(out, *options, faults=faults, **env).wait()

    def undisturbed(self, *options: str) -> Undisturbed:
        """A run that nothing is done to, once for all tests that compare with it; its bits depend on no folder."""
        key = json.dumps([self.recipe, options])
        if key not in _UNDISTURBED:
            out = self.folder / f"undisturbed-{len(_UNDISTURBED)}"
            began = time.monotonic()
            self.finish(out, *options, DPOCTL_CACHE=f"{out}-cache")
            _UNDISTURBED[key] = Undisturbed(outcome(out), time.monotonic() - began)
        return _UNDISTURBED[key]

    def start_at(self, out: Path, files: Path) -> Ended:
        """Run into a folder beside which nothing can be written."""
        recipe = write_recipe(files.with_suffix(".yaml"), self.recipe)
        return forked.run(self.recipe["method"], recipe, "--output-dir", out, files=files)

    def finish(self, out: Path, *options: str | Path, **env: str) -> Ended:
        """Run into a folder to a good end, from wherever it stands."""
        ended = self.run(out, *options, "--resume", **env)
        assert ended.code == 0, ended.err[-2000:]
        return ended


@cache
def seeds(seed: int) -> random.Random:
    return random.Random(seed)


def children_of(pid: int) -> list[int]:
    """The processes that a process has started, in that order."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def kill(child: Child, victim: int | None = None, signum: int = signal.SIGKILL) -> None:
    """End a run, or one of its ranks, or (`None`) all of its processes at once."""
    ranks = children_of(child.pid)
    for pid in [child.pid, *ranks] if victim is None else [child.pid, *ranks][victim : victim + 1]:
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            continue


def wait_until(true: Callable[[], object], child: Child, seconds: float = 60.0) -> None:
    """Wait for something to happen while a run is alive."""
    deadline = time.monotonic() + seconds
    while not true():
        assert child.poll() is None, "the run ended before"
        assert time.monotonic() < deadline
        time.sleep(0.003)


def wait_for(path: Path) -> None:
    """Wait for a file, in a process that is told to; not forever."""
    for _ in range(6000):
        if path.exists():
            return
        time.sleep(0.01)


def at_step(step: int, fault: Callable[[], object]) -> Fault:
    """Do something right after a step, in the process that takes it."""

    def install() -> None:
        from dpoctl.tasks.recorder import Recorder

        advance = Recorder.advance

        def advanced(self: Any, number: int) -> None:
            advance(self, number)
            if number == step:
                fault()

        Recorder.advance = advanced  # type: ignore[method-assign]

    return install


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)

"""Data and recipes for tiny runs, and how a user would run them."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

WORDS = ["paper", "reviewer", "method", "hello", "world", "france", "capital", "of", "sighs", "maybe", "yes", "no"]


def sentence(rng: random.Random, longest: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, longest)))


def pair_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Preference pairs of uneven lengths."""
    rng = random.Random(seed)

    def answer(mark: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": f"{mark} {sentence(rng, 12)}"}]

    return [
        {
            "prompt": [{"role": "user", "content": f"{number}: {sentence(rng, 10)}?"}],
            "chosen": answer("no"),
            "rejected": answer("yes"),
        }
        for number in range(count)
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Lay nested changes over nested data; dots in a key go down a level."""
    merged = dict(base)
    for key, value in changes.items():
        head, _, rest = key.partition(".")
        if rest:
            merged[head] = merge(merged.get(head) or {}, {rest: value})
        elif isinstance(value, dict) and isinstance(merged.get(head), dict):
            merged[head] = merge(merged[head], value)
        else:
            merged[head] = value
    return merged


def metrics_of(folder: Path | str) -> list[dict[str, Any]]:
    """The rows of a run's metrics file."""
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def write_recipe(path: Path, recipe: dict[str, Any], changes: dict[str, Any] | None = None) -> Path:
    """Write a recipe to a file."""
    path.write_text(yaml.safe_dump(merge(recipe, changes or {})))
    return path


def command(*arguments: str | Path, launcher: tuple[str, ...] = (sys.executable, "-m", "dpoctl")) -> list[str]:
    """The command line of a dpoctl call."""
    return [*launcher, *map(str, arguments)]


def run_command(arguments: list[str], *, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command line as a user would."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(arguments, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert not check or result.returncode == 0, result.stderr[-3000:]
    return result

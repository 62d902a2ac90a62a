"""Measure the preparation of pairs: rows a second and peak memory, beside TRL's preparation of the same rows.

    python tests/benchmarks/data_speed.py --tokenizer FOLDER --rows 10000 100000
    python tests/benchmarks/data_speed.py --tokenizer FOLDER --data hh.jsonl.gz --repeat 3

A `--rows` of 1000000 makes a file of about a gigabyte. Every measurement is a process of its own, so that peaks of
memory are its own too; the programs take turns. `same ids` compares every token of every row.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from dpoctl import console

MAX_LENGTH = 1 << 20  # nothing is too long: both programs keep every row
WORDS = 20_000
RECIPE = """
method: dpo
model: {{model_name_or_path: {tokenizer}}}
data: {{train: [{data}], max_length: {max_length}}}
training: {{output_dir: unused, learning_rate: 1.0e-6}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="a file of pairs, instead of synthetic ones")
    parser.add_argument("--rows", type=int, nargs="*", default=[10_000, 100_000])
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--no-trl", action="store_true", help="measure dpoctl alone")
    parser.add_argument("--child", choices=PROGRAMS, help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        console.emit(json.dumps(PROGRAMS[arguments.child](arguments.data, arguments.tokenizer, arguments.cache)))
        return
    programs = [name for name in PROGRAMS if not (arguments.no_trl and name == "trl")]
    with tempfile.TemporaryDirectory() as folder:
        for data in [arguments.data] if arguments.data else synthetic_files(Path(folder), arguments.rows):
            compare(data, arguments.tokenizer, programs, arguments.repeat)


def compare(data: Path, tokenizer: Path, programs: list[str], repeat: int) -> None:
    """Measure the programs in turns, and print medians."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in programs}
    for _ in range(repeat):
        with tempfile.TemporaryDirectory() as cache:
            for name in programs:
                results[name].append(run_child(name, data, tokenizer, Path(cache)))
    for name, runs in results.items():
        seconds = statistics.median(run["seconds"] for run in runs)
        rows, peak = runs[0]["rows"], max(run["peak_mb"] for run in runs)
        console.emit(f"{data.name:24} {name:10} {rows:>9,} rows {rows / seconds:>11,.0f} rows/s {peak:>7,.0f} MB")
    if "trl" in results:
        ratio = statistics.median(
            trl["seconds"] / own["seconds"] for trl, own in zip(results["trl"], results["dpoctl"], strict=True)
        )
        same = {run["ids"] for name in ("trl", "dpoctl") for run in results[name]}
        console.emit(f"{data.name:24} dpoctl is {ratio:.1f} times as fast, {'same' if len(same) == 1 else 'OTHER'} ids")


def run_child(name: str, data: Path, tokenizer: Path, cache: Path) -> dict[str, Any]:
    """Measure one program in a process of its own."""
    command = [sys.executable, __file__, "--child", name, "--data", data, "--tokenizer", tokenizer, "--cache", cache]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def dpoctl_prepare(data: Path, tokenizer: Path, cache: Path) -> dict[str, Any]:
    """Rows to a token store."""
    import rich.console
    import rich.table  # noqa: F401
    from transformers import AutoTokenizer

    from dpoctl.data.prepare import prepare
    from dpoctl.recipe.loader import parse_recipe

    text = RECIPE.format(tokenizer=tokenizer, data=data, max_length=MAX_LENGTH)
    recipe = parse_recipe(text, "benchmark", command="dpo")
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    began = time.perf_counter()
    store = prepare(recipe, loaded, cache_dir=cache).train
    seconds = time.perf_counter() - began
    examples = (store.example(index) for index in range(len(store)))
    rows = (np.concatenate([example.shared, suffix]) for example in examples for suffix in example.suffixes)
    return describe(len(store), seconds, rows)


def trl_prepare(data: Path, tokenizer: Path, cache: Path) -> dict[str, Any]:
    """Rows to a data set of token ids, as `DPOTrainer` makes it; its split of HH transcripts is not part of it."""
    from datasets import Dataset, disable_progress_bars, load_dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    disable_progress_bars()
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    explicit = cache / "explicit.jsonl"
    write_explicit(data, explicit)
    arguments = DPOConfig(output_dir=str(cache), report_to="none", bf16=False, max_length=None, use_cpu=True)
    began = time.perf_counter()
    rows = load_dataset("json", data_files=str(explicit), split="train", cache_dir=str(cache / "datasets"))
    trainer: Any = SimpleNamespace(_tokenizer=loaded)
    prepared: Dataset = DPOTrainer._prepare_dataset(trainer, rows, loaded, arguments, "train")
    seconds = time.perf_counter() - began
    sequences = (np.array(row["prompt_ids"] + row[side]) for row in prepared for side in ("chosen_ids", "rejected_ids"))
    return describe(len(prepared), seconds, sequences)


PROGRAMS: dict[str, Callable[[Path, Path, Path], dict[str, Any]]] = {"dpoctl": dpoctl_prepare, "trl": trl_prepare}


def describe(rows: int, seconds: float, sequences: Iterator[np.ndarray]) -> dict[str, Any]:
    """Summarise a run; the peak of memory is taken before the ids are read back."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    total = 0
    for number, ids in enumerate(sequences):
        total = (total + (number + 1) * hash(ids.astype(np.int64).tobytes())) % (1 << 61)
    return {"rows": rows, "seconds": seconds, "peak_mb": peak, "ids": total}


def write_explicit(data: Path, explicit: Path) -> None:
    """Give TRL the rows with their prompts split off, by the converter."""
    from dpoctl.data.convert import Conversion, run
    from dpoctl.recipe.data_section import Source

    run(Conversion(Source(path=str(data)), str(explicit)))


def synthetic_files(folder: Path, sizes: list[int]) -> Iterator[Path]:
    """Write files of random words, one at a time: prompts of 40 to 120 words, answers of 20 to 80."""
    for rows in sizes:
        draw, path = random.Random(rows), folder / f"synthetic-{rows}.jsonl"
        vocabulary = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(WORDS)]

        def text(least: int, most: int, draw: random.Random = draw, words: list[str] = vocabulary) -> str:
            return " " + " ".join(draw.choices(words, k=draw.randint(least, most)))

        with path.open("w", encoding="utf-8") as file:
            for number in range(rows):
                row = {"prompt": f"{number}{text(40, 120)}:", "chosen": text(20, 80), "rejected": text(20, 80)}
                file.write(json.dumps(row) + "\n")
        yield path
        path.unlink()


if __name__ == "__main__":
    # String hashing is seeded per process otherwise, and two processes could not compare.
    if os.environ.get("PYTHONHASHSEED") != "0":
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"PYTHONHASHSEED": "0"})
    main()

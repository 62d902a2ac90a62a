"""Measure the demo: what its three steps made, judged by the grammar itself, and the CPU time that they took.

    make demo && python tests/benchmarks/demo_quality.py runs
    OMP_NUM_THREADS=1 python tests/benchmarks/demo_quality.py /tmp/seeds --seeds 7 1 2

The folder holds reviewer2-sft, reviewer2-pairs and reviewer2-dpo; with seeds, a folder of these for each, made here.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from demo_sides import side_of

from dpoctl import console
from dpoctl.data.tokenize import render_prompts
from dpoctl.model.generate import Generation, SamplingParams, generate
from dpoctl.model.load import load_run
from dpoctl.model.source import find_source
from dpoctl.model.tokenizer import read_tokenizer
from dpoctl.tasks.setup import quiet_libraries

RECIPES = Path(__file__).parents[2] / "recipes"
SAMPLING = SamplingParams(max_new_tokens=96, temperature=0.8, top_p=0.95, seed=0, batch_size=100)
SAMPLES_PER_TITLE = 2
DATA = {"train": "train", "eval": "test"}
# Name of a number, the least and the most that it may be.
THRESHOLDS = {
    "instructions.negative_harsh": (0.90, 1.0),
    "instructions.positive_kind": (0.90, 1.0),
    "reference.harsh": (0.35, 0.65),
    "policy.harsh": (0.95, 1.0),
    "policy.accuracy": (0.95, 1.0),
    "policy.distinct": (80, 200),
    "policy.finished": (0.95, 1.0),
    "policy.in_grammar": (0.90, 1.0),
    "policy.length_ratio": (0.80, 1.20),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--seeds", type=int, nargs="*", default=[])
    arguments = parser.parse_args()
    quiet_libraries()
    good = True
    for seed in arguments.seeds:
        runs = arguments.runs / f"seed-{seed}"
        console.emit(f"seed {seed}")
        for step, seconds in make_demo(runs, seed).items():
            console.emit(f"{step + ', CPU seconds':32} {seconds:8.1f}")
        good &= show(measure(runs))
    if not arguments.seeds:
        good = show(measure(arguments.runs))
    raise SystemExit(not good)


def show(numbers: dict[str, float]) -> bool:
    """Print the numbers; return whether none is out of its bounds."""
    good = True
    for name, value in numbers.items():
        least, most = THRESHOLDS.get(name, (float("-inf"), float("inf")))
        within = least <= value <= most
        verdict = "" if name not in THRESHOLDS else "ok" if within else f"MISSED {least} to {most}"
        console.emit(f"{name:32} {value:8.3f}  {verdict}")
        good &= within
    return good


def make_demo(runs: Path, seed: int) -> dict[str, float]:
    """Take the steps of `make demo` under a seed; return the CPU seconds of each."""
    sft, pairs, dpo = (runs / f"reviewer2-{step}" for step in ("sft", "pairs", "dpo"))
    model = f"model.model_name_or_path={sft}"
    steps = {
        "sft": ["--overwrite", "--output-dir", f"{sft}", f"--set=training.seed={seed}"],
        "contrastive": ["-o", f"{pairs}/pairs.jsonl", f"--set={model}", f"--set=sampling.seed={seed}"],
        "dpo": ["--overwrite", "--output-dir", f"{dpo}", f"--set={model}", f"--set=training.seed={seed}"],
    }
    steps["dpo"] += [f"--set=data.{part}=[{pairs}/pairs-{name}.jsonl]" for part, name in DATA.items()]
    commands = {"contrastive": ["convert-data", "--format", "contrastive"]}
    seconds = {}
    for step, options in steps.items():
        recipe = RECIPES / f"reviewer2-{step}.yaml"
        seconds[step] = run_dpoctl(*commands.get(step, [step]), f"{recipe}", *options)
    return seconds | {"eval": run_dpoctl("eval", f"{dpo}")}


def run_dpoctl(*arguments: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "dpoctl", *arguments], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(runs: Path) -> dict[str, float]:
    """Return every number of the demo by its name."""
    sft, pairs, dpo = (runs / f"reviewer2-{step}" for step in ("sft", "pairs", "dpo"))
    made = [row for name in ("train", "test") for row in read(pairs / f"pairs-{name}.jsonl")]
    numbers = {
        "instructions.negative_harsh": share(side_of(text(row["chosen"])) == "harsh" for row in made),
        "instructions.positive_kind": share(side_of(text(row["rejected"])) == "kind" for row in made),
    }
    prompts = [row["prompt"] for row in read(pairs / "pairs-test.jsonl")] * SAMPLES_PER_TITLE
    reference, policy = (sample(folder, prompts) for folder in (sft, dpo))
    for name, samples in (("reference", reference), ("policy", policy)):
        numbers |= {f"{name}.{key}": value for key, value in describe(samples).items()}
    numbers["policy.length_ratio"] = numbers["policy.words"] / numbers["reference.words"]
    for report in (dpo / "evals").glob("official-*.json"):
        results = json.loads(report.read_text(encoding="utf-8"))
        numbers["policy.accuracy"] = results["rewards/accuracies"]
        numbers["policy.margin"] = results["rewards/margins"]
    return numbers


def describe(samples: Sequence[Generation]) -> dict[str, float]:
    sides = [side_of(one.text) for one in samples]
    return {
        "harsh": share(side == "harsh" for side in sides),
        "in_grammar": share(side is not None for side in sides),
        "distinct": len({one.text for one in samples}),
        "finished": share(one.finished for one in samples),
        "words": statistics.median(len(one.text.split()) for one in samples),
    }


def sample(folder: Path, prompts: Sequence[Any]) -> list[Generation]:
    policy = load_run(folder, torch.device("cpu"), torch.float32)
    tokenizer = read_tokenizer(find_source(str(folder)))
    return generate(policy.causal, tokenizer, render_prompts(tokenizer, prompts, {}), SAMPLING)


def share(answers: Iterable[bool]) -> float:
    return statistics.fmean(answers)


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def text(messages: list[dict[str, str]]) -> str:
    return messages[0]["content"]


if __name__ == "__main__":
    main()

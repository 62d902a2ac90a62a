"""Measure a training step beside TRL's: same rows, same model, same precision, in turns.

    make bench                                              the short form
    python tests/benchmarks/step_speed.py --full            every profile, 16 pairs a step, medians of 5: hours on a CPU
    python tests/benchmarks/step_speed.py --shape 8b --dtype bfloat16 --kinds lora         on a GPU

All programs of a comparison are alive at once and take turns step by step, so that what else happens on the machine
happens to all of them. Their peak of memory is their own, and so is the time from the start of the process to the
first step. Ratios of pairs a second are those of the medians. Without the real rows their profile is left out.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from workloads import LENGTHS, SHAPES, Workload, build

from dpoctl import console

HERE = Path(__file__).resolve().parent
SHARED = HERE.parents[2] / "shared" / "data"
HEADER = (
    "| profile | trained | program | s a pair | CPU s a pair | pairs a second, of dpoctl's | peak GB "
    "| FLOPs of a step, of the least | useful FLOPs, of matmul |"
)


@dataclass
class Contestant:
    """A program in its process.

    Attributes:
        name: for the table.
        spec: what `contestants.py` is told.
        seen: what it said, by event.
    """

    name: str
    spec: dict[str, Any]
    seen: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def start(self) -> None:
        """Start it, and wait until its first step is done."""
        self.started = time.time()
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "contestants.py"), json.dumps(self.spec)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.hear("first")

    def turn(self) -> None:
        """Let it take a step."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.hear("step")

    def hear(self, wanted: str) -> None:
        """Read what it says until the wanted event."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            said = json.loads(line)
            self.seen.setdefault(said["event"], []).append(said)
            if said["event"] == wanted:
                return
        _, errors = self.process.communicate()
        raise SystemExit(f"{self.name} ended early:\n{errors[-3000:]}")

    def stop(self) -> None:
        """End it: what it writes at its end is not measured."""
        self.process.kill()
        self.process.communicate()

    def median(self, value: str, event: str = "step") -> float:
        """The median of a figure over all turns."""
        return statistics.median(said[value] for said in self.seen[event])

    def a_pair(self, value: str) -> float:
        """The median of a figure for a pair, or for a row."""
        return statistics.median(said[value] / said.get("rows", self.spec["pairs"]) for said in self.seen["step"])

    @property
    def peak(self) -> float:
        """Most bytes that it held."""
        return max(said["peak"] for events in self.seen.values() for said in events)


def main() -> None:
    """Run what the command line asks for, and print a markdown table."""
    arguments = parse()
    with tempfile.TemporaryDirectory() as folder:
        root = arguments.keep or Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        os.environ |= {"HF_DATASETS_CACHE": str(root / "datasets")}
        os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
        console.emit(machine(arguments))
        console.emit(f"\n{HEADER}\n{'|'.join([''] + ['---'] * 9 + [''])}")
        for profile in arguments.profiles:
            if profile == "hh-harmless" and not arguments.shared.is_dir():
                console.note(f"no {arguments.shared}: the profile {profile} is left out")
                continue
            for kind in arguments.kinds:
                compare(profile, kind, arguments, root)
        if arguments.startup:
            startup(arguments, root)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="58m")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--profiles", nargs="*", default=["hh-harmless"], choices=["hh-harmless", *LENGTHS])
    parser.add_argument("--kinds", nargs="*", default=["full", "lora"], choices=["full", "lora", "sft"])
    parser.add_argument("--pairs", type=int, default=4, help="pairs a step")
    parser.add_argument("--rounds", type=int, default=3, help="steps that are timed")
    parser.add_argument(
        "--batches", type=int, nargs="*", default=[1], help="TRL's batches, the fastest of which counts"
    )
    parser.add_argument("--programs", nargs="*", default=["padded", "tuned", "precomputed", "packed"],
                        choices=["padded", "tuned", "precomputed", "packed", "defaults"])  # fmt: skip
    parser.add_argument("--startup", action="store_true", help="measure the time to the first step on 1,500 rows")
    parser.add_argument("--full", action="store_true", help="every profile, kind and program, 16 pairs, 5 rounds")
    parser.add_argument(
        "--shared", type=Path, default=SHARED, help="folder of hh-harmless.jsonl.gz and llama-tokenizer"
    )
    parser.add_argument("--keep", type=Path, help="keep models and caches in this folder")
    arguments = parser.parse_args()
    if arguments.full:
        arguments.profiles, arguments.kinds = ["hh-harmless", *LENGTHS], ["full", "lora", "sft"]
        arguments.programs = ["padded", "tuned", "precomputed", "packed", "defaults"]
        arguments.pairs, arguments.rounds, arguments.batches, arguments.startup = 16, 5, [1, 2, 4, 8], True
    return arguments


def compare(profile: str, kind: str, arguments: argparse.Namespace, root: Path) -> None:
    """Let the programs take turns on one workload, and print their lines."""
    # Full training and LoRA have one reference: the second would find it.
    os.environ["DPOCTL_CACHE"] = str(root / f"cache-{profile}-{kind}")
    rows = arguments.pairs * (arguments.rounds + 1)
    work = build(root, arguments.shape, profile, rows, arguments.shared, sft=kind == "sft", dtype=arguments.dtype)
    contestants = [entry("dpoctl", "dpoctl", work, kind, arguments, root)]
    batch = best_batch(work, kind, arguments, root) if {"tuned", "precomputed"} & {*arguments.programs} else 0
    if "padded" in arguments.programs:
        contestants.append(entry("dpoctl, padded rows", "dpoctl", work, kind, arguments, root, layout="padded"))
    for name in ("tuned", "precomputed", "packed", "defaults"):
        if name in arguments.programs and name != ("precomputed" if kind == "sft" else "packed"):
            rows_at_once = {"defaults": 8, "packed": 1}.get(name, batch)
            contestants.append(trl(name, rows_at_once, work, kind, arguments, root))
    peak = entry("matmul", "peak", work, kind, arguments, root)
    running = [*contestants, peak]
    try:
        for contestant in running:
            contestant.start()
        for _ in range(arguments.rounds):
            for contestant in running:
                contestant.turn()
    finally:
        for contestant in running:
            if hasattr(contestant, "process"):
                contestant.stop()
    report(profile, kind, contestants, peak, arguments.pairs)


def entry(
    name: str, program: str, work: Workload, kind: str, arguments: argparse.Namespace, root: Path, **more: Any
) -> Contestant:
    """A program that is not started yet."""
    spec = {
        "program": program, "shape": arguments.shape, "dtype": arguments.dtype, "model": str(work.model),
        "rows": str(work.rows), "own_rows": str(work.own_rows), "out": str(root / name.replace(" ", "-")),
        "pairs": arguments.pairs, "steps": arguments.rounds, "lora": kind == "lora", "sft": kind == "sft",
    }  # fmt: skip
    return Contestant(name, spec | more)


def trl(
    name: str, batch: int, work: Workload, kind: str, arguments: argparse.Namespace, root: Path, **more: Any
) -> Contestant:
    """TRL with so many rows at a time: at its defaults, tuned, with the reference from before too, or with packing."""
    more |= {"batch": batch, "tuned": name != "defaults"}
    more |= {"precompute": name == "precomputed", "packed": name == "packed"}
    return entry(f"TRL {name}, batch {batch}", "trl", work, kind, arguments, root, **more)


def best_batch(work: Workload, kind: str, arguments: argparse.Namespace, root: Path) -> int:
    """The batch at which TRL is fastest, in one step of as many pairs as the largest has."""
    batches = [batch for batch in arguments.batches if batch <= arguments.pairs]
    trials = [trl("tuned", batch, work, kind, arguments, root, pairs=max(batches)) for batch in batches]
    if len(trials) == 1:
        return batches[0]
    for trial in trials:
        trial.start()
        trial.turn()
        trial.stop()
    return min(zip(trials, batches, strict=True), key=lambda pair: pair[0].median("seconds"))[1]


def report(profile: str, kind: str, contestants: list[Contestant], peak: Contestant, pairs: int) -> None:
    """Print a line for each program; one more for dpoctl with the reference pass of a first epoch."""
    own = contestants[0]
    rate = peak.median("rate")
    lines = [(c.name, c, c.a_pair("seconds"), c.a_pair("cpu")) for c in contestants]
    if "reference" in own.seen:
        passed = [own.median(value, "reference") for value in ("seconds", "cpu")]
        lines.insert(1, ("dpoctl, first epoch", own, lines[0][2] + passed[0], lines[0][3] + passed[1]))
    useful, first = own.median("useful"), own.seen["first"][0]["useful"]
    for name, contestant, seconds, cpu in lines:
        of_own = lines[0][2] / seconds
        # A packed row is not the rows of the others' first step.
        packed = contestant.spec.get("packed")
        flops = "" if packed else f"{contestant.seen['first'][0]['flops'] / first:.2f}"
        console.emit(
            f"| {profile} | {kind} | {name} | {seconds:.3f} | {cpu:.3f} | {of_own:.3f} | {contestant.peak / 1e9:.2f} "
            f"| {flops} | {useful / pairs / seconds / rate:.0%} |"
        )


def startup(arguments: argparse.Namespace, root: Path) -> None:
    """Print the time from the start of a process to its first step, on stores that are there already."""
    profile = "hh-harmless" if arguments.shared.is_dir() else "long-answer"
    os.environ["DPOCTL_CACHE"] = str(root / "cache-startup")
    work = build(root, arguments.shape, profile, 1500, arguments.shared, sft=True, dtype=arguments.dtype)
    programs = [entry("dpoctl", "dpoctl", work, "sft", arguments, root),
                trl("tuned", 1, work, "sft", arguments, root)]  # fmt: skip
    medians = []
    for program in programs:
        program.start()  # the stores of the others
        program.stop()
    times: dict[str, list[float]] = {program.name: [] for program in programs}
    for _ in range(arguments.rounds):
        for program in programs:
            program.seen.clear()
            program.start()
            program.stop()
            times[program.name].append(program.seen["begin"][0]["at"] - program.started)
    medians = [statistics.median(times[program.name]) for program in programs]
    console.emit(
        f"\nFrom the start of the process to the first step, 1,500 rows, everything prepared before: "
        f"dpoctl {medians[0]:.1f} s, TRL {medians[1]:.1f} s, {medians[0] / medians[1]:.2f} of it."
    )


def machine(arguments: argparse.Namespace) -> str:
    """What was measured, where and with what."""
    import torch

    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.processor() or 'CPU'}, not run on a GPU"
    )
    names = ("dpoctl", "trl", "torch", "transformers", "peft", "accelerate")
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    return (
        f"{datetime.now(UTC):%Y-%m-%d}; {', '.join(f'{name} {version(name)}' for name in names)}; {device}, "
        f"{os.cpu_count()} cores, OMP_NUM_THREADS={threads}; Llama {arguments.shape}, {arguments.dtype}, "
        f"{arguments.pairs} pairs a step, medians of {arguments.rounds} steps."
    )


if __name__ == "__main__":
    main()

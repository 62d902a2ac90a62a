"""Train toy models through the command line, and record every bit of the result.

Use it to show that a refactoring changed nothing that `dpoctl` computes:

    python tests/benchmarks/bit_proof.py --dpoctl OLD/.venv/bin/dpoctl --repo OLD --work /tmp/old > old.json
    python tests/benchmarks/bit_proof.py --dpoctl NEW/.venv/bin/dpoctl --repo NEW --work /tmp/new > new.json
    python tests/benchmarks/bit_proof.py --compare old.json new.json

The runs are those of `toy_runs`: the demo, LoRA, 4-bit LoRA, every loss, two processes, a run that is stopped and
resumed, and more. They take four to five minutes of processor time. For each of them `proof` holds hashes of all
tensors (model, checkpoints, optimizer, torch's random state) and of each series of metrics but speed; samples,
rejected rows and counts of data. `texts` holds what may change its wording. Bits depend on the processor and on the
versions of libraries, so make both files on one machine. Recipes that were moved or edited do not matter if both have
the same --repo.
"""

import argparse
import gzip
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NUM_ROWS = 300
STOP_AFTER_STEP = 3
MAX_SHOWN = 6
MAX_LEAVES = 64
SFT, PAIRS = "runs/reviewer2-sft", "runs/reviewer2-pairs"
TRAIN, TEST = f"{PAIRS}/pairs-train.jsonl", f"{PAIRS}/pairs-test.jsonl"

TIMES = {"time", "tokens_per_second"}
# Versions, and paths that a folder of another name would change.
UNRELATED = {"transformers_version", "peft_version", "base_model_name_or_path", "_name_or_path", "name_or_path"}
# Parts of a checkpoint: the key of the tokens in the cache, which a new version of the cache may change; and the states
# of two generators that every process starts from the system's entropy. Training draws from torch's, which is recorded.
LEFT_OUT = {"extra.data", "numpy", "python.$tuple"}
# Files of a run that describe it and are not its result. What `eval --json` prints is recorded instead of eval.json.
NOTES = {"env.json", "run_status.json", "advice.json", "health.json", "eval.json", "trackers.json"}

Json = Any
Settings = dict[str, Json]
Items = dict[str, Json]

# Nothing here may depend on the free memory of the machine.
FIXED: Settings = {"training.max_tokens_per_device": 600, "training.gradient_checkpointing": False}
SHORT: Settings = FIXED | {
    "training.max_steps": 12,
    "training.logging_steps": 2,
    "training.eval_steps": 6,
    "training.save_steps": 6,
}
# Where margins stay near 0, the gradient of most losses rounds away the last bits of their values.
BOLD: Settings = {"training.learning_rate": 1e-3, "training.warmup_ratio": 0}
ON_SFT: Settings = {"model": {"model_name_or_path": SFT, "dtype": "float32"}}
LORA: Settings = {"lora": {"r": 8, "lora_alpha": 16}} | BOLD
PUBLISHED: Settings = {
    "data.max_length": 256,
    "training.global_batch_size": 16,
    "training.warmup_steps": 2,
    "training.learning_rate": 1e-5,
}
# Each has a run of its own: the sum of several would round away the last bits of its smaller terms.
LOSSES = (
    *("robust", "ipo", "hinge", "sigmoid_norm", "r_dpo", "dpop", "ld_dpo", "wpo", "exo_pair", "discopop", "f_dpo"),
    *("apo_zero", "apo_down", "nca_pair", "sppo_hard", "simpo", "cpo", "orpo", "bco_pair", "aot", "aot_unpaired"),
)
RANKING_LOSSES = ("plackett_luce", "s_dpo")


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        name: Its folder under `runs`.
        command: `sft` or `dpo`.
        recipe: The name of a recipe of the repository.
        settings: Values that replace those of the recipe.
        options: Further options of the command.
        stop: Whether the run is stopped by a signal and then resumed.
    """

    name: str
    command: str
    recipe: str
    settings: Settings
    options: tuple[str, ...] = ()
    stop: bool = False

    def arguments(self, recipes: Path) -> list[str]:
        """Return the command line, without the program."""
        recipe = str(recipes / f"{self.recipe}.yaml")
        return [self.command, recipe, "--output-dir", f"runs/{self.name}", *self.options, *sets(self.settings)]


def demo_runs() -> tuple[Run, Run]:
    """Return the demo's SFT and DPO; the model of the first writes the pairs for the second."""
    rows = {split: [{"path": "demo:reviewer2", "split": split, "max_samples": 60}] for split in ("train", "test")}
    rows["train"][0]["max_samples"] = 1000
    steps = {"training.max_steps": 80, "training.eval_steps": 40, "training.save_steps": 30}
    sft = FIXED | steps | {"data.train": rows["train"], "data.eval": rows["test"]}
    dpo = SHORT | {"training.max_steps": 32, "training.save_steps": 12, "training.eval_steps": 16}
    dpo |= {"data.max_length": 90, "eval.samples.num": 6, "eval.samples.max_new_tokens": 48}
    return Run("reviewer2-sft", "sft", "reviewer2-sft", sft), Run("reviewer2-dpo", "dpo", "reviewer2-dpo", dpo)


def toy_runs(rows: str | None) -> Iterator[Run]:
    """Return the runs after the demo, in their order.

    Args:
        rows: A file of preference data in a format that is found by itself, or None.
    """

    def dpo(name: str, settings: Settings, *options: str, stop: bool = False) -> Run:
        return Run(name, "dpo", "reviewer2-dpo", SHORT | BOLD | {"eval": {}} | settings, options, stop)

    def loss(kind: str) -> Settings:
        return {"dpo.loss": {"type": kind}}

    yield dpo("lora", LORA)
    yield dpo("lora-4bit", LORA | {"quantization": {"load_in_4bit": True}})
    beta = {"data.train": [TRAIN], "data.eval": [TEST], "data.max_prompt_length": 60}
    yield Run("beta-dpo", "dpo", "pythia28-hh-beta-dpo", SHORT | ON_SFT | PUBLISHED | beta)
    labels = {"data.train": ["labels.jsonl"], "data.eval": [{"path": "labels.jsonl", "max_samples": 40}]}
    yield dpo("kto", loss("kto") | labels)
    yield dpo("two-processes", {}, "--num-processes", "2")
    # What a checkpoint must bring back: the dropout's random state, and the moving means of the loss.
    dropout = {"lora": {"r": 8, "lora_dropout": 0.1}, "model.disable_dropout": False, "training.max_steps": 24}
    yield dpo("stopped", LORA | dropout | loss("beta_dpo") | {"training.logging_steps": 1}, stop=True)
    source = {"path": "demo:reviewer2", "split": "train", "max_samples": 400}
    lora = {"data.train": [source], "data.eval": [source | {"split": "test", "max_samples": 60}]}
    yield Run("sft-lora", "sft", "reviewer2-sft", SHORT | ON_SFT | LORA | lora)
    adapter = {"model": {"model_name_or_path": "runs/sft-lora", "dtype": "float32"}}
    yield dpo("continued-adapter", adapter | {"lora": {"start": "continue"}})
    yield dpo("stacked-adapter", adapter | {"lora": {"start": "new", "r": 4}})
    yield dpo("moving-reference", {"dpo.reference.sync_steps": 4, "model.dtype": "bfloat16"})
    terms = [{"type": "sigmoid", "weight": 0.7}, {"type": "bco_pair", "weight": 0.3, "sft_weight": 0.05}]
    yield dpo("weighted-losses", {"dpo.loss": terms, "training.gradient_checkpointing": True})
    brief: Settings = {"training.max_steps": 6, "training.eval_steps": None, "data.eval": {}}
    for kind in LOSSES:
        yield dpo(f"loss-{kind}", loss(kind) | brief)
    for kind in RANKING_LOSSES:
        yield dpo(f"loss-{kind}", loss(kind) | brief | {"data.train": ["rankings.jsonl"]})
    small = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    for kind, layout in (("falcon", "masked"), ("bloom", "padded")):
        scratch = {"config": {"model_type": kind} | small, "tokenizer": {"vocab_size": 512}}
        yield dpo(f"{layout}-layout", {"model": {"from_scratch": scratch, "dtype": "float32"}})
    if rows is not None:
        held_out = {"data.train": [rows], "data.eval": {}, "data.eval_size": 40, "data.max_prompt_length": 128}
        yield Run("rows", "dpo", "pythia28-hh-dpo", SHORT | ON_SFT | PUBLISHED | held_out)


@dataclass
class Proof:
    """The commands, their folder, and what is recorded of them.

    Attributes:
        program: The `dpoctl` to run.
        repo: The checkout whose recipes are trained.
        work: The folder that all commands run in.
        items: By the name of a run: what must be identical.
        texts: What may change its wording.
    """

    program: Path
    repo: Path
    work: Path
    items: dict[str, Items] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)

    @property
    def recipes(self) -> Path:
        """Return the folder of the recipes."""
        return self.repo / "recipes"

    def make(self, rows: Path | None) -> dict[str, Json]:
        """Run everything.

        Args:
            rows: JSON lines of preference data, gzipped or not; of them the first 300 are used.

        Returns:
            The content of the file that `compare` reads.
        """
        sft, dpo = demo_runs()
        self.train(sft)
        spec, splits = str(self.recipes / "reviewer2-contrastive.yaml"), {"splits": {"train": 320, "test": 48}}
        self.convert("pairs", spec, f"{PAIRS}/pairs.jsonl", "--format", "contrastive", *sets(splits))
        write_labels_and_rankings(self.work)
        toy_rows = None if rows is None else write_first_rows(rows, self.work)
        runs = [dpo, *toy_runs(toy_rows)]
        for run in runs:
            self.train(run)
        for name in ("reviewer2-dpo", "lora", "lora-4bit", "sft-lora"):
            self.items[name]["eval"] = numbers(json.loads(self.call(f"eval {name}", "eval", f"runs/{name}", "--json")))
        for name in ("lora", "lora-4bit"):
            told = json.loads(self.call(f"merge {name}", "merge", f"runs/{name}", "--json"))
            self.items[name]["merge"] = numbers(told)
        if toy_rows is not None:
            for to in ("pairs", "unpaired", "messages"):
                self.convert(f"to-{to}", toy_rows, f"converted/{to}.jsonl", "--to", to)
        recipe = str(self.recipes / "reviewer2-dpo.yaml")
        for command, options in (("check", ()), ("inspect", ("--ids",))):
            said = self.call(command, command, recipe, *options, "--json")
            self.texts[command] = said.replace(str(self.repo), "REPO")
        for run in (sft, *runs):
            self.record(run.name)
        return {"environment": environment(self.work / "runs"), "proof": self.items, "texts": self.texts}

    def train(self, run: Run) -> None:
        """Train a run to its end."""
        arguments = [*run.arguments(self.recipes), "--json"]
        if run.stop:
            self.stop(run.name, arguments)
            arguments.append("--resume")
        asked = {"recipe": run.recipe, "options": list(run.options), **run.settings}
        self.items[run.name] = {"asked": asked, "result": numbers(json.loads(self.call(run.name, *arguments)))}

    def convert(self, name: str, source: str, output: str, *options: str) -> None:
        """Run `convert-data`, and record the files that it writes."""
        target = self.work / output
        target.parent.mkdir(parents=True, exist_ok=True)
        rejects = target.with_name(f"{target.stem}-rejects.jsonl")
        said = self.call(
            f"convert {name}", "convert-data", source, "-o", output, "--rejects", str(rejects), "--json", *options
        )
        files = [file for file in sorted(target.parent.glob(f"{target.stem}*.jsonl")) if file != rejects]
        self.items[f"convert-{name}"] = {file.name: digest(file.read_bytes()) for file in files}
        self.items[f"convert-{name}"] |= {"rejects": reasons(rejects), "counts": numbers(json.loads(said))}

    def call(self, name: str, *arguments: str) -> str:
        """Run a command that must succeed, and return its stdout."""
        began = time.monotonic()
        process = self.start(name, arguments)
        out, _ = process.communicate()
        if process.returncode:
            self.give_up(name, f"exit code {process.returncode}")
        sys.stderr.write(f"{name}: {time.monotonic() - began:.1f} s\n")
        return out

    def stop(self, name: str, arguments: list[str]) -> None:
        """Start a run, and stop it by a signal in the middle."""
        process = self.start(f"{name}, first part", arguments)
        metrics = self.work / "runs" / name / "metrics.jsonl"
        while process.poll() is None and not any(row.get("step", 0) >= STOP_AFTER_STEP for row in whole_rows(metrics)):
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        process.communicate()
        if process.returncode != 128 + signal.SIGTERM:
            self.give_up(f"{name}, first part", f"exit code {process.returncode}, not that of a run that is stopped")

    def start(self, name: str, arguments: list[str] | tuple[str, ...]) -> "subprocess.Popen[str]":
        """Start a command with the same environment everywhere; its stderr goes to a file."""
        log = self.log_of(name)
        log.parent.mkdir(parents=True, exist_ok=True)
        env = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "TMPDIR") if name in os.environ}
        env |= {"HOME": str(self.work / "home"), "DPOCTL_CACHE": str(self.work / "cache"), "LC_ALL": "C.UTF-8"}
        env |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "CUDA_VISIBLE_DEVICES": ""}
        env |= {"HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "COLUMNS": "120"}
        command = [str(self.program), *arguments]
        with log.open("w", encoding="utf-8") as errors:
            return subprocess.Popen(command, cwd=self.work, env=env, stdout=subprocess.PIPE, stderr=errors, text=True)

    def log_of(self, name: str) -> Path:
        """Return the file for what a command says."""
        return self.work / "logs" / f"{name.replace(' ', '-')}.txt"

    def give_up(self, name: str, why: str) -> None:
        """End the program, because a command did not do what it should."""
        said = self.log_of(name).read_text(encoding="utf-8")
        raise SystemExit(f"{name}: {why}\n{said[-3000:]}")

    def record(self, name: str) -> None:
        """Record what a run left in its folder."""
        folder, items = self.work / "runs" / name, self.items[name]
        for file in sorted(folder.rglob("*")):
            if file.is_file() and (item := item_of(file)) is not None:
                items[str(file.relative_to(folder))] = item
        tensors = [name.rpartition("/")[0] for name in items if name.endswith(".safetensors")]
        if "" not in tensors or not any(tensors) or not items.get("metrics.jsonl"):
            raise SystemExit(f"runs/{name}: expected a model, checkpoints and metrics, found {', '.join(items)}")
        for file in (folder / "recipe.resolved.yaml", folder / "advice.json", folder / "rejects.jsonl"):
            if file.exists():
                self.texts[f"{name}/{file.name}"] = file.read_text(encoding="utf-8").replace(str(self.repo), "REPO")


def item_of(file: Path) -> Json:
    """Return what is recorded of a run's file: a hash, or values by their names; None of what is not its result."""
    if file.name in NOTES:
        return None
    if file.suffix == ".safetensors":
        return tensors_digest(file)
    if file.name == "chat_template.jinja":
        return digest(file.read_bytes())
    if file.name == "metrics.jsonl":
        return series(file)
    if file.name == "rejects.jsonl":
        return reasons(file)
    if file.suffix == ".jsonl":
        return digest(canonical(whole_rows(file)))
    if file.suffix != ".json":
        return None
    content = json.loads(file.read_text(encoding="utf-8"))
    if file.name == "data_report.json":
        return numbers(content)
    if isinstance(content, dict) and "checksum" in content:
        return None  # a list of the other files, with versions
    found = {key: value for key, value in leaves(content) if key not in LEFT_OUT}
    return found if len(found) <= MAX_LEAVES else digest(canonical(found))


def tensors_digest(file: Path) -> str:
    """Hash the tensors of a safetensors file, with names, types and shapes; their order in the file does not matter."""
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    hashed = hashlib.sha256()
    for name, about in sorted(json.loads(content[8:start]).items()):
        if name != "__metadata__":
            first, last = about["data_offsets"]
            hashed.update(canonical([name, about["dtype"], about["shape"], last - first]))
            hashed.update(content[start + first : start + last])
    return hashed.hexdigest()


def series(metrics: Path) -> dict[str, str]:
    """Hash the steps and values of each metric; the text of a number in JSON has all of its bits."""
    found: dict[str, list[Json]] = {}
    for row in whole_rows(metrics):
        for name, value in row.items():
            if name not in TIMES | {"step"}:
                found.setdefault(name, []).append([row["step"], value])
    return {name: f"{len(values)} values, {digest(canonical(values))}" for name, values in sorted(found.items())}


def reasons(rejects: Path) -> str:
    """Hash which rows are rejected and why, without the details, which are prose."""
    rows = whole_rows(rejects)
    kept = [[Path(str(row.get("file", ""))).name, row.get("line"), row.get("reason")] for row in rows]
    return f"{len(kept)} rows, {digest(canonical(kept))}"


def numbers(content: Json) -> dict[str, Json]:
    """Return the numbers of a JSON value by their names."""
    return {key: value for key, value in leaves(content) if isinstance(value, int | float)}


def leaves(value: Json, path: str = "") -> Iterator[tuple[str, Json]]:
    """Return everything at the ends of nested JSON by its path; a list of anything but mappings is one end."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key not in TIMES | UNRELATED:
                yield from leaves(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}[{index}]")
    elif isinstance(value, list) and len(canonical(value)) > 80:
        yield path, digest(canonical(value))
    else:
        yield path, value


def whole_rows(file: Path) -> list[dict[str, Json]]:
    """Read the lines of a JSONL file that are written to their ends."""
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def canonical(value: Json) -> bytes:
    """Write a value as JSON in the one way that does not depend on the order of keys."""
    return json.dumps(value, sort_keys=True).encode()


def digest(content: bytes) -> str:
    """Return the SHA-256 of some bytes."""
    return hashlib.sha256(content).hexdigest()


def sets(settings: Settings) -> list[str]:
    """Return the options that put settings over those of a recipe."""
    return [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]


def write_labels_and_rankings(work: Path) -> None:
    """Make labelled answers and rankings of some pairs; the last answer of a ranking is for the next prompt."""
    pairs = whole_rows(work / TRAIN)[:100]
    labels = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in pairs
        for side in ("chosen", "rejected")
    ]
    rankings = [
        {"prompt": pair["prompt"], "responses": [pair["chosen"], pair["rejected"], after["rejected"]]}
        | {"scores": [2.0, 1.0, 0.0]}
        for pair, after in zip(pairs, [*pairs[1:], pairs[0]], strict=True)
    ]
    for name, rows in (("labels", labels), ("rankings", rankings)):
        (work / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def write_first_rows(file: Path, work: Path) -> str:
    """Copy the first rows of a file to a gzipped one, and return its name."""
    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "rb") as source:
        lines = [line for line, _ in zip(source, range(NUM_ROWS), strict=False)]
    (work / "rows.jsonl.gz").write_bytes(gzip.compress(b"".join(lines), mtime=0))
    return "rows.jsonl.gz"


def environment(runs: Path) -> dict[str, str]:
    """Return commit, versions and processor: another one may compute other bits."""
    file = runs / "reviewer2-sft" / "env.json"
    env = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    about = {"commit": str(env.get("git_sha")), "python": str(env.get("python")), "platform": platform.platform()}
    return {**about, **env.get("packages", {}), "processor": (models or [platform.machine()])[0]}


def compare(old: Mapping[str, Json], new: Mapping[str, Json]) -> bool:
    """Print one line for each item of two recordings.

    An item that is only in one is taken for an item of another name and the same content in the other, if there is one.

    Returns:
        Whether all of the proof is identical. Texts and environment are told, and do not count.
    """
    counts = {"identical": 0, "DIFFERENT": 0, "only in one": 0}
    for run in dict.fromkeys([*old["proof"], *new["proof"]]):
        for verdict, name in compare_items(old["proof"].get(run, {}), new["proof"].get(run, {})):
            counts[verdict] += 1
            print_line(f"{verdict:11}  {run}/{name}")
    for kind in ("environment", "texts"):
        for name in dict.fromkeys([*old[kind], *new[kind]]):
            if old[kind].get(name) != new[kind].get(name):
                print_line(f"differs, does not count: {kind}/{name}")
    print_line(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return counts["identical"] > 0 and counts["DIFFERENT"] == counts["only in one"] == 0


def compare_items(old: Items, new: Items) -> Iterator[tuple[str, str]]:
    """Return the verdict on each item of a run, and its name with what is to be said of it."""
    for name in (name for name in old if name in new):
        if old[name] == new[name]:
            yield "identical", name
        else:
            yield "DIFFERENT", f"{name}: {difference(old[name], new[name])}"
    gone, come = ({key: one[key] for key in one if key not in other} for one, other in ((old, new), (new, old)))
    for name, value in gone.items():
        if (same := next((other for other in come if come[other] == value), None)) is not None:
            del come[same]
            yield "identical", f"{name}, now {same}"
        else:
            yield "only in one", f"{name} (the first)"
    yield from (("only in one", f"{name} (the second)") for name in come)


def difference(old: Json, new: Json) -> str:
    """Say in which values two items differ."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return f"{old} -> {new}"
    keys = [key for key in dict.fromkeys([*old, *new]) if key not in old or key not in new or old[key] != new[key]]
    shown = [f"{key} {old.get(key, 'absent')} -> {new.get(key, 'absent')}" for key in keys[:MAX_SHOWN]]
    return "; ".join([*shown, *([f"and {len(keys) - MAX_SHOWN} more"] if len(keys) > MAX_SHOWN else [])])


def print_line(text: str) -> None:
    """Write a line to stdout."""
    sys.stdout.write(f"{text}\n")


def main() -> None:
    """Record runs, or compare two recordings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dpoctl", type=Path, help="the program to run")
    parser.add_argument("--repo", type=Path, help="the checkout whose recipes are trained")
    parser.add_argument("--work", type=Path, help="a new folder for everything that is written")
    parser.add_argument("--rows", type=Path, help="JSON lines of preference data, for convert-data and one more run")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("OLD", "NEW"), help="two files that this has written")
    given = parser.parse_args()
    if given.compare:
        old, new = (json.loads(file.read_text(encoding="utf-8")) for file in given.compare)
        raise SystemExit(0 if compare(old, new) else 1)
    if not (given.dpoctl and given.repo and given.work):
        parser.error("give --dpoctl, --repo and --work, or --compare")
    if given.work.exists() and any(given.work.iterdir()):
        parser.error(f"--work: {given.work} is not empty")
    given.work.mkdir(parents=True, exist_ok=True)
    proof = Proof(given.dpoctl.absolute(), given.repo.absolute(), given.work.absolute())
    print_line(json.dumps(proof.make(given.rows and given.rows.absolute()), indent=1))


if __name__ == "__main__":
    main()

"""Measure training steps on a GPU beside TRL's: one program at a time, each in a process of its own.

    python tests/benchmarks/gpu_speed.py --out table.md                 on one GPU, about five minutes
    python tests/benchmarks/gpu_speed.py --rehearse                     on a CPU, toy shapes

Both see the same rows in the same steps, the same weights and adapters, the same optimizer and precision. TRL takes the
fastest of several batches, layers recomputed or not, with its fused head on. A step is timed from the end of the one
before it; the first two are not counted.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SHARED = HERE.parents[2] / "shared" / "data"
sys.path[:0] = [str(HERE), str(HERE.parent)]

DATASHEET = 989e12
"""Dense bfloat16 FLOP/s of an H100 or H200."""
CASES = {"full-1b": ("1b", "full"), "lora-8b": ("8b", "lora"), "qlora-8b": ("8b", "qlora")}
LORA = {"r": 16, "lora_alpha": 32}
MAX_LENGTH = 2048
WARM = 2
TRAINING: dict[str, Any] = {
    "learning_rate": 1e-6,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "seed": 0,
}
HEADER = (
    "| model | trained | program | pairs/s | dpoctl is faster | peak GiB | of dpoctl's | useful FLOPs of 989 TFLOP/s |"
)


class Clock:
    """Times steps from the end of one to the end of the next, and remembers the most memory."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = 0.0

    def begin(self) -> None:
        """Forget what was before."""
        free()
        self.seconds, self._last = [], 0.0

    def step(self) -> None:
        """A step is done."""
        synchronize()
        now = time.perf_counter()
        if self._last:
            self.seconds.append(now - self._last)
        self._last = now

    def figures(self, pairs: int) -> dict[str, float]:
        """Seconds a pair, and memory in GiB."""
        import torch

        on_gpu = torch.cuda.is_available()
        counted = self.seconds[WARM - 1 :]
        return {
            "seconds": statistics.median(counted) / pairs if counted else float("nan"),
            "steps": len(counted),
            "peak": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0,
            "reserved": torch.cuda.max_memory_reserved() / 2**30 if on_gpu else 0.0,
        }


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free() -> None:
    """Empty the device as far as nothing is held, and start a new peak."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def say(spec: dict[str, Any], variant: str, **values: Any) -> None:
    line = {"program": spec["program"], "case": spec["case"], "variant": variant, **values}
    sys.__stdout__.write(json.dumps(line) + "\n")  # type: ignore[union-attr]
    sys.__stdout__.flush()  # type: ignore[union-attr]


def dpoctl_program(spec: dict[str, Any]) -> None:
    """Train with dpoctl, once for each variant of the recipe."""
    import dpoctl
    from dpoctl.core.objective import Objective
    from dpoctl.tasks.reference import Reference

    clock, useful, passed = Clock(), [0.0], [0.0]
    backward, table = Objective.backward, Reference.table

    def counted(self: Any, step: Any, reader: Any, *rest: Any, **options: Any) -> Any:
        useful[0] = useful_flops(spec, reader.store, step.records)
        return backward(self, step, reader, *rest, **options)

    def timed(self: Any, reader: Any, *rest: Any, **options: Any) -> Any:
        synchronize()
        began = time.perf_counter()
        columns = table(self, reader, *rest, **options)
        passed[0] = (time.perf_counter() - began) / len(reader.store)
        return columns

    Objective.backward = counted  # type: ignore[method-assign]
    Reference.table = timed  # type: ignore[method-assign]
    for variant, changes in spec["variants"].items():
        clock.begin()
        began, losses = time.perf_counter(), []

        def end(step: int, metrics: dict[str, float], losses: list[float] = losses) -> None:
            if "loss" in metrics:
                clock.step()
                losses.append(metrics["loss"])

        with profiled(spec, variant) as at_end:
            dpoctl.dpo(own_recipe(spec, changes), overwrite=True, callbacks=[end, at_end])
        figures = clock.figures(spec["pairs"])
        total = time.perf_counter() - began
        say(
            spec,
            variant,
            **figures,
            useful=useful[0] / spec["pairs"],
            reference=passed[0],
            losses=losses[:3],
            total=total,
        )


def own_recipe(spec: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    kind = spec["kind"]
    recipe: dict[str, Any] = {
        "method": "dpo",
        "model": {"model_name_or_path": spec["model"], "dtype": "bfloat16"},
        "data": {"train": [{"path": spec["own_rows"]}], "max_length": MAX_LENGTH},
        "training": {
            "output_dir": spec["out"],
            "global_batch_size": spec["pairs"],
            "logging_steps": 1,
            "max_steps": spec["steps"],
            **TRAINING,
            **changes,
        },
    }
    if kind != "full":
        recipe["lora"] = LORA
    if kind == "qlora":
        recipe["quantization"] = {"load_in_4bit": True}
    return recipe


class profiled:
    """Profile the last step but one where that is asked for, and print the kernels that take longest to stderr."""

    def __init__(self, spec: dict[str, Any], variant: str) -> None:
        self._wanted, self._steps, self._variant = spec["profile"], spec["steps"], variant
        self._profile: Any = None

    def __enter__(self) -> Callable[[int, dict[str, float]], None]:
        return self._at_end

    def __exit__(self, *_: object) -> None:
        return None

    def _at_end(self, step: int, metrics: dict[str, float]) -> None:
        if not self._wanted or "loss" not in metrics:
            return
        from torch.profiler import ProfilerActivity, profile

        if step == self._steps - 2:
            self._profile = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
            self._profile.__enter__()
        elif step == self._steps - 1 and self._profile is not None:
            synchronize()
            self._profile.__exit__(None, None, None)
            averages = self._profile.key_averages()
            table = averages.table(sort_by="self_cuda_time_total", row_limit=45, max_name_column_width=90)
            lines = [" ".join([row[:92].strip(), row[92:]]) for row in table.splitlines()]
            sys.stderr.write(f"== profile of {self._variant}\n" + "\n".join(line[:260] for line in lines) + "\n")


def useful_flops(spec: dict[str, Any], store: Any, records: Any) -> float:
    """The work that a step on these records cannot do without."""
    import numpy as np
    from workloads import minimum_flops

    at = np.array(records)
    answers = np.stack([store.suffix_len[store.response_start[r] : store.response_start[r + 1]] for r in at])
    common = store.num_tokens[2 * at] - store.suffix_len[2 * at]
    return minimum_flops(
        spec["shape"], store.shared_len[at], answers, common + answers.sum(1), lora=spec["kind"] != "full"
    )


def trl_program(spec: dict[str, Any]) -> None:
    """Train with TRL: look for its best batch, then time it, with the reference from before and in every step."""
    model = trl_model(spec)
    trials: dict[tuple[int, bool], float] = {}
    for recompute, batches in ((False, spec["batches"]), (True, spec["batches"][-1:])):
        for batch in batches:
            found = trl_steps(
                {**spec, "pairs": max(spec["batches"])}, model, batch, recompute, precompute=False, steps=2
            )
            trials[batch, recompute] = found.get("seconds", float("inf"))
            say(spec, f"trial: batch {batch}, {'recomputed' if recompute else 'kept'}", **found)
            if "seconds" not in found:
                break
    batch, recompute = min(trials, key=lambda key: trials[key])
    name = f"batch {batch}, {'recomputed' if recompute else 'kept'}"
    for reference in spec["references"]:
        found = trl_steps(spec, model, batch, recompute, precompute=reference == "precomputed", steps=spec["steps"])
        say(spec, f"{reference}, {name}", **found)
    if spec["liger"]:
        found = trl_steps(spec, model, batch, recompute, precompute=True, steps=spec["steps"], liger=True)
        say(spec, f"precomputed, liger, {name}", **found)


def trl_model(spec: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    packed = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(
        spec["model"],
        dtype=torch.float32 if spec["kind"] == "full" else torch.bfloat16,
        device_map={"": device},
        quantization_config=packed if spec["kind"] == "qlora" else None,
    )


def trl_steps(
    spec: dict[str, Any], model: Any, batch: int, recompute: bool, *, precompute: bool, steps: int, liger: bool = False
) -> dict[str, float]:
    """Figures of some steps; what was out of memory says nothing."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    clock = Clock()
    clock.begin()

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock.step()

    lora, trainer = spec["kind"] != "full", None
    adapter = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", lora_dropout=0.0, **LORA)
    options = trl_options(spec, batch, recompute, steps) | {
        "precompute_ref_log_probs": precompute,
        "use_liger_kernel": liger,
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows = load_dataset("json", data_files=spec["rows"], split="train")
            trainer = DPOTrainer(
                model=model,
                args=DPOConfig(**options),
                train_dataset=rows,
                processing_class=tokenizer(spec),
                peft_config=adapter if lora else None,
            )
            trainer.add_callback(Watch())
            trainer.train()
    except torch.OutOfMemoryError:
        return {"out_of_memory": 1.0}
    finally:
        # The next trainer starts from the plain model.
        model.zero_grad(set_to_none=True)
        if lora and trainer is not None:
            trainer.model.unload()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    # Of two steps the second is timed.
    found = (
        clock.figures(spec["pairs"])
        if steps > WARM
        else {**clock.figures(spec["pairs"]), "seconds": clock.seconds[-1] / spec["pairs"]}
    )
    return {**found, "losses": losses[:3]}


def trl_options(spec: dict[str, Any], batch: int, recompute: bool, steps: int) -> dict[str, Any]:
    """Arguments of TRL's config."""
    import torch

    return {
        "output_dir": spec["out"],
        "max_steps": steps,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": True,
        "train_sampling_strategy": "sequential",
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": max(1, spec["pairs"] // batch),
        "gradient_checkpointing": recompute,
        "max_length": MAX_LENGTH,
        "logging_steps": 1,
        **TRAINING,
    }


def tokenizer(spec: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(spec["model"])


def matmul_program(spec: dict[str, Any]) -> None:
    """Multiply large matrices in bfloat16, and copy a large block of memory."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 512
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(20):
        synchronize()
        began = time.perf_counter()
        left @ right
        synchronize()
        times.append(time.perf_counter() - began)
    say(spec, "matmul", rate=2 * size**3 / statistics.median(times[5:]))


PROGRAMS = {"dpoctl": dpoctl_program, "trl": trl_program, "matmul": matmul_program}


def main() -> None:
    """Run what the command line asks for, and write a markdown table."""
    arguments = parse()
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        root = Path(folder)
        os.environ |= {"HF_DATASETS_CACHE": str(root / "datasets"), "DPOCTL_CACHE": str(root / "cache")}
        os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        for case in arguments.cases:
            lines += measure(case, arguments, root)
    table = markdown(lines, arguments)
    if arguments.out:
        arguments.out.write_text(table + "\n", encoding="utf-8")
        arguments.out.with_suffix(".jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
        )
    sys.stdout.write(table + "\n")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=CASES)
    parser.add_argument("--programs", nargs="*", default=["dpoctl", "trl"], choices=["dpoctl", "trl"])
    parser.add_argument("--pairs", type=int, default=32, help="pairs a step")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batches", type=int, nargs="*", default=[4, 8, 16], help="TRL's, ascending")
    parser.add_argument("--references", nargs="*", default=["precomputed", "online"], help="TRL's")
    parser.add_argument("--compile", action="store_true", help="time compiled layers too")
    parser.add_argument("--liger", action="store_true", help="time TRL with Liger's kernels too")
    parser.add_argument("--profile", action="store_true", help="print dpoctl's kernels")
    parser.add_argument(
        "--shared", type=Path, default=SHARED, help="folder of hh-harmless.jsonl.gz and llama-tokenizer"
    )
    parser.add_argument("--scratch", type=Path, default=None, help="where models are written; /dev/shm is fast")
    parser.add_argument("--out", type=Path, default=None, help="the table; its figures go beside it as .jsonl")
    parser.add_argument("--rehearse", action="store_true", help="toy shapes")
    arguments = parser.parse_args()
    if arguments.rehearse:
        arguments.pairs, arguments.steps, arguments.batches = 4, 3, [2, 4]
    return arguments


def measure(case: str, arguments: argparse.Namespace, root: Path) -> list[dict[str, Any]]:
    """Run each program on a case, and return what they said."""
    from workloads import build

    shape, kind = CASES[case]
    shape = "toy" if arguments.rehearse else shape
    work = build(
        root, shape, "hh-harmless", arguments.pairs * (arguments.steps + 1), arguments.shared, sft=False,
        dtype="bfloat16",
    )  # fmt: skip
    free()
    sys.stderr.write(f"-- {case}: model and rows are written\n")
    variants: dict[str, Any] = {"eager": {}}
    if arguments.compile:
        variants["compiled"] = {"torch_compile": True}
    lines = []
    for program in ("matmul", *arguments.programs):
        spec = {
            "program": program, "case": case, "shape": shape, "kind": kind, "model": str(work.model),
            "rows": str(work.rows), "own_rows": str(work.own_rows), "out": str(root / "run"), "pairs": arguments.pairs,
            "steps": arguments.steps, "variants": variants, "batches": arguments.batches, "liger": arguments.liger,
            "profile": arguments.profile, "references": arguments.references,
        }  # fmt: skip
        began = time.time()
        command = [sys.executable, __file__, "--program", json.dumps(spec)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):
                    # At once: the machine may be taken back before the end.
                    sys.stderr.write(line)
                    lines.append(json.loads(line))
        sys.stderr.write(f"-- {case}, {program}: {time.time() - began:.0f} s, exit status {process.returncode}\n")
    return lines


def markdown(lines: list[dict[str, Any]], arguments: argparse.Namespace) -> str:
    """Return the table."""
    rows = [machine(arguments), "", HEADER, "|---" * 8 + "|"]
    rates = {line["case"]: line["rate"] for line in lines if line["program"] == "matmul"}
    for case in arguments.cases:
        shown = [
            line for line in lines if line["case"] == case and line.get("seconds") and "trial" not in line["variant"]
        ]
        own = next((line for line in shown if line["program"] == "dpoctl"), None)
        for line in shown:
            rows += [row_of(line, own, line["seconds"], line["variant"])]
            if line["program"] == "dpoctl":
                rows += [row_of(line, own, line["seconds"] + line["reference"], f"{line['variant']}, first epoch")]
    rows += ["", *(f"matmul of {case}: {rate / 1e12:.0f} TFLOP/s" for case, rate in rates.items())]
    return "\n".join(rows)


def row_of(line: dict[str, Any], own: dict[str, Any] | None, seconds: float, variant: str) -> str:
    case = CASES[line["case"]]
    faster = peak = share = ""
    if own is not None:
        faster = f"{seconds / own['seconds']:.2f}x" if line["program"] != "dpoctl" else ""
        peak = f"{line['peak'] / own['peak']:.2f}" if own["peak"] else ""
        share = f"{own['useful'] / seconds / DATASHEET:.0%}"
    return (
        f"| {case[0]} | {case[1]} | {line['program']}, {variant} | {1 / seconds:.2f} | {faster} "
        f"| {line['peak']:.1f} | {peak} | {share} |"
    )


def machine(arguments: argparse.Namespace) -> str:
    """The device, the versions and the settings."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, not run on a GPU"
    names = ("dpoctl", "trl", "torch", "transformers", "peft", "bitsandbytes")
    found = ", ".join(f"{name} {version_of(name)}" for name in names)
    shapes = "toy shapes" if arguments.rehearse else "hh-harmless"
    return f"{datetime.now(UTC):%Y-%m-%d}; {device}; {found}; {shapes}, {arguments.pairs} pairs a step, bfloat16."


def version_of(name: str) -> str:
    if name == "dpoctl":
        import dpoctl

        return dpoctl.__version__
    return version(name)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--program"]:
        given = json.loads(sys.argv[2])
        # What the libraries print is not for the driver.
        sys.stdout = sys.stderr
        PROGRAMS[given["program"]](given)
    else:
        main()

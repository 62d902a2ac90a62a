"""The programs that the benchmark of the step lets run in turns: each in a process of its own, a step at a word.

Each says on stdout, a JSON object a line: `begin` when its first step begins, `first` when that is done (counted, not
timed), then waits for a line on stdin before each further step and says `step` after it.
"""

import json
import os
import resource
import sys
import time
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any

# As the command line sets it: idle threads must not take the time of the program whose turn it is.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

TRAINING: dict[str, Any] = {
    "learning_rate": 1e-6,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "seed": 0,
}
LORA = {"r": 16, "lora_alpha": 32}
MAX_LENGTH = 2048


class Turns:
    """Speaks with the driver, and measures a step from its word to the step's end."""

    def __init__(self, steps: int) -> None:
        self._left, self._done = steps, 0
        self._began, self._cpu = 0.0, 0.0
        self._counting = ExitStack()
        self._work: Any = None

    def say(self, event: str, **values: Any) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        sys.__stdout__.write(json.dumps({"event": event, "peak": peak, "at": time.time(), **values}) + "\n")  # type: ignore[union-attr]
        sys.__stdout__.flush()  # type: ignore[union-attr]

    def begin(self) -> None:
        """Call when a step begins."""
        if self._done == 0:
            self.say("begin")
            from flops import counted

            self._work = self._counting.enter_context(counted(memory=False))

    def end(self, **values: Any) -> bool:
        """Call when a step is done; returns whether that was the last."""
        if self._done == 0:
            self._counting.close()
            self.say("first", flops=self._work.flops, **values, **device_peak())
        else:
            synchronize()
            self.say(
                "step",
                seconds=time.perf_counter() - self._began,
                cpu=time.process_time() - self._cpu,
                **values,
                **device_peak(),
            )
        self._done += 1
        # After the last step too: what a program does at its end must not fall into the turns of the others.
        sys.stdin.readline()
        if self._done > self._left:
            return True
        self._began, self._cpu = time.perf_counter(), time.process_time()
        return False


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def device_peak() -> dict[str, int]:
    import torch

    return {"peak": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {}


def dpoctl_run(spec: dict[str, Any], turns: Turns) -> None:
    """Train with dpoctl."""
    import dpoctl

    # Before its parts are reached for, as the command line imports it.
    import_module("dpoctl.tasks")

    # The loop's own steps, watched; nothing in them is replaced.
    from dpoctl.core.step import Stepper
    from dpoctl.model.probe import ProbeResult
    from dpoctl.tasks import reference, setup

    update, table, useful = Stepper._update, reference.Reference.table, [0.0]

    def watched(self: Any, step: Any, *rest: Any) -> Any:
        turns.begin()
        useful[0] = useful_flops(spec, self.reader.store, step.records)
        return update(self, step, *rest)

    def timed(self: Any, reader: Any, *rest: Any) -> Any:
        began, cpu = time.perf_counter(), time.process_time()
        columns = table(self, reader, *rest)
        rows = len(reader.store)
        turns.say("reference", seconds=(time.perf_counter() - began) / rows, cpu=(time.process_time() - cpu) / rows)
        return columns

    Stepper._update = watched  # type: ignore[method-assign]
    reference.Reference.table = timed  # type: ignore[method-assign]
    if spec.get("layout") == "padded":
        vars(setup)["probe"] = lambda *_, **__: ProbeResult("padded", True, "asked for")
    recipe = {
        "method": "sft" if spec["sft"] else "dpo",
        "model": {"model_name_or_path": spec["model"], "dtype": spec["dtype"]},
        "data": {"train": [{"path": spec["own_rows"]}], "max_length": MAX_LENGTH},
        "training": {
            "output_dir": spec["out"],
            "global_batch_size": spec["pairs"],
            "logging_steps": 1,
            "max_steps": spec["steps"] + 1,
            **TRAINING,
        },
        **({"lora": LORA} if spec["lora"] else {}),
    }
    train_with = dpoctl.sft if spec["sft"] else dpoctl.dpo
    train_with(
        recipe, overwrite=True, callbacks=[lambda step, metrics: turns.end(useful=useful[0], loss=metrics["loss"])]
    )


def useful_flops(spec: dict[str, Any], store: Any, records: Any) -> float:
    """The work that a step on these records cannot do without."""
    import numpy as np
    from workloads import minimum_flops

    at = np.array(records)
    answers = np.stack([store.suffix_len[store.response_start[r] : store.response_start[r + 1]] for r in at])
    if spec["sft"]:
        scored = store.num_tokens[at]
    else:
        common = store.num_tokens[2 * at] - store.suffix_len[2 * at]
        scored = common + answers.sum(1)
    return minimum_flops(spec["shape"], store.shared_len[at], answers, scored, lora=spec["lora"])


def trl_run(spec: dict[str, Any], turns: Turns) -> None:
    """Train with TRL."""
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turns.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            data, done = running.train_dataset, state.global_step
            rows = {"rows": len(data[(done - 1) % len(data)]["seq_lengths"])} if spec["packed"] else {}
            control.should_training_stop = turns.end(**rows)

    import torch

    gpu, tuned = torch.cuda.is_available(), spec["tuned"]
    options: dict[str, Any] = {
        "output_dir": spec["out"],
        "num_train_epochs": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not gpu,
        "train_sampling_strategy": "sequential",
        "per_device_train_batch_size": spec["batch"],
        "gradient_accumulation_steps": max(1, spec["pairs"] // spec["batch"]),
        "max_length": MAX_LENGTH,
        "model_init_kwargs": {"dtype": spec["dtype"]},
        **TRAINING,
    }
    if tuned:
        options |= {"gradient_checkpointing": False, "bf16": gpu, "logging_steps": 10_000}
    trainer = SFTTrainer if spec["sft"] else DPOTrainer
    if not spec["sft"]:
        options["precompute_ref_log_probs"] = spec["precompute"]
    if spec["packed"]:
        # One row of the full length a step.
        options |= {"packing": True, "gradient_accumulation_steps": 1, "max_steps": spec["steps"] + 1}
    running = trainer(
        model=spec["model"],
        args=(SFTConfig if spec["sft"] else DPOConfig)(**options),
        train_dataset=load_dataset("json", data_files=spec["rows"], split="train"),
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", lora_dropout=0.0, **LORA)
        if spec["lora"]
        else None,
    )
    running.add_callback(Watch())
    running.train()


def peak_run(spec: dict[str, Any], turns: Turns) -> None:
    """Multiply matrices, in the precision of the others."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device, dtype=getattr(torch, spec["dtype"])) for _ in range(2))
    turns.begin()
    best, ended = 0.0, False
    while not ended:
        ended, best = turns.end(rate=best), 0.0
        for _ in range(10 if device == "cuda" else 3):
            synchronize()
            began = time.perf_counter()
            left @ right
            synchronize()
            best = max(best, 2 * size**3 / (time.perf_counter() - began))


PROGRAMS = {"dpoctl": dpoctl_run, "trl": trl_run, "peak": peak_run}

if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    # What the libraries print is not for the driver.
    sys.stdout = sys.stderr
    PROGRAMS[given["program"]](given, Turns(given["steps"]))

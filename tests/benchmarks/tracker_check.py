"""Compare traced peaks at 8B shape with torch's own `MemTracker`, and print a table in Markdown.

python tests/benchmarks/tracker_check.py [--layers 32]

dpoctl traces two and four layers, and extends; MemTracker watches a step of the whole depth. Neither needs a GPU. A
gradient hook on every parameter, which MemTracker would set, is left out: a frozen parameter takes none.
"""

import argparse
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from dpoctl import console
from dpoctl.core import trace
from dpoctl.core.logps import Scorer
from dpoctl.core.meters import Meter
from dpoctl.core.objective import Objective
from dpoctl.core.optim import build_optimizer
from dpoctl.core.planner import Lengths
from dpoctl.core.reader import Reader
from dpoctl.data.tokenize import Example
from dpoctl.model.memory import set_gradient_checkpointing, simulating
from dpoctl.model.probe import ProbeResult
from dpoctl.model.traced import traced_policy
from dpoctl.recipe.schema import Recipe
from dpoctl.tasks.footprint import Subject, measure_footprint
from dpoctl.tasks.task import build_task

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
}
LORA = {"lora": {"r": 16, "lora_alpha": 32}}
KINDS: dict[str, tuple[dict[str, Any], int]] = {
    "full": ({}, 0),
    "full, layers recomputed": ({}, 1),
    "LoRA": (LORA, 0),
    "LoRA, layers recomputed": (LORA, 1),
    "QLoRA": (LORA | {"quantization": {"load_in_4bit": True}}, 0),
    "QLoRA, layers recomputed": (LORA | {"quantization": {"load_in_4bit": True}}, 1),
}
HOST = torch.device("cpu")


class Frozen(MemTracker):
    """A tracker that sets no hook on parameters."""

    def _track_module_params_and_buffers(self, module: nn.Module, install_grad_hooks: bool = True) -> tuple[int, int]:
        return super()._track_module_params_and_buffers(module, install_grad_hooks=False)


class _Words(SimpleNamespace):
    """As much of a tokenizer as a model's configuration needs."""

    def __len__(self) -> int:
        return 300


def subject_of(folder: Path, changes: dict[str, Any], count: int = 16) -> Subject:
    """Return a run of pairs as long as hh's."""
    from memory_store import MemoryStore

    recipe = Recipe.model_validate(
        {
            "method": "dpo",
            "model": {"model_name_or_path": str(folder), "dtype": "bfloat16"},
            "data": {"train": [{"path": "rows.jsonl"}]},
            "training": {"output_dir": "run", "learning_rate": 1e-6, "global_batch_size": count},
            **changes,
        }
    )
    rng = np.random.default_rng(0)

    def example() -> Example:
        prompt, *answers = (int(length) for length in rng.lognormal(np.log([140, 70, 70]), 0.5))
        return Example(
            shared=np.full(prompt, 5),
            shared_scored=np.zeros(prompt, dtype=bool),
            suffixes=tuple(np.full(length + 1, 5) for length in answers),
            suffixes_scored=tuple(np.ones(length + 1, dtype=bool) for length in answers),
            pairs=np.array([[0, 1]]),
        )

    store: Any = MemoryStore([example() for _ in range(count)])
    words: Any = _Words(bos_token_id=0, eos_token_id=1, pad_token_id=2)
    return Subject(recipe, words, store, Lengths.of(store), "cuda", torch.bfloat16, 1)


def tracked(subject: Subject, every: int) -> int:
    """Return the peak that MemTracker finds in a step at full depth, the optimizer's state being there."""
    fakes, task = FakeTensorMode(allow_non_fake_inputs=True), build_task(subject.recipe)
    with simulating("cuda"):
        policy = traced_policy(subject.recipe, subject.tokenizer, fakes, subject.dtype)
        set_gradient_checkpointing(policy.causal, every)
        scorer = Scorer(policy.model, policy.causal, ProbeResult("shared", True, "")).train()
        references = np.linspace(-90, -30, int(subject.store.response_start[-1]), dtype=np.float32)
        reader = Reader(subject.store, "shared", HOST, ref_logps=references)
        step = subject.plan(1 << 40).step(0)
        trained = [p for p in policy.model.parameters() if p.requires_grad]
        with fakes:
            optimizer = build_optimizer(policy.model.named_parameters(), subject.recipe.training)
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad()
            batches = [trace._faked(batch, fakes) for batch in reader.batches(step.schedule[0])]
        tracker = Frozen()
        tracker.track_external(policy.model, optimizer, *trace.packed_scales(policy.model))
        rank: Any = trace._one_rank(lambda loss: loss.backward())
        objective = Objective(rank, trace._Mixed(scorer, subject.dtype), task.terms, task.report)
        with fakes, tracker:
            objective.backward(step, reader, Meter(HOST), batches)
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
    snapshot = tracker.get_tracker_snapshot("peak")
    return int(sum(sizes["Total"] for sizes in snapshot.values()))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    layers = parser.parse_args().layers
    console.emit("| trained | tokens | dpoctl, GB | MemTracker, GB | difference |\n|---|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(LLAMA_8B | {"num_hidden_layers": layers}))
        for name, (changes, every) in KINDS.items():
            subject = subject_of(Path(folder), changes)
            found = measure_footprint(subject, 1 << 40, every)
            ours = max(phase.peak for phase in found.trace.phases.values())
            theirs = tracked(subject, every)
            console.emit(
                f"| {name} | {found.tokens:,} | {ours / 1e9:.2f} | {theirs / 1e9:.2f} | {ours / theirs - 1:+.2%} |"
            )


if __name__ == "__main__":
    main()

"""Simulate 8 to 512 GPUs with the real planner and the real division of a model, and print tables in Markdown.

python tests/benchmarks/scale_simulation.py [--pairs 512] [--data FOLDER] [--disk 5]

Nothing is trained: models have no memory. The folder has hh-harmless.jsonl.gz and llama-tokenizer; without it lengths
are drawn that have about the same quantiles.
"""

import argparse
import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoTokenizer

from dpoctl import console
from dpoctl.core.optim import state_bytes
from dpoctl.core.planner import Lengths, Plan
from dpoctl.model.from_config import build_skeleton
from dpoctl.model.sharding import layers_of
from dpoctl.recipe.schema import Recipe
from dpoctl.tasks.estimate import GPU_ACTIVATIONS
from dpoctl.tasks.footprint import states_of

GPUS = (8, 64, 512)
PER_MACHINE = 8
ROWS = 100_000
STEPS = 20
GB = 1e9
REDUCED = 4
"""Bytes of an element of a gradient, as it is summed over ranks."""
RATE = 400e12
"""Operations of a GPU in a second: 40 % of an H100's."""
NETWORKS = {"2 x 100 Gb/s": 25 * GB, "8 x 400 Gb/s": 400 * GB}
"""Bytes that a machine receives in a second."""
LLAMA = {"model_type": "llama", "vocab_size": 128_256}
SHAPES: Mapping[str, dict[str, int]] = {
    "8B": {
        **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
        **{"num_attention_heads": 32, "num_key_value_heads": 8},
    },
    "70B": {
        **{"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80},
        **{"num_attention_heads": 64, "num_key_value_heads": 8},
    },
}
CASES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "8B, full": ("8B", {}),
    "70B, LoRA r=16": ("70B", {"lora": {"r": 16}}),
    "70B, QLoRA r=16": ("70B", {"lora": {"r": 16}, "quantization": {"load_in_4bit": True}}),
}


@dataclass(frozen=True)
class Sizes:
    """The bytes that a whole model has when it is gathered, and those of its gradient when it is reduced.

    Parameters are divided by rows, and padded to a multiple of the number of parts: an adapter of 16 rows over 64 ranks
    is gathered as one of 64.
    """

    gathered: float
    reduced: float


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank receives in a step.

    Attributes:
        shards: in the groups of ranks that share a model: two gathers and one reduce-scatter a micro-batch.
        replicas: between these groups: the all-reduce of the parts of the gradient, in each micro-batch.
    """

    shards: float
    replicas: float


def sizes_of(module: nn.Module, shards: int, cast: torch.dtype | None = None, *, packed: bool = False) -> Sizes:
    """Return what the ranks exchange of a model.

    Args:
        module: what is divided.
        shards: the number of parts.
        cast: the precision in which all weights are gathered; None is that of each weight.
        packed: linear layers of decoder layers that are not trained have four bits.
    """
    inside = {id(parameter) for layer in layers_of(module) for parameter in layer.parameters()}
    gathered = reduced = 0.0
    for parameter in module.parameters():
        rows = parameter.shape[0]
        padded = parameter.numel() // rows * math.ceil(rows / shards) * shards
        is_packed = packed and id(parameter) in inside and not parameter.requires_grad and parameter.ndim == 2
        gathered += padded * (0.5 if is_packed else (cast or parameter.dtype).itemsize)
        reduced += padded * REDUCED * parameter.requires_grad
    return Sizes(gathered, reduced)


def traffic_of(sizes: Sizes, shards: int, replicas: int, micro_batches: int) -> Traffic:
    """Return the bytes that a rank receives in a step.

    Args:
        sizes: of the model.
        shards: ranks that share a model.
        replicas: groups of such ranks.
        micro_batches: of each rank in the step.
    """
    inside = (shards - 1) / shards * (2 * sizes.gathered + sizes.reduced)
    between = 2 * (replicas - 1) / replicas * sizes.reduced / shards
    return Traffic(micro_batches * inside, micro_batches * between)


def recipe_of(case: str) -> tuple[Recipe, nn.Module]:
    """Return the recipe of a case, and its model without memory, in the precisions in which it would be loaded."""
    shape, changes = CASES[case]
    recipe = Recipe.model_validate(
        {
            "method": "dpo",
            "model": {
                "from_scratch": {"config": LLAMA | SHAPES[shape], "tokenizer": {"vocab_size": 300}},
                "dtype": "bfloat16",
            },
            "data": {"train": ["pairs.jsonl"]},
            "training": {"output_dir": "run", "learning_rate": 1e-6, "sharding": "full"},
            **changes,
        }
    )
    model = build_skeleton(recipe, _Words(bos_token_id=0, eos_token_id=1, pad_token_id=2))
    if recipe.lora is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else torch.bfloat16)
    return recipe, model


class _Words(SimpleNamespace):
    """As much of a tokenizer as a configuration needs."""

    def __len__(self) -> int:
        return 300


def lengths_of(data: Path) -> tuple[Lengths, str]:
    """Return the lengths of many pairs, and where they come from."""
    rng = np.random.default_rng(0)
    if (data / "hh-harmless.jsonl.gz").is_file():
        from workloads import harmless

        with tempfile.TemporaryDirectory() as folder:
            rows = harmless(Path(folder), data)
        tokenizer = AutoTokenizer.from_pretrained(data / "llama-tokenizer")
        columns = [[len(ids) for ids in tokenizer([row[side] for row in rows])["input_ids"]] for side in rows[0]]
        drawn = np.array(columns)[:, rng.integers(0, len(rows), ROWS)]
        return _lengths(drawn[0], drawn[1:]), f"those of {len(rows):,} rows of hh-harmless, drawn with replacement"
    prompts, answers = rng.lognormal(4.49, 0.96, ROWS), rng.lognormal(3.45, 0.96, (2, ROWS))
    drawn = np.clip(np.stack([prompts, *answers]), 2, 900).astype(np.int64)
    return _lengths(drawn[0], drawn[1:]), "drawn, with about the quantiles of hh-harmless"


def _lengths(prompts: Any, answers: Any) -> Lengths:
    count = len(prompts)
    store: Any = type("Store", (SimpleNamespace,), {"__len__": lambda self: count})(
        shared_len=prompts,
        suffix_len=answers.T.reshape(-1),
        num_tokens=answers.T.reshape(-1),
        response_start=np.arange(0, 2 * count + 1, 2),
        pair_start=np.arange(count + 1),
        target=np.full(count, -1),
    )
    return Lengths.of(store)


def planned(lengths: Lengths, pairs: int, gpus: int, budget: int) -> tuple[float, float, int]:
    """Return tokens of a rank and step, how much more the fullest has than the mean, and its micro-batches."""
    plan = Plan(lengths, pairs, gpus, max_tokens=budget, seed=0)
    tokens, excess, micro = [], [], []
    for number in range(STEPS):
        schedule = plan.step(number).schedule
        loads = [sum(int(lengths.tokens[list(batch)].sum()) for batch in rank if batch) for rank in schedule]
        tokens.append(sum(loads) / gpus)
        excess.append(max(loads) / tokens[-1] - 1)
        micro.append(len(schedule[0]))
    return float(np.mean(tokens)), float(np.mean(excess)), max(micro)


def plan_table(lengths: Lengths, pairs: int) -> Iterator[str]:
    """Yield the rows of the table about the plan: for a fixed number of pairs in a step, and for eight on each GPU."""
    yield "| GPUs | pairs in a step | tokens of a GPU | the fullest has more | micro-batches |"
    yield "|--:|--:|--:|--:|--:|"
    for gpus in GPUS:
        for size in sorted({pairs, 8 * gpus}):
            tokens, excess, micro = planned(lengths, size, gpus, GPU_ACTIVATIONS // 4096)
            yield f"| {gpus} | {size:,} | {tokens:,.0f} | {excess:.0%} | {micro} |"


def traffic_table(lengths: Lengths) -> Iterator[str]:
    """Yield the rows of the table about memory, traffic (in GB) and time, with eight pairs on each GPU."""
    yield (
        "| model | GPUs | `replicas` | states | in shards | between replicas | into a machine | "
        f"{' | '.join(f's at {name}' for name in NETWORKS)} | s to compute |"
    )
    yield "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
    for case in CASES:
        recipe, model = recipe_of(case)
        full = recipe.lora is None
        cast, packed = torch.bfloat16 if full else None, recipe.quantization is not None
        size = sum(parameter.numel() for parameter in model.parameters())
        needed = sum(states_of(recipe, None, torch.bfloat16, model).values())
        budget = GPU_ACTIVATIONS // int(model.config.hidden_size)
        for gpus in GPUS:
            tokens, excess, micro = planned(lengths, 8 * gpus, gpus, budget)
            for replicas in sorted({1, gpus // PER_MACHINE}):
                shards = gpus // replicas
                sizes = sizes_of(model, shards, cast, packed=packed)
                traffic = traffic_of(sizes, shards, replicas, micro)
                machines = gpus // PER_MACHINE // replicas
                # Within a group that spans machines each of them receives what is on the others, once.
                outside = traffic_of(sizes, machines, 1, micro).shards + PER_MACHINE * traffic.replicas
                compute = (6 if full else 4) * size * tokens * (1 + excess) / RATE
                seconds = " | ".join(f"{outside / rate:.2f}" for rate in NETWORKS.values())
                yield (
                    f"| {case} | {gpus} | {replicas} | {needed / shards / GB:.1f} | {traffic.shards / GB:.1f} | "
                    f"{traffic.replicas / GB:.2f} | {outside / GB:.1f} | {seconds} | {compute:.2f} |"
                )


def checkpoint_table(disk: float) -> Iterator[str]:
    """Yield the rows of the table about checkpoints and host memory, for a disk of so many GB a second."""
    yield (
        "| model | checkpoint, GB | s to write | copy in host memory, GB a GPU, for 8, 64, 512 shards | "
        "the same for `cpu_offload` |"
    )
    yield "|---|--:|--:|--:|--:|"
    for case in CASES:
        recipe, model = recipe_of(case)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        weight, _, moments = state_bytes(recipe.training)
        saved = trained * (weight + moments)
        copies = ", ".join(f"{saved / shards / GB:.1f}" for shards in GPUS)
        states = sum(states_of(recipe, None, torch.bfloat16, model).values())
        moved = ", ".join(f"{states / shards / GB:.1f}" for shards in GPUS)
        yield f"| {case} | {saved / GB:.1f} | {saved / GB / disk:.1f} | {copies} | {moved} |"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=512, help="pairs in a step, where it is fixed")
    parser.add_argument("--data", type=Path, default=Path("data"), help="a folder with the rows of hh-harmless")
    parser.add_argument("--disk", type=float, default=5.0, help="GB a second that the machines write together")
    arguments = parser.parse_args()
    lengths, origin = lengths_of(arguments.data)
    console.emit(f"Lengths: {origin}.\n")
    for table in (plan_table(lengths, arguments.pairs), traffic_table(lengths), checkpoint_table(arguments.disk)):
        console.emit("\n".join(table) + "\n")


if __name__ == "__main__":
    main()

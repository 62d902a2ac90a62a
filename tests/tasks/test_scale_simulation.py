"""The arithmetic of the simulation of many GPUs agrees with the bytes that a small real run exchanges."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmarks.scale_simulation import CASES, Sizes, lengths_of, planned, recipe_of, sizes_of, traffic_of
from fault_runs import Scene
from forked import Fault, only_on
from tiny_runs import pair_rows, write_rows
from tiny_world import save_llama
from transformers import PreTrainedTokenizerFast

# Over two ranks three rows are padded to four.
LORA = {"lora": {"r": 3}}


def counting(file: Path) -> Fault:
    """Count what this rank receives in each step, by kind of exchange, and write it into a file."""

    def install() -> None:
        import torch
        import torch.distributed as dist

        from dpoctl.core.planner import Plan
        from dpoctl.model.sharding import Sharding
        from dpoctl.tasks.recorder import Recorder

        received: Counter[str] = Counter()
        micro, steps, sizes = {}, [], []
        step, divide, advance = Plan.step, Sharding.divide, Recorder.advance

        def counted(function: Callable[..., Any], kind: str) -> Callable[..., Any]:
            def exchange(*values: Any, **options: Any) -> Any:
                given = [value for value in (*values, *options.values()) if isinstance(value, torch.Tensor)]
                whole, group = max(given, key=lambda tensor: tensor.numel()), options.get("group")
                # Norms, checks and counts are small, or have other types.
                if whole.numel() > 1 and whole.dtype in (torch.float32, torch.uint8):
                    ranks = dist.get_world_size(group)
                    times = 2 if kind == "replicas" else 1
                    received[kind] += times * whole.numel() * whole.element_size() * (ranks - 1) // ranks
                return function(*values, **options)

            return exchange

        # The names of newer and of older versions of torch.
        for name in ("all_gather_single", "reduce_scatter_single", "all_gather_into_tensor", "reduce_scatter_tensor"):
            if hasattr(dist, name):
                setattr(dist, name, counted(getattr(dist, name), "shards"))
        dist.all_reduce = counted(dist.all_reduce, "replicas")

        def stepped(self: Plan, number: int) -> Any:
            found = step(self, number)
            micro[number] = len(found.schedule[0])
            return found

        def divided(self: Sharding, module: Any) -> None:
            found = sizes_of(module, self.shards)
            sizes.extend([found.gathered, found.reduced])
            divide(self, module)

        def advanced(self: Recorder, number: int) -> None:
            advance(self, number)
            steps.append([micro[number - 1], received["shards"], received["replicas"]])
            received.clear()
            file.write_text(json.dumps({"sizes": sizes, "steps": steps}))

        Plan.step, Sharding.divide, Recorder.advance = stepped, divided, advanced  # type: ignore[method-assign]

    return only_on(0, install)


@pytest.mark.long("LoRA", "recomputed")
@pytest.mark.parametrize(
    ("ranks", "replicas", "changes"),
    [(2, 1, LORA), (4, 2, {}), (2, 1, {"training.gradient_checkpointing": True})],
    ids=["LoRA", "replicas", "recomputed"],
)
def test_a_run_exchanges_the_bytes_that_are_computed(
    ranks: int, replicas: int, changes: dict[str, Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    save_llama(tmp_path / "tiny", tokenizer)
    write_rows(tmp_path / "pairs.jsonl", pair_rows(24))
    training = {"learning_rate": 1e-3, "global_batch_size": 8, "sharding": "full", "replicas": replicas}
    training |= {"output_dir": "run", "max_tokens_per_device": 150, "max_steps": 3}
    recipe = {"method": "dpo", "model": {"model_name_or_path": str(tmp_path / "tiny"), "dtype": "float32"}}
    scene = Scene(tmp_path, recipe | {"data": {"train": [str(tmp_path / "pairs.jsonl")]}, "training": training})
    counted = tmp_path / "counted.json"
    ended = scene.changed(changes).run(tmp_path / "run", "--num-processes", str(ranks), faults=[counting(counted)])
    assert ended.code == 0, ended.err
    found = json.loads(counted.read_text())
    sizes = Sizes(*found["sizes"])
    # What precedes the first step is not of it.
    for micro, shards, between in found["steps"][1:]:
        assert micro > 1 or ranks > 2
        expected = traffic_of(sizes, ranks // replicas, replicas, micro)
        assert (shards, between) == (expected.shards, expected.replicas)


def test_the_models_of_the_tables_have_the_size_of_their_name(tmp_path: Path) -> None:
    for case in CASES:
        recipe, model = recipe_of(case)
        total = sum(parameter.numel() for parameter in model.parameters())
        assert case.startswith(f"{total / 1e9:.0f}B" if recipe.lora is None else f"{total // 10**9}B")
    packed, plain = (sizes_of(model, 8, packed=packed).gathered for packed in (True, False))
    assert packed < plain / 3
    lengths, origin = lengths_of(tmp_path)
    assert "drawn" in origin
    tokens, excess, micro = planned(lengths, 64, 8, 16_384)
    assert 1000 < tokens < 3000
    assert excess < 0.1
    assert micro == 1

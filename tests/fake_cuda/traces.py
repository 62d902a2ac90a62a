"""Traces by name: `python traces.py NAME...` prints what was found of each as JSON, `--record` writes the figures down.

A name is that of a trace or of a group of them; `checks` are those of the tracker itself, `trl` are both programs.
`--serve` reads a name from each line of stdin, and answers with a line.

A process of its own: what stands in for a GPU must be loaded before torch is imported.
"""

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE.parent), str(HERE)]
FIGURES = HERE / "figures.json"
BUILD = ROOT / "build" / "fake_cuda"
RECORDED = ("rows", "flops", "start_bytes", "peak_bytes", "launches")
# For what happens around a model: some micro-batches a step, one layer, one block of words.
BUDGET = 2000
THIN = {"num_hidden_layers": 1, "vocab_size": 16_384}


@dataclass(frozen=True)
class Spec:
    """A step to trace.

    Attributes:
        family: a key of `models.SHAPES`.
        kind: one of `models.KINDS`.
        changes: to the shape.
        options: of `steps.prepare`.
    """

    family: str
    kind: str
    changes: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


def _judged(loss: dict[str, Any], **options: Any) -> Spec:
    """A step of a thin model, for what a loss does around it."""
    return Spec("llama", "lora", THIN, {"loss": loss, "budget": BUDGET, **options})


# Whole models; the optimizer's states are there, and it moves.
DEPTHS = {
    "full": Spec("llama", "full", options={"optimizer": True}),
    "full, recomputed": Spec("llama", "full", options={"optimizer": True, "recomputed": 1}),
    "lora": Spec("llama", "lora", options={"optimizer": True}),
    "lora, recomputed": Spec("llama", "lora", options={"optimizer": True, "recomputed": 1}),
    "4bit": Spec("llama", "4bit", options={"optimizer": True}),
    "8bit": Spec("llama", "8bit", options={"optimizer": True}),
}
# Two layers.
FAMILIES = {
    f"{family} {kind}": Spec(family, kind)
    for family in ("qwen3", "mistral", "gemma2", "gemma3_text")
    for kind in ("full", "lora")
}
# All but those that keep numbers on the host from step to step.
LOSSES = {
    **{
        name: _judged({"type": name})
        for name in (
            *("sigmoid", "robust", "ipo", "hinge", "sigmoid_norm", "r_dpo", "dpop", "simpo", "cpo", "orpo", "kto"),
            *("plackett_luce", "s_dpo", "apo_zero", "apo_down", "ld_dpo", "wpo", "exo_pair", "nca_pair", "sppo_hard"),
            *("aot", "aot_unpaired", "discopop", "f_dpo"),
        )
    },
    "sigmoid with sft_weight": _judged({"type": "sigmoid", "sft_weight": 0.2}),
    "ipo, not averaged": _judged({"type": "ipo", "average": False}),
    "kto with sft_weight": _judged({"type": "kto", "sft_weight": 0.2}),
    "sft": Spec("llama", "lora", THIN, {"method": "sft", "budget": BUDGET}),
}
# Of 8 ranks the first; of Llama 3.1 70B two depths, from which the whole follows, since each layer takes as much.
LARGE = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}
SHARDED = {
    "8B full": Spec("llama", "full", options={"optimizer": True, "num_ranks": 8}),
    **{
        f"70B 4bit, {depth} layers": Spec(
            "llama", "4bit", LARGE | {"num_hidden_layers": depth}, {"optimizer": True, "num_ranks": 8, "recomputed": 1}
        )
        for depth in (12, 16)
    },
}
GROUPS: dict[str, dict[str, Spec]] = {"depths": DEPTHS, "families": FAMILIES, "losses": LOSSES, "sharded": SHARDED}


def load() -> None:
    """Make this process believe in a GPU."""
    import shim

    shim.load(shim.library(BUILD))
    shim.pretend()


def trace(spec: Spec) -> dict[str, Any]:
    """Take a traced step; what ended it early stands under `error`."""
    import models
    import steps

    from dpoctl.model.quantize import is_quantised

    fakes = models.world()
    with models.fakes_count_as_parameters():
        policy = models.build(fakes, spec.family, spec.kind, **spec.changes)
        scene = steps.prepare(fakes, policy, spec.kind, **spec.options)
        start, error = scene.tracker.live, None
        try:
            steps.run(scene)
        except Exception as problem:
            error = f"{type(problem).__name__}: {str(problem)[:500]}"
    tracker, config = scene.tracker, policy.causal.config
    keys = [shared + suffix for shared, suffixes in steps.records(scene.reader.store) for suffix in suffixes]
    return {
        "error": error,
        "rows": sum(batch.input_ids.shape[1] for batch in scene.batches),
        "keys": sum(keys),
        "longest_keys": max(keys),
        "micro_batches": len(scene.batches),
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "key_heads": config.num_key_value_heads,
        "hidden": config.hidden_size,
        "fused": sum(
            "forward" in vars(module) and not hasattr(module, "lora_A") and not is_quantised(module)
            for module in policy.causal.modules()
        ),
        "flops": tracker.flops,
        "start_bytes": start,
        "peak_bytes": tracker.peak,
        "peak_of_tensors": tracker.peak_of_tensors,
        "peak_at": tracker.peak_at,
        "launches": dict(tracker.launches),
        "waits": tracker.waits,
        "forward": [asdict(call) for call in tracker.forward],
        "backward": [asdict(call) for call in tracker.backward],
        "squares": sorted(tracker.squares),
    }


def record() -> None:
    """Write the figures of every trace down, one trace a line."""
    groups = []
    for group, specs in GROUPS.items():
        found = {name: trace(spec) for name, spec in specs.items()}
        lines = [
            f"    {json.dumps(name)}: {json.dumps({key: result[key] for key in RECORDED})}"
            for name, result in found.items()
        ]
        groups.append(f"  {json.dumps(group)}: {{\n" + ",\n".join(lines) + "\n  }")
    FIGURES.write_text("{\n" + ",\n".join(groups) + "\n}\n", encoding="utf-8")


def found(names: list[str]) -> dict[str, Any]:
    """Trace what is named: groups, or single steps."""
    if names == ["checks"]:
        import checks

        return checks.run()
    if names == ["trl"]:
        import trl_trace

        return trl_trace.compare(layers=2)
    every = {name: spec for group in GROUPS.values() for name, spec in group.items()}
    chosen = {name: spec for word in names for name, spec in (GROUPS.get(word) or {word: every[word]}).items()}
    return {name: trace(spec) for name, spec in chosen.items()}


def main(names: list[str]) -> None:
    """Do what the command line says."""
    load()
    if names == ["--record"]:
        record()
    elif names == ["--serve"]:
        for line in sys.stdin:
            print(json.dumps(found([line.strip()])), flush=True)  # noqa: T201
    else:
        print(json.dumps(found(names)))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])

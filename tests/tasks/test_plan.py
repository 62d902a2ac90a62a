"""`dpoctl plan`, the refusals, and predicted against measured in a run."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from tiny_runs import merge

from dpoctl.errors import UsageError
from dpoctl.model.memory import GPU_CONTEXT
from dpoctl.recipe import parse_recipe
from dpoctl.recipe.gpus import GPUS, find_gpu
from dpoctl.recipe.schema import Recipe
from dpoctl.runs.report import render
from dpoctl.tasks import check, estimate, plan, speed
from dpoctl.tasks.footprint import states_of
from dpoctl.tasks.plan import Target

Run = Callable[..., dict[str, Any]]
LEAST: dict[str, Any] = {
    "method": "dpo",
    "model": {"model_name_or_path": "x"},
    "data": {"train": ["x"]},
    "training": {"output_dir": "run", "learning_rate": 1e-5},
}


def parse(recipe: dict[str, Any], changes: dict[str, Any] | None = None) -> Recipe:
    return parse_recipe(yaml.safe_dump(merge(recipe, changes or {})), "recipe.yaml", command="dpo")


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Give every place so many bytes, a GPU without a context."""

    def of(size: float) -> None:
        monkeypatch.setattr(Target, "of", lambda gpu, processes: Target(GPUS["rtx4090"], processes, size))
        monkeypatch.setattr(plan, "GPU_CONTEXT", 0)

    return of


def test_a_plan_for_a_gpu_that_is_not_there(dpo_recipe: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    plan.run(parse(dpo_recipe), gpu="rtx4090", json_output=True)
    found = json.loads(capsys.readouterr().out)
    memory = found["memory"]
    assert memory["method"] == "trace"
    assert memory["peak"] == sum(memory["parts"].values())
    assert memory["parts"]["context"] == GPU_CONTEXT
    # All weights in float32, and their two moments; small tensors are rounded up.
    assert memory["parts"]["weights"] == pytest.approx(4 * found["trained"], rel=0.03)
    assert memory["parts"]["optimizer state"] == pytest.approx(8 * found["trained"], rel=0.03)
    assert memory["capacity"] == GPUS["rtx4090"].memory
    assert (found["steps"], found["disk"]["checkpoint"]) == (5, 12 * found["trained"])
    low, usual, high = (found["seconds"][name] for name in ("least", "likely", "most"))
    assert low <= usual <= high


def test_the_rate_of_a_cpu_is_that_of_the_precision_of_the_run(
    dpo_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With AVX512-BF16, products of bfloat16 are several times as fast as those of float32."""
    monkeypatch.setattr(speed, "_cpu_rate", {torch.float32: 1e6, torch.bfloat16: 1e7}.get)
    monkeypatch.setattr(speed, "START", 0.0)
    seconds = []
    for dtype in ("float32", "bfloat16"):
        plan.run(parse(dpo_recipe, {"model.dtype": dtype}), json_output=True)
        seconds.append(json.loads(capsys.readouterr().out)["seconds"]["likely"])
    assert seconds[0] == pytest.approx(10 * seconds[1], rel=0.01)


def test_alternatives_in_a_table(dpo_recipe: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    plan.run(parse(dpo_recipe), gpu="a100-40gb", compare=["lora"], gpus=[1, 2], json_output=True)
    one, two = json.loads(capsys.readouterr().out)["alternatives"]
    assert [(row["kind"], row["processes"], row["memory"]["fits"]) for row in (one, two)] == [
        ("lora", 1, True),
        ("lora", 2, True),
    ]
    assert one["trained"] < one["parameters"] / 3
    assert two["seconds"]["likely"] < one["seconds"]["likely"]
    with pytest.raises(UsageError, match="--compare prompt: not a kind of training"):
        plan.run(parse(dpo_recipe), gpu="a100-40gb", compare=["prompt"])


def test_what_cannot_fit_is_refused_with_what_would_fit_before_its_data_are_read(
    dpo_recipe: dict[str, Any], little: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, gradients, moments and copies of a parameter have 18 bytes in bfloat16; 8 and 6 fit into 9."""
    monkeypatch.setattr(plan, "read_data", lambda *_: pytest.fail("data were read"))
    recipe = parse(dpo_recipe, {"model.dtype": "bfloat16"})
    size = sum(states_of(recipe, None, Target(None, 1, 0).dtype(recipe)).values())
    little(size / 2)
    with pytest.raises(UsageError) as refusal:
        plan.run(recipe)
    assert refusal.value.exit_code == 2
    message = str(refusal.value)
    assert "copies in another precision" in message
    assert message.count(": fits)") == 3
    assert "training.param_dtype: bfloat16" in message
    (diagnostic,) = check._states_that_do_not_fit(recipe, "rtx4090")
    assert (diagnostic.severity, diagnostic.code) == ("error", "does-not-fit")


def test_what_fits_by_recomputation_says_so(
    dpo_recipe: dict[str, Any], little: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = parse(dpo_recipe, {"model.dtype": "bfloat16"})
    plan.run(recipe, gpu="rtx4090", json_output=True)
    whole = json.loads(capsys.readouterr().out)["memory"]["peak"] - GPU_CONTEXT
    plan.run(
        parse(dpo_recipe, {"model.dtype": "bfloat16", "training.gradient_checkpointing": True}),
        gpu="rtx4090",
        json_output=True,
    )
    recomputed = json.loads(capsys.readouterr().out)["memory"]["peak"] - GPU_CONTEXT
    little((whole + recomputed) / 2)
    plan.run(parse(dpo_recipe, {"model.dtype": "bfloat16", "training.max_tokens_per_device": 100_000}))
    assert "recomputed in backward" in capsys.readouterr().out


def test_a_run_says_what_was_predicted_and_what_was_measured(
    dpo_recipe: dict[str, Any], train: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(estimate, "SMALL", 0)
    train(dpo_recipe, {"training.max_steps": 3})
    said = [line for line in capfd.readouterr().err.splitlines() if "predicted" in line]
    assert [line.split(":")[0] for line in said] == ["after 2 steps", "at the end"]
    run = Path(dpo_recipe["training"]["output_dir"])
    found = json.loads((run / "env.json").read_text())["forecast"]
    assert found["memory_predicted"] == sum(found["parts"].values())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = [row["peak_memory_gb"] for row in rows if "peak_memory_gb" in row]
    assert len(measured) == 3
    assert measured == sorted(measured)
    assert "GB predicted" in render(run)


def test_a_gpu_by_another_name_is_refused() -> None:
    with pytest.raises(UsageError, match="--gpu h1000: not a known GPU; give one of t4, "):
        Target.of("h1000", 1)


@pytest.mark.parametrize(("gpu", "dtype"), [("t4", torch.float16), ("rtx3090", torch.bfloat16)])
def test_the_precision_is_that_of_the_gpu(gpu: str, dtype: torch.dtype) -> None:
    assert Target.of(gpu, 1).dtype(parse(LEAST)) == dtype


def test_weights_in_bfloat16_are_refused_for_a_gpu_without_it() -> None:
    recipe = parse(LEAST, {"training": {"param_dtype": "bfloat16"}})
    with pytest.raises(UsageError, match=r"training.param_dtype: t4 has no bfloat16; remove training.param_dtype"):
        Target.of("t4", 1).dtype(recipe)


def test_gpus_have_the_names_that_people_and_drivers_give_them() -> None:
    found = {
        **{"NVIDIA A100-SXM4-80GB": "a100-80gb", "A100-PCIE-40GB": "a100-40gb", "a100": "a100-80gb"},
        **{"NVIDIA H100 80GB HBM3": "h100-80gb", "h200": "h200-141gb", "NVIDIA L40S": "l40s", "L40": "l40", "l4": "l4"},
        **{"NVIDIA GeForce RTX 4090": "rtx4090", "4090": "rtx4090", "NVIDIA RTX A6000": "a6000", "Tesla T4": "t4"},
        **{"NVIDIA RTX 6000 Ada Generation": "rtx6000ada", "NVIDIA A10G": "a10g", "a10": "a10", "L4-24GB": "l4"},
        **{"V100": "v100-32gb", "Tesla V100-SXM2-16GB": "v100-16gb"},
    }
    assert {name: gpu.name for name in found if (gpu := find_gpu(name)) is not None} == found
    assert {name: gpu.name for name, gpu in GPUS.items() if find_gpu(name) is gpu} == {name: name for name in GPUS}
    part = find_gpu("NVIDIA A100-SXM4-10GB")
    assert part is not None
    assert (part.name, part.memory, part.rate) == ("a100-10gb", 10 << 30, 312e12)
    assert [find_gpu(name) for name in ("24", "a1000", "NVIDIA GH200 480GB", "Quadro RTX 6000", "")] == [None] * 5


@pytest.mark.parametrize(
    ("changes", "steps", "expected"),
    [
        ({}, 10, 2),
        ({}, 11, 3),
        ({"dpo.reference.path": "another"}, 10, 3),
        ({"dpo.reference.path": "another", "training.eval_on_start": False}, 10, 2),
    ],
)
def test_evaluations_of_a_run(dpo_recipe: dict[str, Any], changes: dict[str, Any], steps: int, expected: int) -> None:
    """Every five steps and at the end; before the first what the reference does not tell already."""
    ahead: Any = SimpleNamespace(num_steps=steps)
    assert plan._evaluations(parse(dpo_recipe, changes), ahead) == expected


def test_measured_steps_replace_the_table_of_rates(
    dpo_recipe: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps are taken for some seconds, or to the end of a short run; nothing is written."""
    plan.run(parse(dpo_recipe), measured=True, json_output=True)
    found = json.loads(capsys.readouterr().out)
    seconds = found["seconds"]
    assert seconds["rate"] == "measured here in 5 steps"
    assert seconds["least"] < seconds["likely"] < seconds["most"] < 1.12 * seconds["likely"]
    assert found["memory"]["measured"] > 0
    assert not Path(dpo_recipe["training"]["output_dir"]).exists()

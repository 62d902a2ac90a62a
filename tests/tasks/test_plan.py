"""`dpoctl plan`, the refusals, and predicted against measured in a run."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from tiny_runs import merge

from dpoctl.errors import UsageError
from dpoctl.model.cards import CARDS, CONTEXT
from dpoctl.recipe import parse_recipe
from dpoctl.recipe.schema import Recipe
from dpoctl.runs.report import render
from dpoctl.tasks import check, estimate, plan
from dpoctl.tasks import train as tasks_train
from dpoctl.tasks.footprint import states_of
from dpoctl.tasks.plan import Target

Run = Callable[..., dict[str, Any]]


def parse(recipe: dict[str, Any], changes: dict[str, Any] | None = None) -> Recipe:
    return parse_recipe(yaml.safe_dump(merge(recipe, changes or {})), "recipe.yaml", command="dpo")


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Give every place so many bytes, a GPU without a context."""

    def of(size: float) -> None:
        monkeypatch.setattr(Target, "of", lambda gpu, processes: Target(CARDS["rtx4090"], processes, size))
        monkeypatch.setattr(plan, "CONTEXT", 0)

    return of


def test_a_plan_for_a_gpu_that_is_not_there(dpo_recipe: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    plan.run(parse(dpo_recipe), gpu="rtx4090", json_output=True)
    found = json.loads(capsys.readouterr().out)
    memory = found["memory"]
    assert memory["method"] == "trace"
    assert memory["peak"] == sum(memory["parts"].values())
    assert memory["parts"]["context"] == CONTEXT
    # All weights in float32, and their two moments; small tensors are rounded up.
    assert memory["parts"]["weights"] == pytest.approx(4 * found["trained"], rel=0.03)
    assert memory["parts"]["optimizer state"] == pytest.approx(8 * found["trained"], rel=0.03)
    assert memory["capacity"] == CARDS["rtx4090"].memory
    assert (found["steps"], found["disk"]["checkpoint"]) == (5, 12 * found["trained"])
    low, usual, high = (found["seconds"][name] for name in ("least", "likely", "most"))
    assert low <= usual <= high


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
    whole = json.loads(capsys.readouterr().out)["memory"]["peak"] - CONTEXT
    plan.run(
        parse(dpo_recipe, {"model.dtype": "bfloat16", "training.gradient_checkpointing": True}),
        gpu="rtx4090",
        json_output=True,
    )
    recomputed = json.loads(capsys.readouterr().out)["memory"]["peak"] - CONTEXT
    little((whole + recomputed) / 2)
    plan.run(parse(dpo_recipe, {"model.dtype": "bfloat16", "training.max_tokens_per_device": 100_000}))
    assert "recomputed in backward" in capsys.readouterr().out


def test_a_run_says_what_was_predicted_and_what_was_measured(
    dpo_recipe: dict[str, Any], train: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(estimate, "SMALL", 0)
    returned: list[str] = []
    monkeypatch.setattr(tasks_train, "after_steps", lambda device, _: lambda: returned.append(device.type))
    train(dpo_recipe, {"training.max_steps": 3})
    assert returned == ["cpu"] * 3
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
    with pytest.raises(UsageError, match="--gpu h1000: not a known GPU; give one of rtx3090"):
        Target.of("h1000", 1)


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

"""Whole runs on the device: known first values, equal routes, resume, samples, memory."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_stage import Stage
from safetensors.torch import load_file
from tiny_runs import merge, metrics_of, pair_rows, write_recipe, write_rows

import dpoctl
from dpoctl.model import generate

pytestmark = pytest.mark.gpu

LORA: dict[str, Any] = {"lora": {"r": 16, "lora_alpha": 32}}
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": LORA,
    "qlora": LORA | {"quantization": {"load_in_4bit": True}},
    "8bit": LORA | {"quantization": {"load_in_8bit": True}},
}


@pytest.fixture
def recipe(folder_small: Path, tmp_path: Path) -> dict[str, Any]:
    """Pairs for a small model, in bfloat16."""
    rows = write_rows(tmp_path / "pairs.jsonl", pair_rows(24))
    return {
        "method": "dpo",
        "model": {"model_name_or_path": str(folder_small), "dtype": "bfloat16"},
        "data": {"train": [{"path": str(rows)}], "max_length": 256},
        "training": {
            "output_dir": str(tmp_path / "run"),
            "global_batch_size": 8,
            "max_tokens_per_device": 256,
            "learning_rate": 1e-5,
            "logging_steps": 1,
            "warmup_steps": 0,
            "max_steps": 3,
        },
    }


def train(recipe: dict[str, Any], changes: dict[str, Any] | None = None, **options: Any) -> Path:
    return Path(dpoctl.dpo(merge(recipe, changes or {}), **options)["output_dir"])


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    (file,) = [f for f in (run / "model.safetensors", run / "adapter_model.safetensors") if f.exists()]
    return load_file(file)


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in metrics_of(run) if "loss" in row]


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_loss_is_ln_2_and_training_lowers_it(recipe: dict[str, Any], kind: str) -> None:
    rate = 1e-5 if kind == "full" else 3e-4
    run = train(recipe, KINDS[kind] | {"training.learning_rate": rate, "training.max_steps": 8})
    rows = [row for row in metrics_of(run) if "loss" in row]
    assert rows[0]["loss"] == pytest.approx(0.693147, abs=4e-3)
    assert abs(rows[0]["rewards/margins"]) < 2e-2
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.003


@pytest.mark.parametrize("kind", KINDS)
def test_a_cached_reference_is_a_live_one(recipe: dict[str, Any], kind: str) -> None:
    found = [
        losses(
            train(
                recipe,
                KINDS[kind]
                | {"dpo.reference.mode": mode, "training.output_dir": f"{recipe['training']['output_dir']}-{mode}"},
            )
        )
        for mode in ("cached", "live")
    ]
    assert found[0] == pytest.approx(found[1], abs=2e-2)


@pytest.mark.parametrize("kind", ["full", "lora", "qlora"])
def test_two_runs_are_bit_identical_and_so_is_one_that_was_killed(
    recipe: dict[str, Any], kind: str, tmp_path: Path, stage: Stage
) -> None:
    changes = KINDS[kind] | {"training.save_steps": 1, "training.max_steps": 4}
    whole = train(recipe, changes)
    again = tmp_path / "again"
    file = write_recipe(tmp_path / "recipe.yaml", recipe, changes | {"training.output_dir": str(again)})
    kill_after(2, file, again)
    resumed = train(recipe, changes | {"training.output_dir": str(again)}, resume=True)
    one, two = weights_of(whole), weights_of(resumed)
    assert one.keys() == two.keys()
    different = [name for name in one if not torch.equal(one[name], two[name])]
    assert not different, f"{len(different)} of {len(one)} tensors differ"


def kill_after(step: int, recipe: Path, run: Path) -> None:
    """Start a run in a process of its own, and kill it once it has logged a step."""
    command = [sys.executable, "-m", "dpoctl", "dpo", str(recipe)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=dict(os.environ)) as process:
        until = time.monotonic() + 180
        metrics = run / "metrics.jsonl"
        while process.poll() is None and time.monotonic() < until:
            if (
                metrics.exists()
                and metrics.read_text().count('"loss"') >= step
                and list(run.glob("checkpoints/step-*"))
            ):
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.02)
    assert list(run.glob("checkpoints/step-*")), "no checkpoint was written"


def test_samples_are_written(recipe: dict[str, Any], tmp_path: Path) -> None:
    held_out = write_rows(tmp_path / "eval.jsonl", pair_rows(8, seed=1))
    samples = {"data.eval": [{"path": str(held_out)}], "eval": {"samples": {"num": 4, "max_new_tokens": 12}}}
    run = train(recipe, LORA | samples | {"training.eval_steps": 3})
    assert list((run / "samples").glob("*.jsonl"))


@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "paged_adamw_32bit", "rmsprop"])
def test_other_optimizers_learn(recipe: dict[str, Any], optim: str) -> None:
    run = train(recipe, LORA | {"training.optim": optim, "training.learning_rate": 1e-4})
    assert losses(run)[-1] < losses(run)[0]


def test_compiled_layers_give_the_same_losses(recipe: dict[str, Any]) -> None:
    eager = losses(train(recipe, LORA))
    compiled = train(
        recipe,
        LORA
        | {
            "training.torch_compile": True,
            "training.output_dir": recipe["training"]["output_dir"] + "-compiled",
        },
    )
    assert losses(compiled) == pytest.approx(eager, abs=2e-2)


def test_a_whole_step_of_a_coupled_loss_in_several_micro_batches(recipe: dict[str, Any]) -> None:
    run = train(recipe, {"dpo.loss": {"type": "beta_dpo"}})
    assert losses(run)[0] == pytest.approx(0.693147, abs=4e-3)


def test_sft_learns(recipe: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pair_rows(24)]
    path = write_rows(tmp_path / "sft.jsonl", rows)
    changes = {"method": "sft", "data.train": [{"path": str(path)}]}
    run = Path(dpoctl.sft(merge(recipe, changes | LORA | {"training.learning_rate": 1e-3}))["output_dir"])
    assert losses(run)[-1] < losses(run)[0]


def test_text_is_generated_from_the_device(stage: Stage, tokenizer: Any) -> None:
    model = stage.build("1b").eval()
    prompts = [[5, 6, 7], [8, 9, 10, 11]]
    sampling = generate.SamplingParams(max_new_tokens=8, seed=1)
    one = generate.generate(model, tokenizer, prompts, sampling)
    two = generate.generate(model, tokenizer, prompts, sampling)
    assert [g.text for g in one] == [g.text for g in two]

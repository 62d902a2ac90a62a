"""One recipe means one thing: the same curve for any token budget, any number of processes, any launcher."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import Ended
from tiny_runs import command, metrics_of, run_command, write_recipe

Run = Callable[..., dict[str, Any]]
STEPS = {"training.max_steps": 20, "training.eval_steps": 10}
BETA = 0.1
FLOAT32 = 2.0**-23
"""The relative distance of two neighbours."""
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "dpoctl")


def assert_same_curve(run: Path | str, other: Path | str) -> None:
    one, two = metrics_of(run), metrics_of(other)
    assert len(one) == len(two) == 23
    for row, same in zip(one, two, strict=True):
        assert row.keys() == same.keys()
        for name in row.keys() - {"time", "tokens_per_second"}:
            tight = 1e-6 if name.startswith("eval") else 1e-5
            least = max(tight, resolution(row)) if name.startswith("eval_rewards/") else tight
            assert row[name] == pytest.approx(same[name], rel=tight, abs=least), (row["step"], name)


def resolution(row: dict[str, Any]) -> float:
    """The step in which float32 can tell rewards apart: that of the log-probabilities that are subtracted."""
    return BETA * FLOAT32 * max(abs(row[f"eval_logps/{side}"]) for side in ("chosen", "rejected"))


@pytest.mark.long("sft")
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_token_budgets_give_the_same_curve(method: str, dpo_recipe: dict[str, Any], train: Run) -> None:
    runs = []
    for budget in (60, 200, 1_000_000):
        out = f"{dpo_recipe['training']['output_dir']}-{budget}"
        changes = STEPS | {"training.max_tokens_per_device": budget, "training.output_dir": out}
        runs.append(train(dpo_recipe | {"method": method}, changes)["training"]["output_dir"])
    assert_same_curve(runs[0], runs[1])
    assert_same_curve(runs[0], runs[2])


def test_experts_are_balanced_alike_by_all_token_budgets(sft_recipe: dict[str, Any], train: Run) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2}
    config = {"model_type": "mixtral", **sizes, **heads}
    changes = {
        "sft.router_aux_loss_coef": 0.5,
        "data.eval": None,
        "training.eval_steps": None,
        "training.max_steps": 2,
        "model": {"model_name_or_path": None, "from_scratch": {"config": config, "tokenizer": {"vocab_size": 300}}},
    }
    curves = []
    for name, other in {"few": {"training.gradient_checkpointing": True}, "one": {}}.items():
        budget = {"training.max_tokens_per_device": 100 if name == "few" else 1_000_000}
        out = {"training.output_dir": f"{sft_recipe['training']['output_dir']}-{name}"}
        run = train(sft_recipe, changes | budget | other | out)["training"]["output_dir"]
        curves.append([row for row in metrics_of(run) if "grad_norm" in row])
    for row, same in zip(*curves, strict=True):
        assert 1.9 < row["aux_loss"] < 4
        for name in ("loss", "aux_loss", "grad_norm"):
            assert row[name] == pytest.approx(same[name], rel=1e-5)


@pytest.mark.long("torchrun-dpo")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "method"),
    [("--num-processes", "sft"), ("--num-processes", "dpo"), ("torchrun", "dpo")],
)
def test_two_processes_give_the_curve_of_one(
    launcher: str, method: str, dpo_recipe: dict[str, Any], train: Run, tmp_path: Path, in_fork: Callable[..., Ended]
) -> None:
    alone = train(dpo_recipe | {"method": method}, STEPS)["training"]["output_dir"]
    changes = STEPS | {"training.max_tokens_per_device": 100}
    recipe = write_recipe(tmp_path / "recipe.yaml", dpo_recipe | {"method": method}, changes)
    arguments = (method, recipe, "--output-dir", tmp_path / "two")
    if launcher == "torchrun":
        run_command(command(*arguments, launcher=TORCHRUN))
    else:
        in_fork(*arguments, launcher, "2")
    assert_same_curve(alone, tmp_path / "two")

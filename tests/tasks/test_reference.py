"""The reference in whole runs: kept on disk, live beside the policy, or moving after it."""

import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import command, metrics_of, run_command, write_recipe, write_rows
from transformers import AutoModelForCausalLM

from dpoctl.data.prepare import cache_dir
from dpoctl.errors import DataError
from dpoctl.runs import checkpoint

Run = Callable[..., dict[str, Any]]
FLOAT32 = {"model.dtype": "float32"}
LORA = FLOAT32 | {"lora": {"r": 4, "lora_alpha": 8}}
KINDS = {"full": FLOAT32, "lora": LORA}
STACKED = {"new": {"start": "new", "r": 3}, "continue": {"start": "continue"}}


def out(recipe: dict[str, Any]) -> Path:
    return Path(recipe["training"]["output_dir"])


def losses(recipe: dict[str, Any]) -> list[float]:
    return [row["loss"] for row in metrics_of(out(recipe)) if "loss" in row]


@pytest.fixture
def _dropout(tiny_llama_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    model.config.attention_dropout = 0.3
    model.save_pretrained(tiny_llama_folder)


@pytest.mark.usefixtures("_dropout")
@pytest.mark.parametrize("reference", [{"mode": "live"}, {"sync_steps": 2}])
@pytest.mark.parametrize("kind", KINDS)
def test_a_live_reference_has_no_dropout_and_turns_none_on(
    kind: str, reference: dict[str, Any], dpo_recipe: dict[str, Any], train: Run
) -> None:
    recipe = train(dpo_recipe, KINDS[kind] | {"dpo.reference": reference, "model.disable_dropout": False})
    start, first, *_ = metrics_of(out(recipe))
    # Evaluation: none on either side.
    assert start["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(start["eval_rewards/margins"]) < 1e-5
    # Training: the policy's alone.
    assert abs(first["rewards/margins"]) > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_a_reference_that_becomes_the_policy_at_every_step_gives_ln_2_at_every_step(
    kind: str, dpo_recipe: dict[str, Any], train: Run
) -> None:
    changes = KINDS[kind] | {"training.learning_rate": 1e-2, "dpo.reference": {"sync_steps": 2, "sync_alpha": 1.0}}
    found = losses(train(dpo_recipe, changes))
    assert len(found) == 5
    assert [found[0], found[2], found[4]] == pytest.approx([math.log(2)] * 3, abs=1e-6)
    assert all(abs(loss - math.log(2)) > 1e-4 for loss in (found[1], found[3]))


@pytest.mark.parametrize("kind", KINDS)
def test_it_moves_by_alpha_every_so_many_steps(kind: str, dpo_recipe: dict[str, Any], train: Run) -> None:
    saving = {"training.save_steps": 1, "training.save_total_limit": None}
    recipe = train(dpo_recipe, KINDS[kind] | saving | {"dpo.reference": {"sync_steps": 2, "sync_alpha": 0.6}})
    saved = [checkpoint.load(out(recipe) / "checkpoints" / f"step-{step:06d}") for step in range(1, 6)]
    start = saved[0].reference
    assert saved[1].weights.keys() == start.keys()
    second = {name: 0.6 * saved[1].weights[name] + 0.4 * start[name] for name in start}
    fourth = {name: 0.6 * saved[3].weights[name] + 0.4 * second[name] for name in start}
    for state, expected in zip(saved, [start, second, second, fourth, fourth], strict=True):
        for name, tensor in expected.items():
            torch.testing.assert_close(state.reference[name], tensor, rtol=1e-6, atol=1e-7)
    assert any(not torch.equal(fourth[name], start[name]) for name in start)


@pytest.mark.parametrize("start", STACKED)
def test_over_an_sft_adapter_a_moving_reference_starts_there(
    start: str, sft_recipe: dict[str, Any], dpo_recipe: dict[str, Any], train: Run, tmp_path: Path
) -> None:
    sft = out(train(sft_recipe, LORA | {"training.output_dir": str(tmp_path / "sft")}))
    changes = FLOAT32 | {"model.model_name_or_path": str(sft), "lora": STACKED[start]}
    standing = losses(train(dpo_recipe, changes))
    moving = changes | {"dpo.reference.sync_steps": 3, "training.output_dir": str(tmp_path / "moving")}
    found = losses(train(dpo_recipe, moving))
    assert found[:3] == pytest.approx(standing[:3], abs=1e-5)
    assert abs(found[3] - standing[3]) > 1e-6


@pytest.mark.usefixtures("_dropout")
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_with_a_moving_reference_resumes_to_the_same_bits(
    kind: str, dpo_recipe: dict[str, Any], train: Run
) -> None:
    from dpoctl.tasks.journal import Journal

    changes = KINDS[kind] | {
        "model.disable_dropout": False,
        "training.save_steps": 3,
        "training.num_train_epochs": 2,
        "dpo.reference.sync_steps": 2,
    }
    whole = out(train(dpo_recipe, changes))
    killed = Path(f"{whole}-killed")
    child = os.fork()
    if child == 0:
        advance = Journal.advance

        def kill(self: Journal, step: int) -> None:
            advance(self, step)
            if step == 5:
                os.kill(os.getpid(), signal.SIGKILL)

        Journal.advance = kill  # type: ignore[method-assign]
        try:
            train(dpo_recipe, changes | {"training.output_dir": str(killed)})
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    train(dpo_recipe, changes | {"training.output_dir": str(killed)}, resume=True)
    (weights,) = (path.name for path in whole.glob("*.safetensors"))
    assert (killed / weights).read_bytes() == (whole / weights).read_bytes()
    rows = [
        [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in metrics_of(r)] for r in (whole, killed)
    ]
    assert rows[0] == rows[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_with_a_moving_reference_give_the_curve_of_one(
    kind: str, dpo_recipe: dict[str, Any], train: Run, tmp_path: Path
) -> None:
    changes = KINDS[kind] | {"dpo.reference.sync_steps": 2, "training.num_train_epochs": 2}
    alone = out(train(dpo_recipe, changes))
    recipe = write_recipe(tmp_path / "recipe.yaml", dpo_recipe, changes | {"training.max_tokens_per_device": 100})
    run_command(command("dpo", recipe, "--output-dir", tmp_path / "two", "--num-processes", "2"))
    for one, two in zip(metrics_of(alone), metrics_of(tmp_path / "two"), strict=True):
        for name in one.keys() - {"tokens_per_second"}:
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), (one["step"], name)


def test_the_table_has_a_column_for_each_quantity_that_a_loss_needs(
    dpo_recipe: dict[str, Any], train: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    def tables() -> int:
        return len(list((cache_dir() / "reference").iterdir()))

    def run(name: str, loss: dict[str, Any]) -> tuple[list[float], bool]:
        changes = FLOAT32 | {"dpo.loss": loss, "training.output_dir": str(out(dpo_recipe)) + name}
        found = losses(train(dpo_recipe, changes))
        return found, "computing log-probabilities" in capfd.readouterr().err

    plain, computed = run("-plain", {"type": "sigmoid"})
    assert (tables(), computed) == (2, True)  # training and evaluation
    head, computed = run("-head", {"type": "ld_dpo"})
    assert (tables(), computed) == (4, True)
    assert head[0] == pytest.approx(math.log(2), abs=1e-6)
    assert head[-1] != plain[-1]
    again, computed = run("-again", {"type": "ld_dpo"})
    assert (tables(), computed) == (4, False)
    assert again == head


def test_a_live_reference_knows_heads_as_a_cached_one_does(dpo_recipe: dict[str, Any], train: Run) -> None:
    found = []
    for mode in ("cached", "live"):
        changes = LORA | {"dpo.loss": {"type": "ld_dpo"}, "training.learning_rate": 1e-2}
        changes |= {"dpo.reference.mode": mode, "training.output_dir": f"{out(dpo_recipe)}-{mode}"}
        found.append(losses(train(dpo_recipe, changes)))
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def labelled(path: Path, count: int, prompts: int) -> Path:
    return write_rows(
        path,
        [
            {
                "prompt": f"question {number % prompts}:",
                "completion": f" {'yes' if number % 2 else 'no'} {number}",
                "label": bool(number % 2),
            }
            for number in range(count)
        ],
    )


@pytest.mark.parametrize("kind", KINDS)
def test_kto_meets_the_answers_to_other_prompts(
    kind: str, dpo_recipe: dict[str, Any], train: Run, tmp_path: Path
) -> None:
    data = {
        "data.train": [str(labelled(tmp_path / "train.jsonl", 12, 5))],
        "data.eval": [str(labelled(tmp_path / "eval.jsonl", 6, 3))],
    }
    recipe = train(dpo_recipe, KINDS[kind] | data | {"dpo.loss": {"type": "kto"}, "training.learning_rate": 1e-2})
    rows = metrics_of(out(recipe))
    assert rows[0]["eval_loss"] == pytest.approx(0.5, abs=1e-5)
    assert [row for row in rows if "eval_loss" in row][-1]["eval_loss"] < 0.5


def test_kto_refuses_data_with_one_prompt(dpo_recipe: dict[str, Any], train: Run, tmp_path: Path) -> None:
    data = {"data.train": [str(labelled(tmp_path / "train.jsonl", 6, 1))], "data.eval": {}, "training.eval_steps": None}
    with pytest.raises(DataError, match="same prompt"):
        train(dpo_recipe, FLOAT32 | data | {"dpo.loss": {"type": "kto"}})


def test_the_named_reference_of_a_finished_run_is_loaded_as_training_loads_it(
    dpo_recipe: dict[str, Any], train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpoctl.tasks import reference
    from dpoctl.tasks.finished import FinishedRun

    named = {"dpo.reference.path": dpo_recipe["model"]["model_name_or_path"]}
    recipe = train(dpo_recipe, LORA | named | {"model.attn_implementation": "eager", "model.trust_remote_code": True})
    asked: list[dict[str, Any]] = []
    load_run = reference.load_run

    def spy(*arguments: Any, **options: Any) -> Any:
        asked.append(options)
        return load_run(*arguments, **options)

    monkeypatch.setattr(reference, "load_run", spy)
    with FinishedRun.load(out(recipe), torch.device("cpu")).reference() as causal:
        assert causal.config._attn_implementation == "eager"
    assert asked == [{"attn_implementation": "eager", "quantization": None, "trust_remote_code": True}]

"""`dpoctl.sft` and `dpoctl.dpo`: each argument is seen at work in a run."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import as_ranks
from model_samples import logps, plain
from tiny_runs import merge, metrics_of, write_recipe

import dpoctl
from dpoctl.core.batch import Batch
from dpoctl.core.collator import collate
from dpoctl.core.meters import Total
from dpoctl.data.cache import cache_dir
from dpoctl.errors import UsageError
from dpoctl.losses import Scores
from dpoctl.model.generate import SamplingParams
from dpoctl.tasks import chat, evaluate

Recipe = dict[str, Any]


def losses(run: Path | str) -> list[float]:
    return [row["loss"] for row in metrics_of(run) if "loss" in row]


def test_importing_the_package_costs_no_torch() -> None:
    script = "import sys, dpoctl; dpoctl.sft, dpoctl.dpo; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_training_everything_needs_no_peft_and_leaves_the_collector_of_garbage_alone() -> None:
    """Peft and what it imports take a second; what the caller's heap holds is the caller's."""
    script = (
        "import gc, sys; import dpoctl.tasks.api; "
        "assert not {'peft', 'bitsandbytes', 'datasets'} & set(sys.modules), 'imported'; "
        "assert gc.isenabled() and gc.get_freeze_count() == 0, gc.get_freeze_count()"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_a_recipe_is_a_file_or_a_mapping(sft_recipe: Recipe, tmp_path: Path) -> None:
    mapping = merge(sft_recipe, {"training.output_dir": tmp_path / "one"})
    one = dpoctl.sft(mapping)
    two = dpoctl.sft(
        write_recipe(tmp_path / "recipe.yaml", sft_recipe), overrides=[f"output_dir={tmp_path / 'two'}", "max_steps=2"]
    )
    assert (one["output_dir"], one["steps"]) == (str(tmp_path / "one"), 5)
    assert (two["output_dir"], two["steps"]) == (str(tmp_path / "two"), 2)
    assert one["metrics"]["eval_loss"] == metrics_of(tmp_path / "one")[-1]["eval_loss"]
    assert losses(tmp_path / "one")[0] == losses(tmp_path / "two")[0]
    with pytest.raises(UsageError, match="method"):
        dpoctl.dpo(mapping)
    with pytest.raises(UsageError, match="cannot be used together"):
        dpoctl.sft(mapping, resume=True, overwrite=True)


def test_a_run_goes_on_with_a_changed_key_where_that_is_allowed(sft_recipe: Recipe) -> None:
    dpoctl.sft(sft_recipe)
    changed = merge(sft_recipe, {"training.num_train_epochs": 2})
    with pytest.raises(UsageError, match=r"--allow-changed training\.num_train_epochs"):
        dpoctl.sft(changed, resume=True)
    assert dpoctl.sft(changed, resume=True, allow_changed=["training.num_train_epochs"])["steps"] == 10


def test_one_process_can_train_several_times_in_several_precisions(
    sft_recipe: Recipe, dpo_recipe: Recipe, tmp_path: Path
) -> None:
    sft = dpoctl.sft(merge(sft_recipe, {"training.output_dir": tmp_path / "sft", "model.dtype": "bfloat16"}))
    dpo = dpoctl.dpo(merge(dpo_recipe, {"model.model_name_or_path": sft["output_dir"], "model.dtype": "float32"}))
    assert dpo["steps"] == 5


def test_a_collator_makes_the_batches(sft_recipe: Recipe, tmp_path: Path) -> None:
    def last_tokens(*arguments: Any, **options: Any) -> Batch:
        batch = collate(*arguments, **options)
        batch.score_tgt.fill_(0)
        return batch

    usual = dpoctl.sft(merge(sft_recipe, {"training.output_dir": tmp_path / "usual"}))
    same = dpoctl.sft(
        merge(sft_recipe, {"training.output_dir": tmp_path / "same"}),
        collator=lambda *arguments, **options: collate(*arguments, **options),
    )
    other = dpoctl.sft(merge(sft_recipe, {"training.output_dir": tmp_path / "other"}), collator=last_tokens)
    assert losses(same["output_dir"]) == losses(usual["output_dir"])
    assert abs(losses(other["output_dir"])[0] - losses(usual["output_dir"])[0]) > 0.1
    assert losses(other["output_dir"])[-1] < losses(other["output_dir"])[0]


def test_what_a_collator_of_ones_own_gives_never_enters_the_reference_cache(dpo_recipe: Recipe) -> None:
    def flipped(*arguments: Any, **options: Any) -> Batch:
        batch = collate(*arguments, **options)
        batch.outline.pairs.copy_(batch.outline.pairs.flip(1))
        return batch

    done = dpoctl.dpo(dpo_recipe, collator=flipped)
    assert not (cache_dir() / "reference").exists()
    evaluate.run(Path(done["output_dir"]))
    (result,) = (Path(done["output_dir"]) / "evals").glob("official-*.json")
    report = json.loads(result.read_text())
    assert report["rewards/margins"] == pytest.approx(-done["metrics"]["eval_rewards/margins"], rel=1e-3)


def test_model_init_makes_the_model_that_is_trained(
    dpo_recipe: Recipe, tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    def build() -> Any:
        model = tiny_model("qwen3")
        # Drawn under the recipe's seed, so the same on every rank.
        model.lm_head.weight.data.normal_()
        return model

    runs = [dpoctl.dpo(merge(dpo_recipe, {"training.output_dir": tmp_path / n}), model_init=build) for n in "ab"]
    run = Path(runs[0]["output_dir"])
    assert json.loads((run / "config.json").read_text())["model_type"] == "qwen3"
    assert losses(run) == losses(runs[1]["output_dir"])
    assert losses(run)[0] == pytest.approx(0.6931, abs=1e-4)
    with pytest.raises(UsageError, match="does not keep that model"):
        evaluate.run(run)
    with pytest.raises(UsageError, match="does not keep that model"):
        chat.run(run, prompt="hello", reference=True, sampling=SamplingParams(max_new_tokens=4))
    chat.run(run, prompt="hello", sampling=SamplingParams(max_new_tokens=4))


def test_model_init_is_refused_where_it_cannot_serve(dpo_recipe: Recipe, tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match="leave out lora"):
        dpoctl.dpo(merge(dpo_recipe, {"lora": {"r": 2}}), model_init=lambda: tiny_model("llama"))
    with pytest.raises(UsageError, match="model_init returned a LlamaModel, not a causal language model"):
        dpoctl.dpo(dpo_recipe, model_init=lambda: tiny_model("llama").model)


def test_callbacks_hear_every_row_and_may_end_the_run(sft_recipe: Recipe) -> None:
    heard: list[dict[str, Any]] = []

    def stop_at_three(step: int, metrics: dict[str, float]) -> bool:
        return step == 3

    done = dpoctl.sft(sft_recipe, callbacks=[stop_at_three, lambda step, row: heard.append({"step": step, **row})])
    run = Path(done["output_dir"])
    rows = [{name: value for name, value in row.items() if name != "time"} for row in metrics_of(run)]
    assert [{name: row[name] for name in line} for row, line in zip(heard, rows, strict=True)] == rows
    assert done["steps"] == 3
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 3]
    assert "eval_loss" in rows[-1]
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["step-000003"]
    assert (run / "model.safetensors").is_file()


def test_a_callback_may_end_the_run_by_what_an_evaluation_found(sft_recipe: Recipe) -> None:
    changed = merge(sft_recipe, {"training": {"eval_steps": 2, "logging_steps": 100}})
    done = dpoctl.sft(changed, callbacks=[lambda step, metrics: step > 0 and "eval_loss" in metrics])
    assert done["steps"] == 2
    assert [row["step"] for row in metrics_of(done["output_dir"]) if "eval_loss" in row] == [0, 2]


def test_an_optimizer_takes_the_place_of_the_recipes(sft_recipe: Recipe) -> None:
    made: list[torch.optim.Optimizer] = []

    def build(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        groups = [
            {"params": [p for p in parameters if p.ndim == 1]},
            {"params": [p for p in parameters if p.ndim > 1], "lr_scale": 0.0},
        ]
        made.append(torch.optim.SGD(groups, lr=0.0, momentum=0.9))
        return made[0]

    base, run = sft_recipe["model"]["model_name_or_path"], dpoctl.sft(sft_recipe, optimizer=build)["output_dir"]
    before, after = plain(Path(base)).state_dict(), plain(Path(run)).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "norm" in name}
    assert (Path(run) / "checkpoints" / "step-000005").is_dir()
    again = dpoctl.sft(sft_recipe, optimizer=build, resume=True)
    assert again["steps"] == 5
    with pytest.raises(UsageError, match=r"started with optimizer: .*build, and now has none; resume it with the code"):
        dpoctl.sft(sft_recipe, resume=True)
    with pytest.raises(UsageError, match="optimizer: it returned a list"):
        dpoctl.sft(sft_recipe, optimizer=lambda parameters: parameters, overwrite=True)


def test_learning_rates_come_from_a_function_of_the_step(sft_recipe: Recipe) -> None:
    done = dpoctl.sft(sft_recipe, learning_rate=lambda step: 1e-4 * (step % 2))
    rates = [row["learning_rate"] for row in metrics_of(done["output_dir"]) if "learning_rate" in row]
    assert rates == [0, 1e-4, 0, 1e-4, 0]


def test_extra_metrics_stand_beside_the_tasks(dpo_recipe: Recipe) -> None:
    def lengths(scores: Scores, values: torch.Tensor) -> dict[str, Total]:
        tokens = scores.num_tokens[scores.pairs[:, 0]].float()
        return {
            "tokens/chosen": Total(tokens.sum(), len(tokens)),
            "loss_squared": Total((values**2).sum(), len(values)),
        }

    done = dpoctl.dpo(dpo_recipe, extra_metrics=lengths)
    rows = metrics_of(done["output_dir"])
    assert all(row["tokens/chosen"] > 1 and "rewards/chosen" in row for row in rows if "loss" in row)
    assert all(row["eval_loss_squared"] > row["eval_loss"] ** 2 - 1e-6 for row in rows if "eval_loss" in row)
    with pytest.raises(UsageError, match="a metric named 'loss' already exists"):
        dpoctl.dpo(dpo_recipe, overwrite=True, extra_metrics=lambda scores, values: {"loss": Total(values.sum(), 1)})


def test_a_run_keeps_the_names_of_the_code_it_was_given(sft_recipe: Recipe) -> None:
    run = Path(dpoctl.sft(sft_recipe, callbacks=[print])["output_dir"])
    assert json.loads((run / "env.json").read_text())["extensions"] == {"callbacks": ["builtins.print"]}


def test_all_ranks_end_together(sft_recipe: Recipe, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", sft_recipe)

    def script(rank: int) -> None:
        done = dpoctl.sft(recipe, callbacks=[lambda step, metrics: step == 2])
        (tmp_path / f"steps-{rank}").write_text(str(done["steps"]))

    as_ranks(2, script)
    assert [(tmp_path / f"steps-{rank}").read_text() for rank in range(2)] == ["2", "2"]
    assert logps(plain(tmp_path / "run")).isfinite().all()

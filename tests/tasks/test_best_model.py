"""`training.keep_best`: the model of the best evaluation is exported, whatever happens to the run on its way."""

import json
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import fork
from safetensors.torch import load_file
from tiny_runs import metrics_of

from dpoctl.errors import RunError
from dpoctl.recipe import RecipeError
from dpoctl.runs import checkpoint
from dpoctl.tasks.evaluate import run as evaluate

Run = Callable[..., dict[str, Any]]
# The loss falls at every step, so that its highest value is an early one.
FIRST = {
    "training.num_train_epochs": 2,
    "training.eval_steps": 2,
    "training.keep_best": {"metric": "eval_loss", "mode": "max"},
}


def test_the_best_step_is_kept_exported_and_said(
    dpo_recipe: dict[str, Any], train: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    changes = FIRST | {"training.save_steps": 3, "training.learning_rate": 1e-2}
    run = Path(train(dpo_recipe, changes)["training"]["output_dir"])
    losses = {row["step"]: row["eval_loss"] for row in metrics_of(run) if "eval_loss" in row}
    best = max(list(losses)[1:], key=losses.__getitem__)
    assert best < 10
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        f"step-{step:06d}" for step in sorted({best, 9, 10})
    ]
    kept = checkpoint.load_weights(run / "checkpoints" / f"step-{best:06d}")
    assert all(torch.equal(kept[name], value) for name, value in load_file(run / "model.safetensors").items())
    said = (
        f"best: step {best}, eval_loss {losses[best]:.4g}; the last evaluation, at step 10, has {losses[10]:.4g}; "
        f"the model of step {best} is exported\n"
    )
    assert said in capfd.readouterr().err
    assert f"The exported model is of step {best}" in (run / "report.html").read_text()
    evaluate(run, json_output=True)
    result = json.loads(capfd.readouterr().out)
    assert (result["step"], result["official"]) == (best, True)
    assert result["loss"] == pytest.approx(losses[best], rel=1e-6)


def test_a_run_without_improvement_stops_and_goes_on_only_with_more_patience(
    dpo_recipe: dict[str, Any], train: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    stopping = FIRST | {"training.early_stopping": {"patience": 2}}
    run = Path(train(dpo_recipe, stopping)["training"]["output_dir"])
    assert metrics_of(run)[-1]["step"] == 6
    assert "stopped after step 6 of 10: 2 evaluations without an improvement\n" in capfd.readouterr().err
    train(dpo_recipe, stopping, resume=True)
    assert metrics_of(run)[-1]["step"] == 6
    train(dpo_recipe, FIRST | {"training.early_stopping": {"patience": 3}}, resume=True)
    assert metrics_of(run)[-1]["step"] == 8
    assert json.loads((run / "best.json").read_text())["step"] == 2
    train(dpo_recipe, FIRST | {"training.keep_best": None}, resume=True)
    assert metrics_of(run)[-1]["step"] == 10
    assert not (run / "best.json").exists()


def test_an_evaluation_that_is_owed_is_the_one_that_stops_the_run(dpo_recipe: dict[str, Any], train: Run) -> None:
    stopping = FIRST | {"training.early_stopping": {"patience": 2}, "lora": {"r": 2}}
    whole = Path(train(dpo_recipe, stopping)["training"]["output_dir"])
    stopped = stopping | {"training.output_dir": f"{whole}-stopped"}

    def signalled() -> None:
        from dpoctl.tasks.recorder import Recorder

        advance = Recorder.advance

        def interrupt(self: Recorder, step: int) -> None:
            advance(self, step)
            if step == 5:
                os.kill(os.getpid(), signal.SIGTERM)

        Recorder.advance = interrupt  # type: ignore[method-assign]
        train(dpo_recipe, stopped)

    os.waitpid(fork(signalled), 0)
    resumed = Path(f"{whole}-stopped")
    assert not (resumed / "best.json").exists()
    train(dpo_recipe, stopped, resume=True)
    for name in ("adapter_model.safetensors", "best.json"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes()
    assert metrics_of(resumed)[-1]["step"] == 6


def test_a_best_checkpoint_that_is_damaged_is_not_exported(dpo_recipe: dict[str, Any], train: Run) -> None:
    changes = FIRST | {"training.num_train_epochs": 1}
    run = Path(train(dpo_recipe, changes)["training"]["output_dir"])
    before = (run / "model.safetensors").read_bytes()
    (run / "checkpoints" / "step-000002" / "weights.safetensors").write_bytes(b"")
    with pytest.raises(
        RunError, match=r"step-000002, the best checkpoint, is damaged: weights\.safetensors has 0 bytes"
    ):
        train(dpo_recipe, changes, resume=True)
    assert (run / "model.safetensors").read_bytes() == before
    train(dpo_recipe, changes | {"training.keep_best": None}, resume=True)
    assert (run / "model.safetensors").read_bytes() != before


@pytest.mark.parametrize(
    ("metric", "answer"),
    [
        ("eval_rewards/accuracy", "did you mean 'eval_rewards/accuracies'?"),
        ("loss", "did you mean 'eval_loss'?"),
        ("eval_loss_se", "did you mean 'eval_loss'?"),
        ("grad_norm", "the evaluations of this run report eval_loss, eval_rewards/chosen"),
    ],
)
def test_a_metric_that_no_evaluation_reports_is_refused_before_any_work(
    metric: str, answer: str, dpo_recipe: dict[str, Any], train: Run, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError) as refused:
        partial(train, dpo_recipe)({"training.keep_best": {"metric": metric, "mode": "max"}})
    (problem,) = refused.value.problems
    assert problem.message.startswith(f"training.keep_best.metric: no evaluation reports {metric!r}")
    assert answer in problem.message
    assert not (tmp_path / "run").exists()

"""The reference in whole runs, kept on disk, live or moving; and the first step, which must give what theory gives."""

import math
import os
import re
import signal
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from forked import Ended
from memory_store import MemoryStore, by_hand, random_pairs
from tiny_runs import metrics_of, write_recipe, write_rows
from transformers import AutoModelForCausalLM, PreTrainedModel

from dpoctl.core.logps import Scorer
from dpoctl.core.loop import evaluate
from dpoctl.core.objective import Objective
from dpoctl.core.planner import Lengths, Plan
from dpoctl.core.reader import Reader
from dpoctl.data.cache import cache_dir
from dpoctl.errors import DataError, RunError
from dpoctl.model.probe import ProbeResult
from dpoctl.recipe.schema import ReferenceSection
from dpoctl.runs import checkpoint
from dpoctl.tasks.reference import LiveReference, check_first_step, metrics_at_start
from dpoctl.tasks.task import PreferenceMetrics, Task, build_terms

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
    # Evaluation: none on either side, or the self-check would have found margins; the rest is known.
    assert (start["eval_loss"], start["eval_rewards/margins"]) == (pytest.approx(math.log(2), abs=1e-6), 0)
    assert not any("logps" in name or "accuracies" in name for name in start)
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


@pytest.mark.long("continue")
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


@pytest.mark.long("full")
@pytest.mark.usefixtures("_dropout")
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_with_a_moving_reference_resumes_to_the_same_bits(
    kind: str, dpo_recipe: dict[str, Any], train: Run
) -> None:
    from dpoctl.tasks.recorder import Recorder

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
        advance = Recorder.advance

        def kill(self: Recorder, step: int) -> None:
            advance(self, step)
            if step == 5:
                os.kill(os.getpid(), signal.SIGKILL)

        Recorder.advance = kill  # type: ignore[method-assign]
        try:
            train(dpo_recipe, changes | {"training.output_dir": str(killed)})
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    train(dpo_recipe, changes | {"training.output_dir": str(killed)}, resume=True)
    (weights,) = (path.name for path in whole.glob("*.safetensors"))
    assert (killed / weights).read_bytes() == (whole / weights).read_bytes()
    rows = [
        [{k: v for k, v in row.items() if k not in ("time", "tokens_per_second")} for row in metrics_of(r)]
        for r in (whole, killed)
    ]
    assert rows[0] == rows[1]


@pytest.mark.long("full")
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_with_a_moving_reference_give_the_curve_of_one(
    kind: str, dpo_recipe: dict[str, Any], train: Run, tmp_path: Path, in_fork: Callable[..., Ended]
) -> None:
    changes = KINDS[kind] | {"dpo.reference.sync_steps": 2, "training.num_train_epochs": 2}
    alone = out(train(dpo_recipe, changes))
    recipe = write_recipe(tmp_path / "recipe.yaml", dpo_recipe, changes | {"training.max_tokens_per_device": 100})
    in_fork("dpo", recipe, "--output-dir", tmp_path / "two", "--num-processes", "2")
    for one, two in zip(metrics_of(alone), metrics_of(tmp_path / "two"), strict=True):
        for name in one.keys() - {"time", "tokens_per_second"}:
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
    from dpoctl.tasks.finished_run import FinishedRun

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
    assert asked == [{"attn_implementation": "eager", "quantization": None, "trust_remote_code": True, "lazy": False}]


def against_itself(
    model: PreTrainedModel, spec: Any, *, shift: float = 0.0, count: int = 4
) -> tuple[Task, Objective, Plan, Reader]:
    """Compare a model with itself, its log-probabilities shifted by more and more."""
    examples = random_pairs(count)
    store: Any = MemoryStore(examples)
    with torch.no_grad():
        ref = by_hand(model, examples).numpy()
    reader = Reader(store, "shared", torch.device("cpu"), ref_logps=ref + shift * np.arange(len(ref), dtype=np.float32))
    terms = build_terms(spec)
    task = Task(terms, PreferenceMetrics(terms[0].loss))  # type: ignore[arg-type]
    scorer = Scorer(model, model, ProbeResult("shared", True, ""), confidence="confidence" in task.needs)
    objective = Objective(Accelerator(cpu=True), scorer, terms, task.report)
    return task, objective, Plan(Lengths.of(store), 4), reader


def check(model: PreTrainedModel, spec: Any, *, shift: float = 0.0, at_init: float | None = None) -> Task:
    task, objective, plan, reader = against_itself(model, spec, shift=shift)
    expected = task.at_init if at_init is None else at_init
    check_first_step(objective, plan, reader, expected, torch.float32)
    return task


def test_a_sum_of_losses_has_the_sum_of_their_values(
    tiny_llama: PreTrainedModel, capfd: pytest.CaptureFixture[str]
) -> None:
    mixture = [{"type": "sigmoid", "weight": 0.5}, {"type": "hinge"}, {"type": "beta_dpo", "weight": 2.0}]
    assert check(tiny_llama, mixture).at_init == pytest.approx(1 + 2.5 * np.log(2))
    assert re.search(r"first loss 2\.732\d+, expected 2\.732868", capfd.readouterr().err)


def test_margins_are_checked_where_the_value_depends_on_the_data(tiny_llama: PreTrainedModel) -> None:
    spec = {"type": "sigmoid", "sft_weight": 1.0}
    assert check(tiny_llama, spec).at_init is None
    with pytest.raises(RunError, match="margins must be 0"):
        check(tiny_llama, spec, shift=1.0)


def test_a_loss_that_is_not_its_equation_stops_the_run(tiny_llama: PreTrainedModel) -> None:
    with pytest.raises(RunError, match=r"must be 0\.800000, but it is 0\.693147"):
        check(tiny_llama, {"type": "sigmoid"}, at_init=0.8)


@pytest.mark.parametrize(
    "spec",
    [
        {"type": "sigmoid"},
        {"type": "sigmoid", "sft_weight": 1.0},
        [{"type": "ipo", "weight": 0.5}, {"type": "robust"}],
        {"type": "hinge"},
        {"type": "beta_dpo"},
        {"type": "aot"},
    ],
    ids=str,
)
def test_metrics_before_the_first_step_are_known_where_the_policy_is_its_reference(
    spec: Any, tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, objective, plan, reader = against_itself(tiny_llama, spec, count=12)
    one_pass = plan.one_pass(plan.lengths)
    computed = evaluate(objective, reader, one_pass)
    batches: list[Any] = []
    batch = Reader.batch
    monkeypatch.setattr(Reader, "batch", lambda self, records: batches.append(records) or batch(self, records))
    known = metrics_at_start(objective, one_pass, reader, "eval", task.at_init, torch.float32)
    assert known is not None
    assert known.keys() == computed.keys() - {"rewards/accuracies"}
    assert known == pytest.approx({name: computed[name] for name in known}, abs=2e-5)
    assert known["rewards/margins"] == 0
    assert len(batches) == 1
    assert len(batches[0]) < 12


def test_metrics_that_depend_on_more_are_computed(tiny_llama: PreTrainedModel) -> None:
    task, objective, plan, reader = against_itself(tiny_llama, {"type": "wpo"})
    assert metrics_at_start(objective, plan.one_pass(plan.lengths), reader, "eval", task.at_init, torch.float32) is None
    task, objective, plan, reader = against_itself(tiny_llama, {"type": "sigmoid", "sft_weight": 1.0})
    beside = replace(reader, ref_logps=None)
    objective.reference = LiveReference(objective._score_policy, nullcontext, None, ReferenceSection())
    assert metrics_at_start(objective, plan.one_pass(plan.lengths), beside, "eval", task.at_init, torch.float32) is None


def test_a_reference_that_differs_on_held_out_data_is_named(tiny_llama: PreTrainedModel) -> None:
    task, objective, plan, reader = against_itself(tiny_llama, {"type": "sigmoid"}, shift=1.0)
    with pytest.raises(RunError, match="all margins of eval set 'seen' must be 0"):
        metrics_at_start(objective, plan.one_pass(plan.lengths), reader, "seen", task.at_init, torch.float32)

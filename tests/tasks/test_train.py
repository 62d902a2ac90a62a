"""Whole runs in miniature: what they compute and what they leave behind."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from tiny_runs import metrics_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpoctl.data.cache import cache_dir
from dpoctl.errors import RunError, UsageError
from dpoctl.recipe import parse_recipe
from dpoctl.tasks import setup
from dpoctl.tasks import train as tasks_train
from dpoctl.tasks.fit import in_bytes
from dpoctl.tasks.footprint import states_of
from dpoctl.tasks.reference import Reference
from dpoctl.tasks.setup import Setup

Run = Callable[..., dict[str, Any]]
LORA = {"lora": {"r": 4, "lora_alpha": 8}}


def final_logps(folder: Path | str) -> torch.Tensor:
    """Log-probabilities of a fixed answer under an exported model, in plain transformers and peft."""
    folder = Path(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if (folder / "adapter_config.json").is_file():
        base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer("the paper proposes a method, of course", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return logits.gather(1, ids[0, 1:, None])[:, 0]


@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "lora"])
def test_dpo_starts_at_ln_2_and_learns(dpo_recipe: dict[str, Any], changes: dict[str, Any], train: Run) -> None:
    recipe = train(dpo_recipe, changes | {"training.num_train_epochs": 4})
    rows = metrics_of(recipe["training"]["output_dir"])
    start = next(row for row in rows if row["step"] == 0)
    assert start["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert start["eval_rewards/margins"] == 0
    assert "eval_rewards/accuracies" not in start
    assert start["eval_logps/chosen"] < -1
    first = next(row for row in rows if row["step"] == 1)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    end = [row for row in rows if "eval_loss" in row][-1]
    assert end["eval_loss"] < 0.65
    assert end["eval_rewards/accuracies"] > 0.8


def test_sft_lowers_the_loss_of_the_chosen_answers(sft_recipe: dict[str, Any], train: Run) -> None:
    recipe = train(sft_recipe, {"training.num_train_epochs": 4})
    losses = [row["eval_loss"] for row in metrics_of(recipe["training"]["output_dir"]) if "eval_loss" in row]
    assert losses[-1] < 0.7 * losses[0]


def test_a_run_directory_holds_what_it_should(dpo_recipe: dict[str, Any], train: Run) -> None:
    run = Path(train(dpo_recipe, {"training.save_steps": 2})["training"]["output_dir"])
    names = {path.name for path in run.iterdir()}
    assert names >= {
        "recipe.yaml", "recipe.resolved.yaml", "env.json", "data_report.json", "rejects.jsonl", "metrics.jsonl",
        "checkpoints", "LATEST", "model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja",
    }  # fmt: skip
    assert (run / "LATEST").read_text().strip().endswith("step-000005")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000004", "step-000005"]
    assert [row["step"] for row in metrics_of(run) if "loss" in row] == [1, 2, 3, 4, 5]
    assert AutoTokenizer.from_pretrained(run).chat_template


@pytest.mark.parametrize("method", ["sft", "dpo"])
@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "lora"])
def test_the_exported_model_is_the_trained_one(
    method: str, changes: dict[str, Any], dpo_recipe: dict[str, Any], train: Run
) -> None:
    from dpoctl.tasks import recorder

    trained: list[torch.Tensor] = []
    exit_recorder = recorder.Recorder.__exit__

    def spy(self: Any, *exception: Any) -> None:
        exit_recorder(self, *exception)
        causal = self._policy.causal.eval()
        tokenizer = AutoTokenizer.from_pretrained(dpo_recipe["model"]["model_name_or_path"])
        ids = tokenizer("the paper proposes a method, of course")["input_ids"]
        from dpoctl.model.attention import use_attention

        with torch.no_grad(), use_attention(causal, "sdpa"):
            logits = causal(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        trained.append(logits.gather(1, torch.tensor(ids)[1:, None])[:, 0])

    recorder.Recorder.__exit__ = spy  # type: ignore[method-assign]
    try:
        recipe = train(dpo_recipe | {"method": method}, changes)
    finally:
        recorder.Recorder.__exit__ = exit_recorder  # type: ignore[method-assign]
    torch.testing.assert_close(final_logps(recipe["training"]["output_dir"]), trained[0], rtol=0, atol=1e-5)


def test_dpo_over_an_sft_adapter_starts_at_the_adapter(
    sft_recipe: dict[str, Any], dpo_recipe: dict[str, Any], train: Run, tmp_path: Path
) -> None:
    sft = train(sft_recipe, LORA | {"training.output_dir": str(tmp_path / "sft")})["training"]["output_dir"]
    before = final_logps(sft)
    for start in ("new", "continue"):
        lora = {"start": "new", "r": 3, "lora_alpha": 5} if start == "new" else {"start": "continue"}
        changes = {"model.model_name_or_path": sft, "lora": lora, "training.output_dir": str(tmp_path / start)}
        recipe = train(dpo_recipe, changes)
        rows = metrics_of(recipe["training"]["output_dir"])
        assert rows[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert rows[-1]["eval_loss"] < rows[0]["eval_loss"]
        after = final_logps(recipe["training"]["output_dir"])
        assert float((after - before).abs().max()) > 0


@pytest.mark.parametrize("mode", ["cached", "live"])
@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "lora"])
def test_reference_modes_agree(mode: str, changes: dict[str, Any], dpo_recipe: dict[str, Any], train: Run) -> None:
    auto = metrics_of(train(dpo_recipe, changes)["training"]["output_dir"])
    out = dpo_recipe["training"]["output_dir"] + "-" + mode
    other = train(dpo_recipe, changes | {"dpo.reference.mode": mode, "training.output_dir": out})
    for one, two in zip(auto, metrics_of(other["training"]["output_dir"]), strict=True):
        for name in ("loss", "eval_loss", "rewards/margins"):
            assert one.get(name, 0) == pytest.approx(two.get(name, 0), abs=1e-5)


def test_another_model_can_be_the_reference(
    dpo_recipe: dict[str, Any], sft_recipe: dict[str, Any], train: Run, tmp_path: Path
) -> None:
    sft = train(sft_recipe, {"training.output_dir": str(tmp_path / "sft")})["training"]["output_dir"]
    rows = metrics_of(train(dpo_recipe, {"dpo.reference.path": sft})["training"]["output_dir"])
    assert abs(rows[0]["eval_rewards/margins"]) > 1e-3


def test_the_reference_is_computed_once_for_all_runs_with_the_same_key(
    dpo_recipe: dict[str, Any], train: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    train(dpo_recipe)
    assert "computing log-probabilities" in capfd.readouterr().err
    tables = {path.name: path.stat().st_mtime_ns for path in (cache_dir() / "reference").iterdir()}
    out = dpo_recipe["training"]["output_dir"]
    sweep = {"training.learning_rate": 1e-4, "dpo.loss.beta": 0.5, "training.output_dir": out + "-2"}
    train(dpo_recipe, sweep)
    assert "computing log-probabilities" not in capfd.readouterr().err
    assert tables == {path.name: path.stat().st_mtime_ns for path in (cache_dir() / "reference").iterdir()}
    train(dpo_recipe, sweep | {"data.max_length": 100, "training.output_dir": out + "-3"})
    assert len(tables) < len(list((cache_dir() / "reference").iterdir()))


def test_a_wrong_reference_stops_the_run_before_its_first_step(
    dpo_recipe: dict[str, Any], train: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpoctl.tasks.reference import Reference

    table = Reference.table

    def shifted(self: Reference, *arguments: Any) -> Any:
        right = table(self, *arguments)
        return {name: column - np.arange(len(column), dtype=np.float32) for name, column in right.items()}

    monkeypatch.setattr(Reference, "table", shifted)
    with pytest.raises(RunError, match="self-check"):
        train(dpo_recipe)


def test_an_output_directory_is_never_mixed_with_another_run(dpo_recipe: dict[str, Any], train: Run) -> None:
    train(dpo_recipe)
    with pytest.raises(UsageError, match="not empty"):
        train(dpo_recipe)
    train(dpo_recipe, overwrite=True)


def test_a_finished_run_resumed_changes_nothing(dpo_recipe: dict[str, Any], train: Run) -> None:
    run = Path(train(dpo_recipe)["training"]["output_dir"])
    before = (run / "model.safetensors").read_bytes(), (run / "metrics.jsonl").read_text()
    train(dpo_recipe, resume=True)
    assert before == ((run / "model.safetensors").read_bytes(), (run / "metrics.jsonl").read_text())


def test_several_eval_sets_keep_their_metrics_apart(
    dpo_recipe: dict[str, Any], pairs: Path, heldout: Path, train: Run
) -> None:
    recipe = train(dpo_recipe, {"data.eval": {"seen": [{"path": str(pairs)}], "eval": [{"path": str(heldout)}]}})
    last = metrics_of(recipe["training"]["output_dir"])[-2:]
    merged = last[0] | last[1]
    assert merged["eval_loss"] != merged["eval_seen_loss"]


@pytest.mark.long("adamw")
@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
def test_weights_in_bfloat16_learn_as_much_as_in_float32(dpo_recipe: dict[str, Any], optim: str, train: Run) -> None:
    """The same steps, and none of them lost to rounding; weights, moments and the exported model are bfloat16."""
    ends = {}
    for dtype in ("float32", "bfloat16"):
        changes = {
            "model.dtype": "bfloat16",
            "training.param_dtype": dtype,
            "training.optim": optim,
            "training.learning_rate": 3e-4,
            "training.num_train_epochs": 4,
            "training.save_steps": 2,
            "training.output_dir": f"{dpo_recipe['training']['output_dir']}-{dtype}",
        }
        run = Path(train(dpo_recipe, changes)["training"]["output_dir"])
        ends[dtype] = [row["eval_loss"] for row in metrics_of(run) if "eval_loss" in row][-1]
    assert ends["bfloat16"] == pytest.approx(ends["float32"], abs=0.02)
    assert ends["float32"] < 0.67
    (newest, *_) = sorted((run / "checkpoints").glob("step-*"), reverse=True)
    for file in (newest / "weights.safetensors", run / "model.safetensors"):
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
    optimizer = load_file(newest / "optimizer.safetensors").values()
    assert {tensor.dtype for tensor in optimizer if tensor.numel() > 1} == {
        "adamw": {torch.bfloat16},
        "adamw_8bit": {torch.uint8, torch.float32},
    }[optim]


def test_weights_in_bfloat16_resume_to_the_same_bits(dpo_recipe: dict[str, Any], train: Run) -> None:
    changes = {"model.dtype": "bfloat16", "training.param_dtype": "bfloat16", "training.save_steps": 2}
    whole = Path(train(dpo_recipe, changes)["training"]["output_dir"])
    expected = (whole / "model.safetensors").read_bytes()
    for file in [*whole.glob("checkpoints/step-000005/*"), whole / "model.safetensors"]:
        file.unlink()
    train(dpo_recipe, changes, resume=True)
    assert (whole / "model.safetensors").read_bytes() == expected


def test_a_live_reference_is_loaded_before_the_token_budget(
    dpo_recipe: dict[str, Any], train: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it takes is not free any more."""
    order: list[str] = []
    live, budget = Reference.live, Setup.estimate
    monkeypatch.setattr(Reference, "live", lambda self: order.append("live") or live(self))
    monkeypatch.setattr(Setup, "estimate", lambda self, store: order.append("budget") or budget(self, store))
    train(dpo_recipe, {"dpo.reference.mode": "live", "training.max_steps": 1})
    assert order[:2] == ["live", "budget"]


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_states_that_do_not_fit_are_refused_before_data_are_read(
    method: str, dpo_recipe: dict[str, Any], train: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A parameter has 16 bytes; of half as many, 6 fit, and what the message adds up is what is missing."""
    recipe = dpo_recipe | {"method": method}
    states = states_of(parse_recipe(yaml.safe_dump(recipe), "recipe.yaml", command=method), None, torch.float32)
    total = sum(states.values())
    monkeypatch.setattr(tasks_train, "read_data", lambda *_, **__: pytest.fail("data were read"))
    monkeypatch.setattr(setup, "free_bytes", lambda device: total / 2)
    with pytest.raises(UsageError, match=r"the run does not fit on this cpu: .*together") as refusal:
        train(recipe)
    assert refusal.value.exit_code == 2
    message = str(refusal.value)
    for name, size in states.items():
        assert f"{name} {in_bytes(size)}" in message
    assert f"together {in_bytes(total)}, of which {in_bytes(total / 2)} are there: {in_bytes(total / 2)} too" in message
    assert "set one of: training.param_dtype: bfloat16 and training.optim: adamw_8bit (" in message
    assert ": fits)" in message

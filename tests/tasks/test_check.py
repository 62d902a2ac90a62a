"""`dpoctl check` on real files: what data, tokenizer and model show that a recipe alone does not."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import build_tiny
from tiny_runs import command, merge, pair_rows, run_command, write_rows
from transformers import PreTrainedTokenizerFast

from dpoctl.core.losses import LOSSES
from dpoctl.data.formats import FORMATS
from dpoctl.recipe import examine_recipe
from dpoctl.recipe.advice import Finding, advise
from dpoctl.tasks.check import look


def check(recipe: dict[str, Any], changes: dict[str, Any] | None = None) -> dict[str, Finding]:
    """The findings of a recipe by their codes."""
    seen = examine_recipe(yaml.safe_dump(merge(recipe, changes or {})), "r.yaml", losses=LOSSES, formats=FORMATS)
    assert seen.recipe is not None
    facts = look(seen.recipe, is_sound=not seen.problems)
    return {one.code: one for one in advise(seen.recipe, seen.document, facts, seen.problems)}


@pytest.fixture
def save_model(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Any:
    """Save a tiny model of an architecture with its tokenizer, and with changes to its config."""

    def save(model_type: str, **changes: Any) -> str:
        folder = tmp_path / model_type
        build_tiny(model_type).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        config = folder / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | changes))
        return str(folder)

    return save


def test_data_and_model_are_looked_at_and_nothing_is_trained(dpo_recipe: dict[str, Any]) -> None:
    found = check(dpo_recipe)
    assert set(found) == {"lr-high-full", "few-steps", "eval-small"}
    assert "23 rows in steps of 5" in found["few-steps"].message
    assert "7 pairs in eval set 'eval'" in found["eval-small"].message
    assert not Path(dpo_recipe["training"]["output_dir"]).exists()


def test_the_rows_of_a_wrong_recipe_are_counted_all_the_same(dpo_recipe: dict[str, Any]) -> None:
    found = check(dpo_recipe, {"data": {"max_prompt_length": 256}, "training": {"max_steps": 46}})
    assert found["recipe"].grade == "error"
    assert "over 23 rows is 10 epochs" in found["epochs"].message


def test_targets_of_another_architecture_are_named(dpo_recipe: dict[str, Any], save_model: Any) -> None:
    targets = ["k_proj", "gate_proj", "v_proj", "up_proj", "q_proj", "o_proj", "down_proj"]
    changes = {"model.model_name_or_path": save_model("mixtral"), "lora": {"r": 4, "target_modules": targets}}
    found = check(dpo_recipe, changes)["targets"]
    assert found.grade == "warning"
    assert "gate_proj, up_proj, down_proj in lora.target_modules match nothing" in found.message
    assert "its linear layers are k_proj, o_proj, q_proj, v_proj" in found.message


def test_targets_that_all_match_nothing_are_an_error_at_their_key(dpo_recipe: dict[str, Any], save_model: Any) -> None:
    changes = {"model.model_name_or_path": save_model("llama"), "lora": {"target_modules": ["c_attn"]}}
    found = check(dpo_recipe, changes)["refused"]
    assert (found.grade, found.key) == ("error", "lora.target_modules")
    assert "nothing in this model is c_attn" in found.message


def test_a_model_with_another_head_is_an_error(dpo_recipe: dict[str, Any], save_model: Any) -> None:
    model = save_model("llama", architectures=["LlamaForSequenceClassification"])
    found = check(dpo_recipe, {"model.model_name_or_path": model})["refused"]
    assert (found.grade, found.key) == ("error", "model.model_name_or_path")
    assert "LlamaForSequenceClassification: it has no causal head" in found.message


def test_control_tokens_that_lora_would_leave_untrained_are_an_error(
    dpo_recipe: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = without_chatml(tmp_path, tokenizer)
    found = check(dpo_recipe, {"model": {"model_name_or_path": folder, "chat_template": "chatml"}, "lora": {"r": 4}})
    assert (found["refused"].grade, found["refused"].key) == ("error", "model.chat_template")
    assert "LoRA alone would leave new ones untrained" in found["refused"].message


def test_control_tokens_of_the_models_own_template_must_be_single_tokens(
    dpo_recipe: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    found = check(dpo_recipe, {"model.model_name_or_path": without_chatml(tmp_path, tokenizer)})["control-tokens"]
    assert found.grade == "warning"
    assert found.message.startswith("<|im_start|>, <|im_end|> of the chat template are several tokens each")


def without_chatml(folder: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    """A model whose template writes ChatML, and whose tokenizer never saw it."""
    build_tiny("llama").save_pretrained(folder / "spelt")
    text = tokenizer.backend_tokenizer.to_str().replace("im_start", "im_begin").replace("im_end", "im_stop")
    from tokenizers import Tokenizer

    spelt = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text), eos_token="<|im_stop|>", pad_token="<|pad|>"
    )
    spelt.chat_template = tokenizer.chat_template
    spelt.save_pretrained(folder / "spelt")
    return str(folder / "spelt")


def test_messages_that_hold_a_rendered_conversation_are_found(dpo_recipe: dict[str, Any], tmp_path: Path) -> None:
    rows = pair_rows(12)
    for row in rows:
        row["prompt"][0]["content"] = (
            f"<|im_start|>user\n{row['prompt'][0]['content']}<|im_end|>\n<|im_start|>assistant\n"
        )
    path = write_rows(tmp_path / "rendered.jsonl", rows)
    found = check(dpo_recipe, {"data.train": [{"path": str(path)}]})["rendered-rows"]
    assert found.grade == "warning"
    assert found.message.startswith("12 of 12 rows are messages that hold marks such as <|im_start|>")


def as_text(prompt: str) -> list[dict[str, str]]:
    return [{"prompt": f"{prompt}{n}?", "chosen": f"no {n}", "rejected": f"yes {n}"} for n in range(12)]


def test_text_that_was_rendered_part_by_part_is_found(dpo_recipe: dict[str, Any], tmp_path: Path) -> None:
    twice = "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>system\n4/16<|im_end|>\n<|im_start|>user\n"
    path = write_rows(tmp_path / "twice.jsonl", as_text(twice))
    found = check(dpo_recipe, {"data.train": [{"path": str(path)}]})
    assert "12 of 12 rows begin twice" in found["rendered-twice"].message
    assert "plain-text" not in found


def test_plain_text_for_a_chat_model_is_noted(dpo_recipe: dict[str, Any], tmp_path: Path) -> None:
    path = write_rows(tmp_path / "text.jsonl", as_text("How much is "))
    assert check(dpo_recipe, {"data.train": [{"path": str(path)}]})["plain-text"].grade == "note"


def test_rows_that_do_not_fit_are_counted(dpo_recipe: dict[str, Any]) -> None:
    found = check(dpo_recipe, {"data.max_length": 56})["rows-dropped"]
    assert found.key == "data.max_length"
    assert "too_long" in found.message
    cut = check(dpo_recipe, {"data.max_length": 56, "data.overlong": "truncate"})["answers-cut"]
    assert cut.key == "data.max_length"


def test_a_length_beyond_the_models_positions_is_found(dpo_recipe: dict[str, Any], save_model: Any) -> None:
    model = save_model("llama", max_position_embeddings=64)
    assert "the 64 positions" in check(dpo_recipe, {"model.model_name_or_path": model})["context"].message


def test_what_is_out_of_reach_is_noted_and_what_is_missing_is_an_error(dpo_recipe: dict[str, Any]) -> None:
    found = check(dpo_recipe, {"model.model_name_or_path": "nobody/nothing"})
    assert (found["not-seen"].grade, found["not-seen"].key) == ("note", "model.model_name_or_path")
    assert "23 rows" in found["few-steps"].message
    missing = check(dpo_recipe, {"data.eval": [{"path": "./gone.jsonl"}]})["refused"]
    assert (missing.grade, missing.key) == ("error", "data.eval.eval[0]")


@pytest.fixture
def recipe_file(dpo_recipe: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(dpo_recipe, sort_keys=False))
    return path


def test_the_command_prints_findings_and_ends_with_two_when_there_is_an_error(recipe_file: Path) -> None:
    done = run_command(command("check", recipe_file, "--no-data"))
    line = next(line for line in done.stdout.splitlines() if "learning_rate" in line)
    assert line.startswith(f"{recipe_file}:")
    assert ": note: learning_rate 1e-3" in line or ": warning: learning_rate 1e-3" in line
    failed = run_command(command("check", recipe_file, "max_prompt_length=256", "--json"), check=False)
    assert failed.returncode == 2
    report = json.loads(failed.stdout)
    (error,) = [one for one in report["findings"] if one["grade"] == "error"]
    assert error["override"] == 1
    assert report["counts"]["error"] == 1
    refused = run_command(command("check", recipe_file, "--set", "method=[", "--no-data"), check=False)
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr


def test_every_run_says_its_warnings_once_and_reports_them(recipe_file: Path, dpo_recipe: dict[str, Any]) -> None:
    done = run_command(command("dpo", recipe_file))
    assert done.stderr.count("learning_rate 1e-3 is high") == 1
    assert f"{recipe_file}:" in done.stderr
    assert "plain-text" not in done.stderr
    kept = json.loads((Path(dpo_recipe["training"]["output_dir"]) / "advice.json").read_text())
    assert {"lr-high-full", "few-steps", "eval-small"} == {one["code"] for one in kept}
    assert all(one["line"] for one in kept)
    report = (Path(dpo_recipe["training"]["output_dir"]) / "report.html").read_text()
    assert "learning_rate 1e-3 is high" in report
    assert "Reward accuracy" in report

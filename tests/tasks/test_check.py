"""`dpoctl check` on real files: what data, tokenizer and model show that a recipe alone does not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import build_tiny
from forked import Ended
from tiny_runs import merge, pair_rows, write_rows
from transformers import PreTrainedTokenizerFast

from dpoctl.recipe import examine_recipe
from dpoctl.recipe.advice import advise
from dpoctl.recipe.diagnostics import Diagnostic, dotted
from dpoctl.tasks.check import gather_facts


def check(recipe: dict[str, Any], changes: dict[str, Any] | None = None) -> dict[str, Diagnostic]:
    """The findings of a recipe by their codes."""
    seen = examine_recipe(yaml.safe_dump(merge(recipe, changes or {})), "r.yaml")
    assert seen.recipe is not None
    facts = gather_facts(seen.recipe, is_sound=not seen.problems)
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
    assert "(23 rows, global_batch_size 5)" in found["few-steps"].message
    assert "eval set 'eval' has 7 pairs" in found["eval-small"].message
    assert not Path(dpo_recipe["training"]["output_dir"]).exists()


def test_the_rows_of_a_wrong_recipe_are_counted_all_the_same(dpo_recipe: dict[str, Any]) -> None:
    found = check(dpo_recipe, {"data": {"max_prompt_length": 256}, "training": {"max_steps": 46}})
    assert found["recipe"].severity == "error"
    assert "over 23 rows is 10 epochs" in found["epochs"].message


def test_targets_of_another_architecture_are_named(dpo_recipe: dict[str, Any], save_model: Any) -> None:
    targets = ["k_proj", "gate_proj", "v_proj", "up_proj", "q_proj", "o_proj", "down_proj"]
    changes = {"model.model_name_or_path": save_model("mixtral"), "lora": {"r": 4, "target_modules": targets}}
    found = check(dpo_recipe, changes)["targets"]
    assert found.severity == "warning"
    assert "lora.target_modules gate_proj, up_proj, down_proj match no layer of the model" in found.message
    assert "its linear layers are k_proj, o_proj, q_proj, v_proj" in found.message


def test_targets_that_all_match_nothing_are_an_error_at_their_key(dpo_recipe: dict[str, Any], save_model: Any) -> None:
    changes = {"model.model_name_or_path": save_model("llama"), "lora": {"target_modules": ["c_attn"]}}
    found = check(dpo_recipe, changes)["refused"]
    assert (found.severity, dotted(found.path)) == ("error", "lora.target_modules")
    assert "no module of this model matches c_attn" in found.message


def test_a_model_with_another_head_is_an_error(dpo_recipe: dict[str, Any], save_model: Any) -> None:
    model = save_model("llama", architectures=["LlamaForSequenceClassification"])
    found = check(dpo_recipe, {"model.model_name_or_path": model})["refused"]
    assert (found.severity, dotted(found.path)) == ("error", "model.model_name_or_path")
    assert "LlamaForSequenceClassification: it has no causal head" in found.message


def test_control_tokens_that_lora_would_leave_untrained_are_an_error(
    dpo_recipe: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = without_chatml(tmp_path, tokenizer)
    found = check(dpo_recipe, {"model": {"model_name_or_path": folder, "chat_template": "chatml"}, "lora": {"r": 4}})
    assert (found["refused"].severity, dotted(found["refused"].path)) == ("error", "model.chat_template")
    assert "LoRA alone would leave new ones untrained" in found["refused"].message


def test_control_tokens_of_the_models_own_template_must_be_single_tokens(
    dpo_recipe: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    found = check(dpo_recipe, {"model.model_name_or_path": without_chatml(tmp_path, tokenizer)})["control-tokens"]
    assert found.severity == "warning"
    assert found.message.startswith("the tokenizer splits <|im_start|>, <|im_end|> of the chat template into several")


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
    assert found.severity == "warning"
    assert found.message.startswith("12 of 12 rows are messages with template tokens such as <|im_start|>")


def as_text(prompt: str) -> list[dict[str, str]]:
    return [{"prompt": f"{prompt}{n}?", "chosen": f"no {n}", "rejected": f"yes {n}"} for n in range(12)]


def test_text_that_was_rendered_part_by_part_is_found(dpo_recipe: dict[str, Any], tmp_path: Path) -> None:
    twice = "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>system\n4/16<|im_end|>\n<|im_start|>user\n"
    path = write_rows(tmp_path / "twice.jsonl", as_text(twice))
    found = check(dpo_recipe, {"data.train": [{"path": str(path)}]})
    assert "12 of 12 rows start a conversation twice" in found["rendered-twice"].message
    assert "plain-text" not in found


def test_plain_text_for_a_chat_model_is_noted(dpo_recipe: dict[str, Any], tmp_path: Path) -> None:
    path = write_rows(tmp_path / "text.jsonl", as_text("How much is "))
    found = check(dpo_recipe, {"data.train": [{"path": str(path)}]})["plain-text"]
    assert found.severity == "note"
    assert "format_options: {as: messages}" in found.message
    as_messages = {"path": str(path), "format_options": {"as": "messages"}}
    assert "plain-text" not in check(dpo_recipe, {"data.train": [as_messages]})


def test_rows_that_do_not_fit_are_counted(dpo_recipe: dict[str, Any]) -> None:
    found = check(dpo_recipe, {"data.max_length": 56})["rows-dropped"]
    assert dotted(found.path) == "data.max_length"
    assert "too_long" in found.message
    cut = check(dpo_recipe, {"data.max_length": 56, "data.overlong": "truncate"})["answers-cut"]
    assert dotted(cut.path) == "data.max_length"


def test_eval_rows_that_do_not_fit_are_counted_too(dpo_recipe: dict[str, Any], tmp_path: Path) -> None:
    long = [row | {"prompt": [{"role": "user", "content": "paper " * 90}]} for row in pair_rows(30, seed=3)]
    path = write_rows(tmp_path / "long.jsonl", [*long, *pair_rows(5, seed=4)])
    found = check(dpo_recipe, {"data.eval": {"long": [str(path)]}})["rows-dropped"]
    assert found.message == "86% of the rows of eval set 'long' are dropped: 30 too_long"
    assert dotted(found.path) == "data.max_length"
    unlike = [row | {"chosen": row["rejected"]} for row in pair_rows(30, seed=3)]
    path = write_rows(tmp_path / "same.jsonl", [*unlike, *pair_rows(5, seed=4)])
    found = check(dpo_recipe, {"data.eval": {"same": [str(path)]}})["rows-dropped"]
    assert dotted(found.path) == "data.eval.same"


def test_lengths_are_told_of_all_pairs_and_not_of_the_first_step(dpo_recipe: dict[str, Any], tmp_path: Path) -> None:
    def rows(longer: str, count: int) -> list[dict[str, Any]]:
        words = {side: "word " * (12 if side == longer else 3) for side in ("chosen", "rejected")}
        answers = {side: [{"role": "assistant", "content": f"{side} {text}"}] for side, text in words.items()}
        return [row | answers for row in pair_rows(count)]

    first_rows = write_rows(tmp_path / "first.jsonl", rows("chosen", 5) + rows("rejected", 18))
    assert "length-decides" not in check(dpo_recipe, {"data.train": [str(first_rows)]})
    all_rows = write_rows(tmp_path / "all.jsonl", rows("chosen", 23))
    assert "over 23 pairs" in check(dpo_recipe, {"data.train": [str(all_rows)]})["length-decides"].message


def test_a_length_beyond_the_models_positions_is_found(dpo_recipe: dict[str, Any], save_model: Any) -> None:
    model = save_model("llama", max_position_embeddings=64)
    assert (
        "the context length of the model, 64"
        in check(dpo_recipe, {"model.model_name_or_path": model})["context"].message
    )


def test_what_is_out_of_reach_is_noted_and_what_is_missing_is_an_error(dpo_recipe: dict[str, Any]) -> None:
    found = check(dpo_recipe, {"model.model_name_or_path": "nobody/nothing"})
    assert (found["not-seen"].severity, dotted(found["not-seen"].path)) == ("note", "model.model_name_or_path")
    assert "23 rows" in found["few-steps"].message
    missing = check(dpo_recipe, {"data.eval": [{"path": "./gone.jsonl"}]})["refused"]
    assert (missing.severity, dotted(missing.path)) == ("error", "data.eval.eval[0]")


@pytest.fixture
def recipe_file(dpo_recipe: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(dpo_recipe, sort_keys=False))
    return path


def test_the_command_prints_findings_and_ends_with_two_when_there_is_an_error(
    recipe_file: Path, in_fork: Callable[..., Ended]
) -> None:
    done = in_fork("check", recipe_file, "--no-data")
    line = next(line for line in done.out.splitlines() if "learning_rate" in line)
    assert line.startswith(f"{recipe_file}:")
    assert ": note: learning_rate 1e-3" in line or ": warning: learning_rate 1e-3" in line
    failed = in_fork("check", recipe_file, "max_prompt_length=256", "--json", code=2)
    report = json.loads(failed.out)
    (error,) = [one for one in report["findings"] if one["grade"] == "error"]
    assert error["override"] == 1
    assert report["counts"]["error"] == 1
    refused = in_fork("check", recipe_file, "--set", "method=[", "--no-data", code=2)
    assert "Traceback" not in refused.err


def test_every_run_says_its_warnings_once_and_reports_them(
    recipe_file: Path, dpo_recipe: dict[str, Any], in_fork: Callable[..., Ended]
) -> None:
    done = in_fork("dpo", recipe_file)
    assert done.err.count("learning_rate 1e-3 is high") == 1
    assert f"{recipe_file}:" in done.err
    assert "plain-text" not in done.err
    kept = json.loads((Path(dpo_recipe["training"]["output_dir"]) / "advice.json").read_text())
    assert {"lr-high-full", "few-steps", "eval-small"} == {one["code"] for one in kept}
    assert all(one["line"] for one in kept)
    report = (Path(dpo_recipe["training"]["output_dir"]) / "report.html").read_text()
    assert "learning_rate 1e-3 is high" in report
    assert "Reward accuracy" in report


def test_warnings_end_a_strict_check_and_notes_are_left_out_of_a_quiet_one(
    recipe_file: Path, in_fork: Callable[..., Ended]
) -> None:
    def call(*arguments: str, code: int = 0) -> Ended:
        return in_fork("check", recipe_file, "--no-data", *arguments, code=code)

    noted, warned = "learning_rate=1e-5", "num_train_epochs=9"
    usual = call(noted)
    assert ": note: " in usual.out
    assert ": warning: " not in usual.out
    call(noted, "--strict")
    call(noted, warned)
    call(noted, warned, "--strict", code=2)
    quiet = call(noted, warned, "--quiet")
    assert ": note: " not in quiet.out
    assert ": warning: " in quiet.out
    assert call(noted, "--quiet", "--strict") == (0, "", "")

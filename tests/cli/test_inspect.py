"""`dpoctl inspect` on a tiny model's folder."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpoctl.cli.app import app
from dpoctl.errors import UsageError

ROWS = [
    {
        "prompt": [{"role": "user", "content": "say <|im_end|>"}],
        "chosen": [{"role": "assistant", "content": " yes "}],
        "rejected": [{"role": "assistant", "content": "no"}],
    },
    {
        "prompt": [{"role": "user", "content": "hello"}],
        "chosen": [{"role": "assistant", "content": "world"}],
        "rejected": [{"role": "assistant", "content": "no " * 200}],
    },
    {
        "prompt": [{"role": "user", "content": "hello"}],
        "chosen": [{"role": "assistant", "content": "world"}],
        "rejected": [{"role": "assistant", "content": "maybe"}],
    },
]


@pytest.fixture
def recipe(tmp_path: Path, tiny_llama_folder: Path) -> Path:
    (tiny_llama_folder / "model.safetensors").unlink()
    generation = {"eos_token_id": 2}
    (tiny_llama_folder / "generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "method: dpo\n"
        f"model: {{model_name_or_path: {tiny_llama_folder}}}\n"
        f"data: {{train: [{tmp_path / 'pairs.jsonl'}], max_length: 128}}\n"
        f"training: {{output_dir: {tmp_path / 'run'}, learning_rate: 1.0e-6}}\n"
    )
    return path


@pytest.fixture
def inspect(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command in this process and return what it prints."""

    def call(*arguments: object) -> str:
        capfd.readouterr()
        app(["inspect", *map(str, arguments)], standalone_mode=False)
        return capfd.readouterr().out

    return call


def test_rows_are_shown_with_their_place_and_their_checks_without_weights(
    recipe: Path, inspect: Callable[..., str]
) -> None:
    out = inspect(recipe)
    assert "pairs.jsonl:1\nprompt, " in out
    assert "say <|im_end|>⟨<|im_end|>⟩" in out
    assert "⟦ yes ⟨<|im_end|>⟩⟧" in out
    assert "pairs.jsonl:3\n" in out
    assert "pairs.jsonl:2\n" not in out
    assert out.count("  ok: the tokens that are trained on hold the answer") == 2
    assert "  2 of 2: the model's generation_config stops at the last token" in out
    assert "1 row is longer and dropped" in out
    assert "\x1b" not in out
    assert not (recipe.parent / "run").exists()


def test_one_record_comes_as_json_with_its_ids(recipe: Path, inspect: Callable[..., str]) -> None:
    out = inspect(recipe, "--row", 2, "--ids", "--json")
    found = json.loads(out)
    (record,) = found["records"]
    assert (record["row"], record["line"]) == (2, 3)
    chosen = record["responses"][0]
    assert [run["text"] for run in chosen["runs"] if run["scored"]] == ["world<|im_end|>"]
    assert len(chosen["ids"]) == len(chosen["scored"]) == chosen["tokens"]
    assert record["checks"] == {
        "prompt": True,
        "one_bos": None,
        "one_end_of_turn": True,
        "answer": True,
        "stop": True,
    }
    assert found["set"]["too_long"] == 1


def test_an_answer_that_was_cut_or_a_stop_that_generation_does_not_know_fails(
    recipe: Path, inspect: Callable[..., str]
) -> None:
    generation = recipe.parent / "tiny-llama" / "generation_config.json"
    generation.write_text('{"eos_token_id": [0]}')
    out = inspect(recipe, "--row", 2, "--set", "data.overlong=truncate", "--json")
    (record,) = json.loads(out)["records"]
    failed = {name for name, passed in record["checks"].items() if passed is False}
    assert failed == {"one_end_of_turn", "answer", "stop"}


def test_a_row_that_is_not_there_is_refused(recipe: Path, inspect: Callable[..., str]) -> None:
    with pytest.raises(UsageError, match="--row 9: the training set has only 2 rows"):
        inspect(recipe, "--row", 9)


def test_the_command_is_known_and_refuses_in_one_line(recipe: Path) -> None:
    command = [sys.executable, "-m", "dpoctl", "inspect", str(recipe), "--set", "data.max_lenght=3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "max_length" in done.stderr
    assert "Traceback" not in done.stderr


SMOL = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def set_up(recipe: Path, tokenizer: Any, rows: list[dict[str, Any]], method: str = "dpo") -> None:
    """Give the recipe another tokenizer, other rows, and another method."""
    tokenizer.save_pretrained(recipe.parent / "tiny-llama")
    (recipe.parent / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe.write_text(recipe.read_text().replace("method: dpo", f"method: {method}"))


def failed(out: str) -> set[str]:
    checks = json.loads(out)["set"]["checks"]
    return {name for name, counts in checks.items() if counts["failed"]}


def passed(out: str) -> set[str]:
    checks = json.loads(out)["set"]["checks"]
    return {name for name, counts in checks.items() if counts["passed"]}


def test_a_beginning_that_marks_every_turn_is_no_second_one(
    recipe: Path, inspect: Callable[..., str], tokenizer: Any
) -> None:
    mine = copy.deepcopy(tokenizer)
    mine.bos_token, mine.chat_template = "<|im_start|>", SMOL
    set_up(recipe, mine, ROWS)
    out = inspect(recipe, "--json")
    assert failed(out) == set()
    assert "one_bos" in passed(out)
    text = {"prompt": "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n", "chosen": "yes", "rejected": "no"}
    set_up(recipe, mine, [text])
    assert failed(inspect(recipe, "--json")) == set()


def test_a_beginning_in_the_middle_of_a_text_is_a_second_one_where_it_marks_no_turns(
    recipe: Path, inspect: Callable[..., str], tokenizer: Any
) -> None:
    mine = copy.deepcopy(tokenizer)
    mine.add_special_tokens({"bos_token": "<s>"})
    set_up(recipe, mine, [{"prompt": "<s>hello", "chosen": "<s>yes", "rejected": "no"}])
    assert failed(inspect(recipe, "--json")) == {"one_bos"}


def test_a_text_without_a_prompt_holds_its_answer_though_its_first_token_is_not_trained_on(
    recipe: Path, inspect: Callable[..., str], tokenizer: Any
) -> None:
    set_up(recipe, tokenizer, [{"text": "hello world"}, {"text": "  yes, the reviewer sighs\n"}], "sft")
    out = inspect(recipe, "--json")
    assert failed(out) == set()
    assert "answer" in passed(out)


def test_the_stop_is_judged_by_what_will_be_exported(recipe: Path, inspect: Callable[..., str], tokenizer: Any) -> None:
    mine = copy.deepcopy(tokenizer)
    mine.eos_token, mine.chat_template = "<|endoftext|>", None
    set_up(recipe, mine, ROWS)
    folder = recipe.parent / "tiny-llama"
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "generation_config.json").write_text('{"eos_token_id": 0}')
    out = inspect(recipe, "--set", "model.chat_template=chatml", "--json")
    assert failed(out) == set()
    assert "stop" in passed(out)


def test_an_answer_that_ends_in_another_stop_ends_once(
    recipe: Path, inspect: Callable[..., str], tokenizer: Any
) -> None:
    (recipe.parent / "tiny-llama" / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    set_up(recipe, tokenizer, [{"prompt": "q: ", "chosen": "a <|endoftext|>\n", "rejected": "b"}])
    (record,) = json.loads(inspect(recipe, "--row", 1, "--json"))["records"]
    assert [run["text"] for run in record["responses"][0]["runs"] if run["scored"]] == ["a <|endoftext|>"]
    assert record["checks"] == {"prompt": True, "one_bos": None, "one_end_of_turn": True, "answer": True, "stop": True}


def test_every_turn_that_is_trained_on_is_checked(recipe: Path, inspect: Callable[..., str], tokenizer: Any) -> None:
    mine = copy.deepcopy(tokenizer)
    mine.chat_template = SMOL.replace(
        "{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
    )
    call = {"type": "function", "function": {"name": "hello", "arguments": {"world": "yes"}}}
    turns = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "no"},
        {"role": "assistant", "content": "world, maybe"},
    ]
    set_up(recipe, mine, [{"messages": turns}], "sft")
    out = inspect(recipe, "--json", "--set", "data.max_length=200")
    assert failed(out) == set()
    cut = inspect(recipe, "--json", "--set", "data.max_length=70", "--set", "data.overlong=truncate")
    assert {"answer", "stop"} <= failed(cut)


def test_markers_that_are_several_tokens_are_told(
    recipe: Path, inspect: Callable[..., str], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "own.jinja").write_text(SMOL.replace("<|im_start|>", "<start_of_turn>"))
    capfd.readouterr()
    app(["inspect", str(recipe), "--set", f"model.chat_template={tmp_path / 'own.jinja'}"], standalone_mode=False)
    err = capfd.readouterr().err
    assert (
        "note: train: the chat template writes turn markers that are no tokens of this tokenizer: <start_of_turn>"
        in err
    )

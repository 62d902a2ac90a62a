"""`dpoctl inspect` on a tiny model's folder."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

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
    assert out.count("  ok: what is trained on holds the answer") == 2
    assert "  2 of 2: the model's generation_config stops at the last token" in out
    assert "1 rows are longer and dropped" in out
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
    with pytest.raises(UsageError, match="--row 9: the training set has 2 records"):
        inspect(recipe, "--row", 9)


def test_the_command_is_known_and_refuses_in_one_line(recipe: Path) -> None:
    command = [sys.executable, "-m", "dpoctl", "inspect", str(recipe), "--set", "data.max_lenght=3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "max_length" in done.stderr
    assert "Traceback" not in done.stderr

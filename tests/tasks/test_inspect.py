"""`--dry-run` tells what would be done, rightly, and does nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_runs import write_recipe, write_rows
from transformers import PreTrainedTokenizerFast

from dpoctl.data.cache import cache_dir
from dpoctl.tasks import train as task

Run = Callable[..., dict[str, Any]]
ROOT = Path(__file__).parents[2]
WORDS = ["paper", "reviewer", "method", "hello", "world", "france", "capital", "of", "sighs", "maybe"]


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """Five pairs of growing length; the last is far too long."""
    return [
        {
            "prompt": [{"role": "user", "content": " ".join(WORDS[:number])}],
            "chosen": [{"role": "assistant", "content": " ".join(WORDS[: number + 2])}],
            "rejected": [{"role": "assistant", "content": "hello " * (60 if number == 5 else 1) + "no"}],
        }
        for number in range(1, 6)
    ]


@pytest.fixture
def recipe(dpo_recipe: dict[str, Any], rows: list[dict[str, Any]], pairs: Path) -> dict[str, Any]:
    write_rows(pairs, rows)
    data = dpo_recipe["data"] | {"max_length": 100}
    return dpo_recipe | {"data": data, "training": dpo_recipe["training"] | {"global_batch_size": 3}}


def report(recipe: dict[str, Any], train: Run, capfd: pytest.CaptureFixture[str], **changes: Any) -> dict[str, Any]:
    train(recipe, changes, dry_run=True, json_output=True)
    out = capfd.readouterr().out
    assert out.count("\n") == 1
    numbers: dict[str, Any] = json.loads(out)
    return numbers


def test_nothing_is_trained_and_nothing_written_to_the_output_directory(
    recipe: dict[str, Any], train: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a dry run loads no weights")

    monkeypatch.setattr(task, "load_policy", refuse)
    monkeypatch.setattr(torch.nn.Module, "__call__", refuse)
    train(recipe, dry_run=True)
    assert not Path(recipe["training"]["output_dir"]).exists()
    assert {path.name for path in cache_dir().iterdir()} == {"tokens"}


def test_a_run_that_is_there_is_left_alone(recipe: dict[str, Any], train: Run) -> None:
    run = Path(train(recipe)["training"]["output_dir"])
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    train(recipe, dry_run=True)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_rows_steps_and_lengths_are_those_counted_by_hand(
    recipe: dict[str, Any],
    rows: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerFast,
    train: Run,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    def prompt(row: dict[str, Any]) -> str:
        return f"<|im_start|>user\n{row['prompt'][0]['content']}<|im_end|>\n<|im_start|>assistant\n"

    def answers(side: str) -> list[int]:
        return [tokens(row[side][0]["content"] + "<|im_end|>") for row in used]

    used = rows[:4]
    prompts, chosen, rejected = [tokens(prompt(row)) for row in used], answers("chosen"), answers("rejected")
    assert chosen == sorted(set(chosen))
    numbers = report(recipe, train, capfd, **{"training.num_train_epochs": 2, "training.warmup_ratio": 0.5})
    assert (numbers["rows"], numbers["dropped"], numbers["eval_rows"]) == (4, {"too_long": 1}, {"eval": 7})
    # 4 rows in batches of 3 are 2 steps; half of twice that many are warm-up.
    assert (numbers["steps_per_epoch"], numbers["steps"], numbers["warmup_steps"]) == (2, 4, 2)
    assert list(numbers["tokens"]["chosen"].items()) == list(zip(("p5", "p50", "p95", "max"), chosen, strict=True))
    assert numbers["tokens"]["rejected"]["max"] == max(rejected)
    # The longest prompt has the longest answer.
    assert numbers["tokens"]["row"]["max"] == prompts[3] + chosen[3]
    # No answer starts like its rival, so that a pair is its prompt once and both answers.
    assert numbers["tokens"]["total"] == sum(prompts) + sum(chosen) + sum(rejected)


def test_the_numbers_are_those_of_the_run(
    recipe: dict[str, Any], train: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    numbers = report(recipe, train, capfd)
    train(recipe, json_output=True)
    summary = json.loads(capfd.readouterr().out)
    assert summary["steps"] == numbers["steps"]


def test_sft_counts_the_tokens_that_are_trained_on(
    recipe: dict[str, Any], train: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    numbers = report(recipe | {"method": "sft"}, train, capfd, **{"training.max_steps": 7})
    assert (numbers["method"], numbers["rows"], numbers["steps"]) == ("sft", 5, 7)
    assert numbers["tokens"].keys() == {"total", "row", "scored"}


def test_people_see_the_plan_first_and_the_masks_of_two_rows(
    recipe: dict[str, Any], train: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    train(recipe, dry_run=True)
    out, err = capfd.readouterr()
    run = recipe["training"]["output_dir"]
    assert out.startswith(f"plan of a run in {run}\nmethod: dpo\n")
    assert "rows used: 4\neval rows: eval 7\nrows dropped: too_long 1\n" in out
    assert out.count("tokens trained on") == 4
    assert "⟦paper reviewer method<|im_end|>⟧" in out
    assert "⟦hello no<|im_end|>⟧" in out
    assert "global_batch_size: 3" not in out + err
    assert err.rstrip().endswith(f"nothing was trained, and nothing was written to {run}")


def test_the_recipe_with_its_defaults_is_shown_on_request(
    recipe: dict[str, Any], train: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    # What stands in brackets is the user's, not markup.
    changes = {"training.run_name": "[red]mine[/]", "training.report_to": ["wandb"]}
    train(recipe, changes, dry_run=True, verbose=True)
    out = capfd.readouterr().out
    assert out.startswith("plan of a run in ")
    assert "[red]mine[/]" in out
    assert yaml.safe_load(out.partition("the recipe with every default:\n")[2])["data"]["max_length"] == 100
    train(recipe, changes, dry_run=True, verbose=True, json_output=True)
    found = json.loads(capfd.readouterr().out)
    assert found["recipe"]["training"]["run_name"] == "[red]mine[/]"
    assert "few-steps" in {one["code"] for one in found["advice"]}


def test_a_model_that_cannot_be_reached_ends_with_code_5_and_its_name(
    main: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("dpo", ROOT / "recipes" / "mistral7b-lora.yaml", "--dry-run", "--json") == 5
    out, err = capsys.readouterr()
    assert "alignment-handbook/zephyr-7b-sft-qlora" in json.loads(out)["error"]["message"]
    assert "Traceback" not in err


def test_a_data_set_that_cannot_be_reached_ends_with_code_5_and_its_name(
    recipe: dict[str, Any], main: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_recipe(tmp_path / "recipe.yaml", recipe, {"data.train": [{"path": "someone/pairs"}]})
    assert main("dpo", file, "--dry-run") == 5
    out, err = capsys.readouterr()
    assert out == ""
    assert "someone/pairs" in err

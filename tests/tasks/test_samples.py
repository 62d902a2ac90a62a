"""Samples of both models to the same prompts, unnoticed by training; and the keyword judge that counts them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import Ended
from rich.console import Console
from tiny_runs import metrics_of, write_recipe
from transformers import AutoModelForCausalLM

from dpoctl import console
from dpoctl.model.generate import Generation
from dpoctl.runs.statistics import wilson_interval
from dpoctl.tasks.evaluate import run as evaluate
from dpoctl.tasks.samples import KeywordJudge, Sample, show

Run = Callable[..., dict[str, Any]]
FAST = {"training.learning_rate": 0.03, "training.eval_steps": 2, "training.max_steps": 3}
SAMPLES = {"num": 2, "per_prompt": 2, "max_new_tokens": 6, "temperature": 1.0}
JUDGED = FAST | {"eval": {"samples": SAMPLES, "judge": {"categories": {"no": ["no"], "yes": ["yes"]}, "target": "no"}}}
KINDS: dict[str, dict[str, Any]] = {"full": {}, "lora": {"lora": {"r": 4, "lora_dropout": 0.2}}}


def read(run: Path | str, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run) / "samples" / name).read_text().splitlines()]


def weights(run: str) -> bytes:
    (file,) = Path(run).glob("*.safetensors")
    return file.read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_the_same_to_the_bit_with_and_without_samples(
    kind: str, dpo_recipe: dict[str, Any], tiny_llama_folder: Path, train: Run
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    model.config.attention_dropout = 0.2
    model.save_pretrained(tiny_llama_folder)
    changes = FAST | KINDS[kind] | {"model.disable_dropout": False}
    with_samples = train(dpo_recipe, JUDGED | changes)["training"]["output_dir"]
    without = train(dpo_recipe, changes | {"training.output_dir": with_samples + "-without"})["training"]["output_dir"]
    assert weights(with_samples) == weights(without)
    rows = [row for row in metrics_of(with_samples) if not any("samples/" in name for name in row)]
    assert [row.get("loss") for row in rows] == [row.get("loss") for row in metrics_of(without)]
    assert not (Path(without) / "samples").exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_each_evaluation_and_the_finished_run_compare_both_models_on_the_same_prompts(
    method: str, kind: str, dpo_recipe: dict[str, Any], train: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    run = Path(train(dpo_recipe | {"method": method}, JUDGED | KINDS[kind])["training"]["output_dir"])
    assert sorted(file.name for file in (run / "samples").iterdir()) == [
        f"step-00000{step}.jsonl" for step in (0, 2, 3)
    ]
    first, last = read(run, "step-000000.jsonl"), read(run, "step-000003.jsonl")
    names = ["step", "prompt", "reference", "policy", "reference_finished", "policy_finished"]
    assert [list(row) for row in last] == [names] * 4
    assert [row["reference"] for row in first] == [row["policy"] for row in first]
    assert [row["reference"] for row in first] == [row["reference"] for row in last]
    assert [row["policy"] for row in first] != [row["policy"] for row in last]
    assert last[0]["prompt"] == last[1]["prompt"] != last[2]["prompt"]
    assert last[0]["reference"] != last[1]["reference"]

    said = capfd.readouterr().err
    titles = [line for line in said.splitlines() if line.startswith("a sample at step")]
    assert titles == ["a sample at step 2", "a sample at step 3"]
    evaluate(run, json_output=True)
    report = json.loads(capfd.readouterr().out)
    (result,) = (run / "evals").glob("official-*.json")
    drawn = [json.loads(line) for line in result.with_suffix(".samples.jsonl").read_text().splitlines()]
    assert drawn == [{name: row[name] for name in names[1:]} for row in last]
    assert report == json.loads(result.read_text())
    numbers = report["samples"]
    assert numbers["num"] == 4
    assert numbers["distinct_policy"] == len({row["policy"] for row in last})
    for side in ("policy", "reference"):
        assert numbers[f"finished_{side}"] == sum(row[f"{side}_finished"] for row in last) / 4
        assert set(report["judge"][side]) == {"no", "yes", "undecided"}
        assert sum(counted["share"] for counted in report["judge"][side].values()) == 1
    curve = [row for row in metrics_of(run) if "eval_judge/no" in row]
    assert [row["step"] for row in curve] == [0, 2, 3]
    assert curve[-1]["eval_judge/no"] == report["judge"]["policy"]["no"]["share"]
    assert curve[-1]["eval_samples/median_length"] == numbers["median_length_policy"]


def test_another_reference_is_not_loaded_in_training_for_samples_and_speaks_in_eval(
    dpo_recipe: dict[str, Any], sft_recipe: dict[str, Any], train: Run, tmp_path: Path
) -> None:
    other = train(sft_recipe, FAST | {"training.output_dir": str(tmp_path / "sft")})["training"]["output_dir"]
    run = train(dpo_recipe, JUDGED | {"dpo.reference.path": other})["training"]["output_dir"]
    assert list(read(run, "step-000003.jsonl")[0]) == ["step", "prompt", "policy", "policy_finished"]
    evaluate(Path(run), limit=1)
    (drawn,) = (Path(run) / "evals").glob("*.samples.jsonl")
    rows = [json.loads(line) for line in drawn.read_text().splitlines()]
    assert len(rows) == 2
    assert all("reference" in row for row in rows)


def test_given_prompts_are_messages_where_the_data_are_and_none_are_asked_where_num_is_0(
    dpo_recipe: dict[str, Any], train: Run
) -> None:
    run = train(dpo_recipe, FAST | {"eval.samples": {"prompts": ["hello?"], "max_new_tokens": 2}})["training"][
        "output_dir"
    ]
    assert [row["prompt"] for row in read(run, "step-000002.jsonl")] == [[{"role": "user", "content": "hello?"}]]
    run = train(dpo_recipe, FAST | {"eval.samples.num": 0}, overwrite=True)["training"]["output_dir"]
    assert not (Path(run) / "samples").exists()


def test_prompts_that_were_cut_for_training_are_cut_for_samples(dpo_recipe: dict[str, Any], train: Run) -> None:
    short = {"data.max_length": 60, "data.max_prompt_length": 20, "data.overlong": "truncate"}
    run = train(dpo_recipe, JUDGED | short)["training"]["output_dir"]
    whole = train(dpo_recipe, JUDGED, overwrite=True)["training"]["output_dir"]
    assert len(read(run, "step-000000.jsonl")) == len(read(whole, "step-000000.jsonl")) == 4


def test_a_resumed_run_forgets_samples_of_steps_to_come(dpo_recipe: dict[str, Any], train: Run) -> None:
    changes = JUDGED | {"training.save_steps": 2}
    run = Path(train(dpo_recipe, changes)["training"]["output_dir"])
    expected = read(run, "step-000003.jsonl")
    (run / "samples" / "step-000099.jsonl").write_text("{}\n")
    shutil.rmtree(max((run / "checkpoints").iterdir()))
    train(dpo_recipe, changes, resume=True)
    assert not (run / "samples" / "step-000099.jsonl").exists()
    assert read(run, "step-000003.jsonl") == expected


@pytest.mark.slow
def test_two_processes_share_the_work_and_give_the_samples_of_one(
    dpo_recipe: dict[str, Any], train: Run, tmp_path: Path, in_fork: Callable[..., Ended]
) -> None:
    changes = JUDGED | {"eval.samples.num": 3, "training.learning_rate": 1e-4}
    alone = train(dpo_recipe, changes)["training"]["output_dir"]
    recipe = write_recipe(tmp_path / "recipe.yaml", dpo_recipe, changes)
    in_fork("dpo", recipe, "--output-dir", tmp_path / "two", "--num-processes", "2")
    for name in ("step-000000.jsonl", "step-000003.jsonl"):
        assert read(tmp_path / "two", name) == read(alone, name)


HOSTILE = Sample(
    [{"role": "user", "content": "\x1b[2J[bold]hi[/bold]"}],
    Generation("\x9b31m:smile: <b>", True),
    Generation("one\ntwo", False),
)


def test_elsewhere_than_on_a_terminal_samples_are_plain_lines_and_data_stay_data(
    capfd: pytest.CaptureFixture[str],
) -> None:
    show([HOSTILE], "samples at step 1")
    lines = capfd.readouterr().err.splitlines()
    assert lines == [
        "samples at step 1",
        "  prompt: \N{SYMBOL FOR ESCAPE}[2J[bold]hi[/bold]",
        "  reference: one",
        "    two [cut off]",
        "  policy: \N{REPLACEMENT CHARACTER}31m:smile: <b>",
    ]


def test_on_a_terminal_samples_stand_side_by_side_one_of_each_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Console(force_terminal=True, color_system=None, markup=False, emoji=False, record=True, width=100)
    monkeypatch.setattr(console, "stderr", lambda: terminal)
    with terminal.capture() as shown:
        show([HOSTILE, HOSTILE], "samples")
    text = shown.get()
    assert "\x1b" not in text
    assert text.count("[bold]hi[/bold]") == 1
    assert any("two [cut off]" in line or ("one" in line and ":smile:" in line) for line in text.splitlines())


JUDGE = KeywordJudge({"harsh": ["reject", "no way"], "kind": ["accept", "c++"]})


@pytest.mark.parametrize(
    ("text", "category"),
    [
        ("Strong REJECT.", "harsh"),
        ("reject, reject, reject", "harsh"),
        ("There is no way.", "harsh"),
        ("Accept!", "kind"),
        ("It is written in C++, good.", "kind"),
        ("rejected, unacceptable, rejection", "undecided"),
        ("Accept or reject?", "undecided"),
        ("", "undecided"),
    ],
)
def test_a_text_is_of_the_one_category_whose_whole_words_it_holds(text: str, category: str) -> None:
    assert JUDGE.category(text) == category


def test_shares_of_all_categories_come_with_wilson_intervals() -> None:
    counted = JUDGE.count(["reject", "reject", "accept", "hm"], "abcd")
    assert {name: number["share"] for name, number in counted.items()} == {
        "harsh": 0.5,
        "kind": 0.25,
        "undecided": 0.25,
    }
    assert all(number["ci"] == pytest.approx(wilson_interval(number["share"], 4)) for number in counted.values())
    one = JUDGE.count(["reject"], "a")["harsh"]
    assert (one["share"], one["ci"]) == (1, pytest.approx([0.025, 1.0]))


def test_equal_texts_of_one_prompt_tell_no_more_than_one_of_them() -> None:
    texts = ["reject", "reject", "accept", "accept", "reject", "reject", "hm", "hm"]
    repeated, single, independent = (
        JUDGE.count(texts, "aabbccdd")["harsh"],
        JUDGE.count(texts[::2], "abcd")["harsh"],
        JUDGE.count(texts, "abcdefgh")["harsh"],
    )
    assert [one["share"] for one in (repeated, single, independent)] == [0.5, 0.5, 0.5]
    widths = [one["ci"][1] - one["ci"][0] for one in (repeated, single, independent)]
    assert widths[0] >= widths[1] > 1.2 * widths[2]

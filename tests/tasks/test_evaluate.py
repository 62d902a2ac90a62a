"""`dpoctl eval`: a finished run gives the numbers that it gave in training, against the same reference."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import metrics_of, pair_rows, write_rows

from dpoctl.errors import DataError, SetupError, UsageError
from dpoctl.runs import statistics
from dpoctl.runs.record_values import read_record_values
from dpoctl.runs.statistics import wilson_interval
from dpoctl.tasks import merge
from dpoctl.tasks.evaluate import run as evaluate
from dpoctl.tasks.evaluate import verdicts

Run = Callable[..., dict[str, Any]]
Report = Callable[..., dict[str, Any]]
LORA = {"lora": {"r": 4, "lora_alpha": 8}}
STARTS = {"new": {"start": "new", "r": 3, "lora_alpha": 5}, "continue": {"start": "continue"}}


@pytest.fixture
def report(capfd: pytest.CaptureFixture[str]) -> Report:
    """Evaluate a run in this process, and read what it prints."""

    def read(recipe: dict[str, Any], **options: Any) -> dict[str, Any]:
        capfd.readouterr()
        evaluate(Path(recipe["training"]["output_dir"]), json_output=True, **options)
        out = capfd.readouterr().out
        assert out.count("\n") == 1
        numbers: dict[str, Any] = json.loads(out)
        return numbers

    return read


def results_of(recipe: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The results in a run, by file name."""
    folder = Path(recipe["training"]["output_dir"]) / "evals"
    return {path.name: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def last_evaluation(recipe: dict[str, Any], prefix: str = "eval_") -> dict[str, float]:
    rows = [row for row in metrics_of(recipe["training"]["output_dir"]) if f"{prefix}loss" in row]
    return {name.removeprefix(prefix): value for name, value in rows[-1].items() if name.startswith(prefix)}


def assert_same(numbers: dict[str, Any], expected: dict[str, float]) -> None:
    assert expected.keys() <= numbers.keys()
    for name, value in expected.items():
        assert numbers[name] == pytest.approx(value, abs=1e-6, rel=1e-6), name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        LORA,
        LORA | {"model.dtype": "bfloat16"},
        {"dpo.reference.mode": "live"},
        {"dpo.loss.type": "ipo"},
        {"dpo.loss.reference_free": True},
        {"model.chat_template": "zephyr"},
    ],
    ids=str,
)
def test_the_numbers_are_those_of_the_last_evaluation(
    changes: dict[str, Any], dpo_recipe: dict[str, Any], train: Run, report: Report
) -> None:
    recipe = train(dpo_recipe, changes)
    numbers = report(recipe)
    assert_same(numbers, last_evaluation(recipe))
    assert numbers["num_pairs"] == 7
    accuracy, (low, high) = numbers["rewards/accuracies"], numbers["rewards/accuracies_ci"]
    assert 0 <= low < accuracy < high <= 1 or accuracy in (0, 1)
    right = round(7 * accuracy)
    assert (low, high) == pytest.approx(statistics.share([1] * right + [0] * (7 - right), range(7)).interval)
    assert list(results_of(recipe).values()) == [numbers]


@pytest.mark.long("new")
@pytest.mark.parametrize("start", STARTS)
def test_a_run_over_an_sft_adapter_is_compared_with_that_adapter(
    start: str, sft_recipe: dict[str, Any], dpo_recipe: dict[str, Any], train: Run, report: Report, tmp_path: Path
) -> None:
    sft = train(sft_recipe, LORA | {"training.output_dir": str(tmp_path / "sft")})["training"]["output_dir"]
    recipe = train(dpo_recipe, {"model.model_name_or_path": sft, "lora": STARTS[start]})
    numbers = report(recipe)
    assert_same(numbers, last_evaluation(recipe))
    assert numbers["rewards/margins"] != 0


def test_another_model_named_as_the_reference_is_the_reference(
    sft_recipe: dict[str, Any], dpo_recipe: dict[str, Any], train: Run, report: Report, tmp_path: Path
) -> None:
    sft = train(sft_recipe, {"training.output_dir": str(tmp_path / "sft")})["training"]["output_dir"]
    recipe = train(dpo_recipe, {"dpo.reference.path": sft})
    assert_same(report(recipe), last_evaluation(recipe))


def test_a_model_from_scratch_is_built_again_as_its_own_reference(
    dpo_recipe: dict[str, Any], train: Run, report: Report
) -> None:
    config = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    scratch = {"config": config, "tokenizer": {"vocab_size": 300}}
    recipe = train(dpo_recipe, {"model": {"model_name_or_path": None, "from_scratch": scratch}})
    assert_same(report(recipe), last_evaluation(recipe))


def test_sft_gives_loss_perplexity_and_tokens(sft_recipe: dict[str, Any], train: Run, report: Report) -> None:
    recipe = train(sft_recipe, LORA)
    numbers = report(recipe)
    assert_same(numbers, last_evaluation(recipe))
    assert numbers["perplexity"] == pytest.approx(2.718281828 ** numbers["loss"])
    assert numbers["num_tokens"] > 7
    assert not [name for name in numbers if "reward" in name]


def test_the_reference_is_taken_from_the_training_where_that_was_kept(
    dpo_recipe: dict[str, Any], train: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = train(dpo_recipe)
    capfd.readouterr()
    evaluate(Path(recipe["training"]["output_dir"]))
    out, err = capfd.readouterr()
    assert out == ""
    assert "computing log-probabilities" not in err
    assert "95 % interval" in err
    assert "num_pairs" in err


def test_other_data_are_measured_instead(
    dpo_recipe: dict[str, Any], train: Run, report: Report, tmp_path: Path
) -> None:
    other = write_rows(tmp_path / "other.jsonl", pair_rows(9, seed=5))
    with_both = {"data.eval": {"held": dpo_recipe["data"]["eval"], "other": [str(other)]}}
    recipe = train(dpo_recipe, with_both)
    numbers = report(recipe, data=str(other))
    assert_same(numbers, last_evaluation(recipe, "eval_other_"))
    assert numbers["num_pairs"] == 9
    assert "sets" not in numbers


def test_pairs_that_share_a_prompt_are_no_independent_evidence_of_accuracy(
    dpo_recipe: dict[str, Any], train: Run, report: Report, main: Callable[..., int], tmp_path: Path
) -> None:
    # Five prompts with four pairs each.
    prompts = [row["prompt"] for row in pair_rows(5, seed=1)]
    rows = [row | {"prompt": prompts[at]} for seed in range(2, 6) for at, row in enumerate(pair_rows(5, seed))]
    shared = str(write_rows(tmp_path / "shared.jsonl", rows))
    recipe = train(dpo_recipe)
    found, run = report(recipe, data=shared), Path(recipe["training"]["output_dir"])
    right, n, error = found["rewards/accuracies"], 20, found["rewards/accuracies_se"]
    assert (found["num_pairs"], 0 < right < 1) == (n, True)
    (file,) = (run / "evals").glob("*.records.npz")
    values = read_record_values(file)["eval"]
    sums = dict.fromkeys(values.prompts.tolist(), 0.0)
    all_wins = values.sums[values.names.index("rewards/accuracies")].tolist()
    for prompt, wins in zip(values.prompts.tolist(), all_wins, strict=True):
        sums[prompt] += wins
    assert len(sums) == 5
    assert error == pytest.approx((5 / 4 * sum((wins - 4 * right) ** 2 for wins in sums.values())) ** 0.5 / n)
    # With the quantiles of Student's t of 19 and of 4 degrees of freedom.
    effective = n * right * (1 - right) / (n - 1) / error**2 * (2.0930241 / 2.7764451) ** 2
    low, high = found["rewards/accuracies_ci"]
    assert (low, high) == pytest.approx(wilson_interval(right, effective))
    # 20 independent pairs would pass this gate.
    bound = (low + wilson_interval(right, n)[0]) / 2
    gate = f'eval.gates=[{{"metric": "rewards/accuracies", "min": {bound}, "by": "lower"}}]'
    assert effective < n
    assert main("eval", run, "--data", shared, "--set", gate) == 4


def test_a_run_without_evaluation_data_needs_some(
    dpo_recipe: dict[str, Any], heldout: Path, train: Run, report: Report
) -> None:
    recipe = train(dpo_recipe, {"data.eval": None, "training.eval_steps": None})
    with pytest.raises(UsageError, match="no eval data") as refusal:
        report(recipe)
    assert "--data" in str(refusal.value.hint)
    assert report(recipe, data=str(heldout))["num_pairs"] == 7
    with pytest.raises(DataError, match=r"missing\.jsonl"):
        report(recipe, data="missing.jsonl")


def test_a_limit_takes_the_first_rows(
    dpo_recipe: dict[str, Any], train: Run, report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = write_rows(tmp_path / "few.jsonl", pair_rows(7, seed=1)[:3])
    recipe = train(dpo_recipe)
    expected = report(recipe, data=str(few))
    assert expected["num_pairs"] == 3
    numbers = {name: value for name, value in expected.items() if isinstance(value, float)}
    assert len(numbers) > 10
    limited = report(recipe, limit=3)
    assert_same(limited, numbers)
    assert limited["rewards/accuracies_ci"] == pytest.approx(expected["rewards/accuracies_ci"])
    assert report(recipe, limit=1000)["num_pairs"] == 7
    # Nothing of a reference that was computed for some rows only may be found later.
    monkeypatch.setenv("DPOCTL_CACHE", str(tmp_path / "fresh"))
    assert report(recipe, limit=3)["loss"] == pytest.approx(expected["loss"])
    assert_same(report(recipe), last_evaluation(recipe))


def test_several_sets_stand_apart(dpo_recipe: dict[str, Any], pairs: Path, train: Run, report: Report) -> None:
    sets = {"eval": dpo_recipe["data"]["eval"], "seen": [{"path": str(pairs)}]}
    recipe = train(dpo_recipe, {"data.eval": sets})
    numbers = report(recipe)
    assert_same(numbers, last_evaluation(recipe))
    assert_same(numbers["sets"]["seen"], last_evaluation(recipe, "eval_seen_"))
    assert (numbers["num_pairs"], numbers["sets"]["seen"]["num_pairs"]) == (7, 23)


def test_rows_held_out_of_the_training_data_are_the_same_again(
    dpo_recipe: dict[str, Any], train: Run, report: Report
) -> None:
    recipe = train(dpo_recipe, {"data.eval": None, "data.eval_size": 5})
    numbers = report(recipe)
    assert_same(numbers, last_evaluation(recipe))
    assert numbers["num_pairs"] == 5


def test_a_folder_that_is_no_finished_run_is_refused(
    dpo_recipe: dict[str, Any], train: Run, tiny_llama_folder: Path
) -> None:
    run = Path(train(dpo_recipe)["training"]["output_dir"])
    (tiny_llama_folder / "config.json").unlink()
    with pytest.raises(UsageError, match="not a run of dpoctl"):
        evaluate(tiny_llama_folder)
    (run / "config.json").unlink()
    with pytest.raises(UsageError, match="has no trained model"):
        evaluate(run)


def test_the_command_ends_with_code_2_for_a_folder_that_is_no_run(
    main: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert main("eval", folder, "--json") == 2
        assert str(folder) in json.loads(capsys.readouterr().out)["error"]["message"]


@pytest.mark.parametrize(
    ("share", "count", "low", "high"),
    [
        # (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n) with z = 1.959964, worked out by hand.
        (0.5, 10, 0.2365931, 0.7634069),
        (0.8, 100, 0.7111708, 0.8666331),
        (0.0, 10, 0.0, 0.2775328),
        (1.0, 10, 0.7224672, 1.0),
        (1.0, 1, 0.2065493, 1.0),
    ],
)
def test_wilson_intervals_are_those_of_the_formula(share: float, count: int, low: float, high: float) -> None:
    assert wilson_interval(share, count) == pytest.approx((low, high), abs=1e-6)


def test_results_of_other_data_limits_and_weights_stand_beside_the_official_one(
    dpo_recipe: dict[str, Any], train: Run, report: Report, tmp_path: Path
) -> None:
    other = write_rows(tmp_path / "other rows.jsonl", pair_rows(9, seed=5))
    recipe = train(dpo_recipe, {"training.save_steps": 5})
    official = report(recipe)
    assert official["official"] is True
    assert (official["step"], official["limit"]) == (5, None)
    assert official["baseline"] == dpo_recipe["model"]["model_name_or_path"]
    assert official["data"]["eval"]["sources"] == [dpo_recipe["data"]["eval"][0]["path"]]
    assert official["data"]["eval"]["records"] == 7
    others = [report(recipe, data=str(other)), report(recipe, data=str(other), limit=5), report(recipe, limit=3)]
    assert [one["official"] for one in others] == [False] * 3
    assert [one["data"]["eval"]["records"] for one in others] == [9, 5, 3]
    kept = results_of(recipe)
    assert len(kept) == 4
    assert all(one in kept.values() for one in [official, *others])
    report(recipe, data=str(other))
    assert len(results_of(recipe)) == 4

    further = train(recipe, {"training.num_train_epochs": 2}, resume=True, allow_changed=["training.num_train_epochs"])
    again = report(further)
    assert again["model"] != official["model"]
    assert len(results_of(recipe)) == 5


def test_eval_data_that_changed_since_training_are_another_set(
    dpo_recipe: dict[str, Any], heldout: Path, train: Run, report: Report, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = train(dpo_recipe)
    official = report(recipe)
    write_rows(heldout, pair_rows(6, seed=2))
    evaluate(Path(recipe["training"]["output_dir"]))
    assert "gives other rows than in training: this is another eval set" in capfd.readouterr().err
    names = list(results_of(recipe))
    assert [name.partition("-")[0] for name in names] == ["heldout.jsonl", "official"]
    assert results_of(recipe)[names[1]] == official
    for evals in (True, {"eval": 7}):
        (Path(recipe["training"]["output_dir"]) / "data_report.json").write_text(json.dumps({"evals": evals}))
        with pytest.raises(SetupError, match=r"data_report\.json' is not as `dpoctl` wrote it"):
            evaluate(Path(recipe["training"]["output_dir"]))


def test_any_model_folder_is_measured_on_given_data_and_keeps_nothing(
    dpo_recipe: dict[str, Any], tiny_llama_folder: Path, heldout: Path, report: Report, tmp_path: Path
) -> None:
    model = {"training": {"output_dir": str(tiny_llama_folder)}}
    before = sorted(tiny_llama_folder.iterdir())
    pairs = report(model, data=str(heldout))
    assert (pairs["num_pairs"], pairs["baseline"], pairs["official"]) == (7, None, False)
    assert pairs["rewards/chosen"] == pytest.approx(0.1 * pairs["logps/chosen"], rel=1e-5)
    rows = [{"messages": [*row["prompt"], *row["chosen"]]} for row in pair_rows(4)]
    demonstrations = report(model, data=str(write_rows(tmp_path / "sft.jsonl", rows)))
    assert demonstrations["perplexity"] > 1
    assert sorted(tiny_llama_folder.iterdir()) == before
    kept = report(model, data=str(heldout), limit=2, output=tmp_path / "kept")
    (file,) = (tmp_path / "kept" / "evals").glob("*.json")
    assert json.loads(file.read_text()) == kept
    with pytest.raises(UsageError, match=r"it has no eval data; pass --data SOURCE$"):
        evaluate(tiny_llama_folder)


@pytest.mark.long("elsewhere")
@pytest.mark.parametrize("place", ["merged", "elsewhere"])
def test_a_merged_model_is_measured_as_its_run_is(
    place: str, dpo_recipe: dict[str, Any], heldout: Path, train: Run, report: Report, tmp_path: Path
) -> None:
    recipe = train(dpo_recipe, LORA)
    run = Path(recipe["training"]["output_dir"])
    official = report(recipe)
    folder = run / "merged" if place == "merged" else tmp_path / "elsewhere"
    merge.run(run, output=folder)
    found = report({"training": {"output_dir": str(folder)}}, data=None if place == "merged" else str(heldout))
    for name in ("logps/chosen", "logps/rejected", *(["loss", "rewards/margins"] if place == "merged" else [])):
        assert found[name] == pytest.approx(official[name], rel=1e-3), name
    assert found["official"] is False
    assert len(results_of(recipe)) == (2 if place == "merged" else 1)


@pytest.mark.long("full")
@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "lora"])
def test_an_earlier_step_is_measured_from_its_checkpoint(
    changes: dict[str, Any], dpo_recipe: dict[str, Any], train: Run, report: Report, main: Callable[..., int]
) -> None:
    steps = {"training.eval_steps": 2, "training.save_steps": 2, "training.save_total_limit": None}
    recipe = train(dpo_recipe, changes | steps)
    run = Path(recipe["training"]["output_dir"])
    at = lambda folder: {"training": {"output_dir": str(folder)}}  # noqa: E731
    found = report(at(run / "checkpoints" / "step-000002"))
    logged = next(row for row in metrics_of(run) if row["step"] == 2 and "eval_loss" in row)
    assert found["loss"] == pytest.approx(logged["eval_loss"], abs=1e-5)
    assert found["logps/chosen"] == pytest.approx(logged["eval_logps/chosen"], abs=1e-4)
    assert (found["step"], found["official"], found["run"]) == (2, False, str(run / "step-000002"))
    assert len(list((run / "evals").glob("*.json"))) == 1
    before = (run / "step-000002" / "checkpoint-manifest.json").stat().st_mtime_ns
    assert main("chat", run / "checkpoints" / "step-000002", "--reference", "--prompt", "hello") == 0
    assert (run / "step-000002" / "checkpoint-manifest.json").stat().st_mtime_ns == before
    assert main("merge", run / "checkpoints" / "step-000002") == (0 if changes else 2)
    if changes:
        again = report(at(run / "step-000002" / "merged"))
        assert again["loss"] == pytest.approx(found["loss"], abs=1e-4)
    train(recipe, overwrite=True)
    assert not (run / "step-000002").exists()


def pairs_of(accuracy: float, count: int, margin: float = 0.1) -> dict[str, Any]:
    interval = list(wilson_interval(accuracy, count))
    return {"rewards/accuracies": accuracy, "rewards/accuracies_ci": interval, "rewards/margins": margin}


def test_the_verdict_says_what_the_intervals_allow() -> None:
    sets = {
        "eval": pairs_of(0.9, 100),
        "few": pairs_of(0.625, 8),
        "bad": pairs_of(0.2, 100),
        "same": pairs_of(0.0, 8, margin=0.0),
        "sft": {"loss": 1.0},
    }
    shares = {
        side: {"harsh": {"share": share, "ci": list(wilson_interval(share, 200))}}
        for side, share in (("reference", 0.475), ("policy", 1.0))
    }
    assert list(verdicts(sets, {"target": "harsh", **shares})) == [
        "verdict: the chosen answer has the higher reward in 90.0% of the pairs, more than chance explains",
        "verdict: the chosen answer has the higher reward in 62.5% of the pairs of few, which chance would explain too",
        "verdict: the chosen answer has the higher reward in 20.0% of the pairs of bad, less than chance explains",
        "verdict: no reward of same differs from another: the policy is its reference",
        "verdict: harsh answers 47.5% -> 100.0%, more than chance explains",
    ]
    shares["policy"] = shares["reference"]
    assert list(verdicts({}, {"target": "harsh", **shares})) == [
        "verdict: harsh answers 47.5% -> 47.5%, which chance would explain too"
    ]


def test_gates_decide_the_exit_code_and_are_kept_with_the_result(
    dpo_recipe: dict[str, Any], train: Run, main: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    gates = [{"metric": "loss", "max": 100.0}, {"metric": "judge.win_rate", "min": 0.5, "by": "lower"}]
    recipe = train(dpo_recipe, {"eval.gates": gates})
    run = recipe["training"]["output_dir"]
    assert main("eval", run) == 4
    said = capfd.readouterr().err
    assert re.search(r"^gate passed: loss 0\.\d+ \(.* to .*\), must be at most 100$", said, re.MULTILINE)
    assert "\ngate failed: judge.win_rate: it is not in the result\n" in said
    assert main("eval", run, "--json") == 4
    report = json.loads(capfd.readouterr().out)
    assert [gate["passed"] for gate in report["gates"]] == [True, False]
    assert next(iter(results_of(recipe).values()))["gates"] == report["gates"]
    resolved = Path(run) / "recipe.resolved.yaml"
    resolved.write_text(resolved.read_text().replace("judge.win_rate", "rewards/accuracies").replace("0.5", "0.0"))
    assert main("eval", run) == 0

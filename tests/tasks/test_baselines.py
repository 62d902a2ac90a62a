"""What `dpoctl eval` can compare: a run with any other model, by rewards and by texts, local or served."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scripted_server import Body, scripted

from dpoctl.errors import UserError
from dpoctl.tasks.baselines import Baseline
from dpoctl.tasks.baselines import served as served_by
from dpoctl.tasks.evaluate import run as evaluate

Run = Callable[..., dict[str, Any]]
Report = Callable[..., dict[str, Any]]
SAMPLED = {
    "training.learning_rate": 0.03,
    "training.max_steps": 3,
    "eval.samples": {"num": 3, "max_new_tokens": 8, "temperature": 1.5},
}


@pytest.fixture
def report(capfd: pytest.CaptureFixture[str]) -> Report:
    def read(run: Path | str, *overrides: str, **options: Any) -> dict[str, Any]:
        capfd.readouterr()
        evaluate(Path(run), json_output=True, overrides=overrides, **options)
        numbers: dict[str, Any] = json.loads(capfd.readouterr().out)
        return numbers

    return read


def test_a_run_against_its_start_is_the_run_against_its_reference_and_against_itself_nothing_differs(
    dpo_recipe: dict[str, Any], train: Run, report: Report, tiny_llama_folder: Path
) -> None:
    run = train(dpo_recipe, SAMPLED)["training"]["output_dir"]
    usual = report(run)
    start = report(run, baseline=Baseline.of(str(tiny_llama_folder), None))
    for name in ("loss", "rewards/margins", "rewards/accuracies", "kl"):
        assert start[name] == pytest.approx(usual[name], abs=1e-6), name
    assert start["samples"] == usual["samples"]
    assert usual["kl"] > 0
    itself = report(run, baseline=Baseline.of(run, None))
    assert (itself["baseline"], itself["official"]) == (run, False)
    assert itself["rewards/margins"] == itself["kl"] == itself["samples"]["length_difference"] == 0
    assert len(list((Path(run) / "evals").glob("*.samples.jsonl"))) == 3


def test_a_model_that_no_run_describes_has_a_baseline_if_one_is_named(
    dpo_recipe: dict[str, Any], train: Run, report: Report, tiny_llama_folder: Path, heldout: Path
) -> None:
    run = train(dpo_recipe, SAMPLED)["training"]["output_dir"]
    sampled = ["eval.samples.num=3", "eval.samples.max_new_tokens=8", "eval.samples.temperature=1.5"]
    alone = report(tiny_llama_folder, *sampled, data=str(heldout))
    assert alone["baseline"] is None
    assert "kl" not in alone
    assert "length_policy" in alone["samples"]
    assert "length_reference" not in alone["samples"]
    against = report(tiny_llama_folder, *sampled, data=str(heldout), baseline=Baseline.of(run, None))
    forth = report(run)
    # The same two models, seen from the other side.
    assert against["rewards/margins"] == pytest.approx(-forth["rewards/margins"], abs=1e-5)
    assert against["samples"]["length_policy"] == forth["samples"]["length_reference"]
    judge = 'eval.judge={"type": "command", "command": ["true"]}'
    with pytest.raises(UserError, match="a judge that compares needs a baseline; pass one with --against"):
        report(tiny_llama_folder, *sampled, judge, data=str(heldout))


def test_servers_write_the_texts_of_either_side(dpo_recipe: dict[str, Any], train: Run, report: Report) -> None:
    pytest.importorskip("openai")
    run = train(dpo_recipe, SAMPLED)["training"]["output_dir"]
    usual = report(run)

    def says(body: Body) -> str:
        return f"{body['model']} says no"

    with scripted(says) as server:
        policy = served_by(server.url, "mine", "--model-url", "--model")
        baseline = Baseline.of(server.url, "other")
        found = report(run, served=policy, baseline=baseline)
        assert found["baseline"] == f"other at {server.url}"
        assert (found["samples"]["length_policy"], found["samples"]["length_reference"]) == (3, 3)
        assert "kl" not in found
        assert found["rewards/margins"] == usual["rewards/margins"]
        sent = min(server.bodies, key=lambda body: body["seed"])
        assert (sent["max_tokens"], sent["temperature"], sent["top_p"], sent["seed"]) == (8, 1.5, 0.9, 0)
        assert [message["role"] for message in sent["messages"]] == ["user"]
        own = report(run, served=policy)
        assert own["samples"]["length_policy"] == 3
        assert own["samples"]["length_reference"] == usual["samples"]["length_reference"]
        assert own["kl"] != usual["kl"]
        assert server.asked.total() == 6


@pytest.mark.parametrize(
    ("against", "model", "words"),
    [
        ("http://localhost:1/v1", None, "--against needs the name of the model there; pass it with --against-model"),
        ("runs/other", "name", "--against-model is for a served model; pass its address with --against URL"),
        (None, "name", "--against-model is for a served model"),
        ("./nowhere", None, "nowhere has no trained model"),
    ],
)
def test_a_baseline_that_cannot_be_used_is_named(against: str | None, model: str | None, words: str) -> None:
    pytest.importorskip("openai")
    with pytest.raises(UserError, match=words):
        Baseline.of(against, model)
    with pytest.raises(UserError, match="--model-url must be an address; for example"):
        served_by("localhost:8000", "m", "--model-url", "--model")

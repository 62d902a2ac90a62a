"""The model card: what the hub shows of a run."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpoctl.runs.model_card import MARK, refresh_card
from dpoctl.runs.results import fingerprint

RECIPE: dict[str, Any] = {
    "method": "dpo",
    "model": {"model_name_or_path": "me/base"},
    "data": {"train": [{"path": "me/pairs"}, {"path": "own.jsonl"}, {"path": "me/pairs"}]},
    "dpo": {"loss": {"type": "sigmoid", "beta": 0.1}},
    "training": {"output_dir": "run", "global_batch_size": 8, "learning_rate": 1e-6, "run_name": "```\n</details>"},
}
ROWS = [
    {"step": 0, "eval_loss": 0.6931, "eval_rewards/accuracies": 0.0},
    {"step": 10, "loss": 0.6},
    {"step": 10, "eval_loss": 0.55, "eval_rewards/accuracies": 0.75},
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run, as far as a card needs one."""
    folder = tmp_path / "my-run"
    folder.mkdir()
    (folder / "recipe.resolved.yaml").write_text(yaml.safe_dump(RECIPE))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    source = {"path": "a|b<script>.jsonl", "format": "hh", "rows": 9}
    train = {"rows": 12, "used": 9, "rejected": {"too_long": 3}, "sources": [source]}
    (folder / "data_report.json").write_text(json.dumps({"train": train, "evals": {"eval": {"rows": 4, "used": 4}}}))
    (folder / "env.json").write_text(json.dumps({"packages": {"torch": "2.13.0", "numpy": "2"}}))
    comparison = {"metric": "eval_loss", "low": 0.5, "high": 0.6, "value": 0.55, "is_met": True}
    (folder / "expected.json").write_text(json.dumps([comparison]))
    (folder / "adapter_config.json").write_text("{}")
    return folder


def test_the_card_has_results_data_and_recipe_and_what_the_hub_reads(run: Path) -> None:
    refresh_card(run)
    card = (run / "README.md").read_text(encoding="utf-8")
    _, metadata, body = card.split("---\n", 2)
    assert yaml.safe_load(metadata) == {
        "library_name": "peft",
        "base_model": "me/base",
        "datasets": ["me/pairs"],
        "tags": ["dpoctl", "dpo"],
    }
    assert "# my-run\n\nDPO (sigmoid, β 0.1) of me/base, all weights; 10 steps of 8, learning rate 1e-06." in body
    assert "| eval | loss | 0.693 | 0.55 |" in body
    assert "| eval | rewards/accuracies | 0 | 0.75 |" in body
    assert "- eval_loss 0.55, expected 0.5 to 0.6: yes" in body
    assert "| train | 9 of 12 | too\\_long 3 | a\\|b\\<script\\>.jsonl (hh, 9 rows) |" in body
    assert "Made with torch 2.13.0." in body
    fenced = body.split("````yaml\n")[1].split("\n````")[0]
    assert yaml.safe_load(fenced) == RECIPE


def test_an_evaluation_adds_its_verdict(run: Path) -> None:
    (run / "model.safetensors").write_bytes(b"weights")
    result = {
        **dict.fromkeys(("run", "step", "data", "limit", "baseline")),
        "model": fingerprint(run),
        "official": True,
        "date": "2026-11-28",
        "rewards/accuracies": 0.75,
        "rewards/accuracies_ci": [0.7, 0.8],
        "num_pairs": 1000,
    }
    (run / "evals").mkdir()
    (run / "evals" / "official-1.json").write_text(json.dumps(result))
    refresh_card(run)
    said = "The chosen answer has the higher reward in 75 % of 1,000 pairs (95 % interval 70 % to 80 %)."
    assert said in " ".join((run / "README.md").read_text(encoding="utf-8").split())


def test_a_card_that_a_person_has_written_is_kept(run: Path) -> None:
    card = run / "README.md"
    card.write_text("# Mine\n")
    refresh_card(run)
    assert card.read_text() == "# Mine\n"
    card.write_text(f"{MARK}\nold")
    refresh_card(run)
    assert "## Results" in card.read_text(encoding="utf-8")


def test_a_damaged_run_gets_a_warning_and_no_card(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "recipe.resolved.yaml").unlink()
    refresh_card(run)
    assert "the model card was not written" in capsys.readouterr().err
    assert not (run / "README.md").exists()

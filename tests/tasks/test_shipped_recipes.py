"""Every recipe that comes with dpoctl trains: one step of a tiny model of its kind, on rows in the layout of its data.

Of a recipe only the sizes are changed: model, rows, batch and number of steps.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from architectures import BY_TYPE
from format_samples import rows
from real_shapes import SHAPES, gibibytes
from tiny_runs import merge, metrics_of, pair_rows, write_rows
from tiny_world import DEMONSTRATION, save_adapter
from transformers import PreTrainedTokenizerFast

from dpoctl.data import sources
from dpoctl.recipe import parse_recipe
from dpoctl.recipe.shipped import describe_recipe, shipped_recipes

OF_PAIRS = ("reviewer2-contrastive", "reviewer2-sampled")
RECIPES = {name: file for name, file in shipped_recipes().items() if name not in OF_PAIRS}
OF_THE_HUB = {name: file for name, file in RECIPES.items() if describe_recipe(file).gpu}
MESSAGES = "messages"
PAIRS = "ultrafeedback-binarized"
KINDS = {
    "HuggingFaceH4/ultrafeedback_binarized": PAIRS,
    "allenai/llama-3.1-tulu-3-8b-preference-mixture": PAIRS,
    "allenai/olmo-2-1124-7b-preference-mix": PAIRS,
    "princeton-nlp/llama3-ultrafeedback": PAIRS,
    "Anthropic/hh-rlhf": "hh",
    "stanfordnlp/SHP": "shp",
    "Intel/orca_dpo_pairs": "orca",
    "shionhonda/reviewer2-1k-paired": "generic",
    "HuggingFaceH4/no_robots": MESSAGES,
    "HuggingFaceH4/ultrachat_200k": MESSAGES,
    "HuggingFaceTB/smol-smoltalk": MESSAGES,
    "HuggingFaceTB/smoltalk": MESSAGES,
}
"""The format of each data set of the hub, by its name in a recipe."""
SOURCE = re.compile(r"(?:path: |train: \[)([\w.-]+/[\w.-]+)")
CHATS = [{"prompt": "hello?", "prompt_id": str(number), "messages": DEMONSTRATION} for number in range(4)]
Run = Callable[..., dict[str, Any]]
Build = Callable[[str], Path]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Build:
    """Save a tiny model of a type, once; `zephyr` is an adapter on a Mistral."""
    folder = tmp_path_factory.mktemp("models")

    def build(kind: str) -> Path:
        path = folder / kind
        if path.exists():
            return path
        if kind == "zephyr":
            return save_adapter(path, build("mistral"))
        BY_TYPE[kind].build(sliding_window=None, attn_pdrop=0.0).save_pretrained(path)
        tokenizer.save_pretrained(path)
        return path

    return build


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let data sets of the hub have rows in their layout, and note which were asked for."""
    asked: list[str] = []

    def load(path: str, *_: Any, **__: Any) -> datasets.Dataset:
        asked.append(path)
        given = CHATS if KINDS[path] == MESSAGES else rows(KINDS[path])
        return datasets.Dataset.from_list([row for row in given for _ in range(3)])

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(sources, "hub_is_reachable", lambda: True)
    return asked


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains(name: str, train: Run, tiny: Build, hub: list[str], tmp_path: Path) -> None:
    recipe = yaml.safe_load(RECIPES[name].read_text(encoding="utf-8"))
    output = tmp_path / "run"
    changes: dict[str, Any] = {
        "training.output_dir": str(output),
        "training.global_batch_size": 2,
        "training.max_steps": 1,
        "training.eval_steps": 1,
        "training.logging_steps": 1,
    }
    recipe["training"].pop("num_train_epochs", None)
    if "warmup_steps" in recipe["training"]:
        changes["training.warmup_steps"] = 1
    model = recipe["model"].get("model_name_or_path")
    if model is not None:
        kind = "zephyr" if "sft-qlora" in model else SHAPES.get(model, {"model_type": "llama"})["model_type"]
        changes["model.model_name_or_path"] = str(tiny(kind))
    if recipe["data"].get("eval_size"):
        changes["data.eval_size"] = 2
    if name == "reviewer2-sft":
        few = {"path": "demo:reviewer2", "max_samples": 20}
        changes |= {
            "data.train": [few],
            "data.eval": [few | {"split": "test"}],
            "model.from_scratch.tokenizer.vocab_size": 270,
        }
    if name == "reviewer2-dpo":
        pairs = [str(write_rows(tmp_path / "pairs.jsonl", pair_rows(4)))]
        changes |= {"data.train": pairs, "data.eval": list(pairs), "eval.samples": {"num": 1, "max_new_tokens": 2}}
    train(recipe, changes)
    assert [row["step"] for row in metrics_of(output) if "eval_loss" in row][-1] == 1
    assert set(hub) == KINDS.keys() & SOURCE.findall(RECIPES[name].read_text(encoding="utf-8"))
    written = output / "expected.json"
    expected = [one["metric"] for one in json.loads(written.read_text())] if written.exists() else []
    assert expected == list(recipe.get("expected", {}))
    assert (output / "adapter_config.json").exists() == ("lora" in recipe)


@pytest.mark.parametrize("name", OF_THE_HUB)
def test_the_memory_that_a_recipe_states_is_that_of_its_model_and_fits_its_gpus(name: str) -> None:
    text, entry = OF_THE_HUB[name].read_text(encoding="utf-8"), describe_recipe(OF_THE_HUB[name])
    needed = gibibytes(parse_recipe(text, name, command=entry.method))
    assert entry.memory == f"{needed:.1f} GiB"
    number, size = re.fullmatch(r"(?:(\d) x )?(\d+) GB", entry.gpu).groups()  # type: ignore[union-attr]
    assert needed * 2**30 <= 0.75 * int(number or 1) * int(size) * 1e9


def test_the_recipes_are_for_the_models_that_people_ask_for() -> None:
    models = {(name, describe_recipe(file).method) for name, file in RECIPES.items()}
    assert len(models) >= 24
    for family in ("llama31", "qwen3-0.6b", "qwen3-4b", "qwen3-8b", "gemma3-1b", "gemma3-4b", "mistral7b-v03"):
        assert {method for name, method in models if name.startswith(family)} == {"sft", "dpo"}
    for family in ("smollm2-135m", "smollm2-1.7b", "smollm3", "olmo2-1b", "phi4-mini"):
        assert {method for name, method in models if name.startswith(family)} == {"sft", "dpo"}
    assert [name for name, file in RECIPES.items() if merge({}, describe_recipe(file).expected)] == [
        *("mistral7b-lora", "smollm2-1.7b-dpo", "smollm2-135m-dpo", "zephyr-7b-dpo"),
    ]

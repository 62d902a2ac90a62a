"""Fixtures: tiny models saved on disk, recipes that name them, policies loaded from them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_samples import disturb
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dpoctl.model.export import export_model
from dpoctl.model.load import load_policy
from dpoctl.model.policy import Policy
from dpoctl.recipe.schema import Recipe


@pytest.fixture
def make_recipe(tmp_path: Path) -> Callable[..., Recipe]:
    """Make a recipe for the model in `tmp_path / "base"`, with changed sections."""

    def make(path: Path | str | None = None, /, **sections: Any) -> Recipe:
        recipe: dict[str, Any] = {
            "method": "dpo",
            "model": {"model_name_or_path": str(path or tmp_path / "base")},
            "data": {"train": ["pairs.jsonl"]},
            "training": {"output_dir": "run", "learning_rate": 1e-3},
        }
        for name, values in sections.items():
            recipe[name] = {**recipe.get(name, {}), **values}
        return Recipe.model_validate(recipe)

    return make


@pytest.fixture
def save_base(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, tiny_model: Callable[..., PreTrainedModel]
) -> Callable[..., PreTrainedModel]:
    """Save a tiny model and its tokenizer in `tmp_path / "base"`, and return the model."""

    def save(model_type: str = "llama", **changes: Any) -> PreTrainedModel:
        model = tiny_model(model_type, **changes)
        model.save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        return model

    return save


@pytest.fixture
def load(tokenizer: PreTrainedTokenizerFast) -> Callable[[Recipe], Policy]:
    """Load a recipe's policy on the CPU."""
    return lambda recipe: load_policy(recipe, tokenizer, torch.device("cpu"))


@pytest.fixture
def save_sft(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    make_recipe: Callable[..., Recipe],
    load: Callable[[Recipe], Policy],
) -> Callable[..., Path]:
    """Save an SFT adapter with random weights in `tmp_path / "sft"`."""

    def save(**lora: Any) -> Path:
        policy = load(make_recipe(lora={"r": 4, "lora_alpha": 12, **lora}))
        disturb(policy)
        export_model(policy, tmp_path / "sft", tokenizer)
        return tmp_path / "sft"

    return save


@pytest.fixture
def stderr(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """Return the new output on stderr, on one line."""
    return lambda: " ".join(capsys.readouterr().err.split())

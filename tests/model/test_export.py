"""What is exported is what was trained, for anyone who has transformers and peft."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_samples import disturb, logps, plain
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer

from dpoctl.model.policy import Policy

ROUTES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {"r": 4}),
    "llama rslora": ("llama", {}, {"r": 4, "use_rslora": True, "lora_alpha": 5.5, "target_modules": ["q_proj"]}),
    "llama tied, saved head": ("llama", {"tie_word_embeddings": True}, {"r": 4, "modules_to_save": ["lm_head"]}),
    "llama tied, adapted head": (
        "llama",
        {"tie_word_embeddings": True},
        {"r": 4, "target_modules": ["lm_head", "q_proj"]},
    ),
    "mistral": ("mistral", {}, {"r": 4, "modules_to_save": ["embed_tokens"]}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}, {"r": 4}),
    "gpt2": ("gpt2", {}, {"r": 4}),
    "gpt2 head": ("gpt2", {}, {"r": 4, "target_modules": ["c_attn", "lm_head"]}),
    "mixtral": ("mixtral", {}, {"r": 4}),
}


@pytest.mark.parametrize(("model_type", "changes", "lora"), ROUTES.values(), ids=ROUTES.keys())
def test_an_adapter_gives_the_trained_log_probs_in_plain_peft(
    tmp_path: Path,
    tokenizer: Any,
    save_base: Any,
    make_recipe: Any,
    load: Callable[..., Policy],
    model_type: str,
    changes: dict[str, Any],
    lora: dict[str, Any],
) -> None:
    base = save_base(model_type, **changes)
    policy = load(make_recipe(lora=lora))
    disturb(policy)
    trained = logps(policy.causal)
    assert (trained - logps(base)).abs().max() > 0.1
    policy.export(tmp_path / "run", tokenizer)
    again = plain(tmp_path / "base", tmp_path / "run")
    assert (logps(again) - trained).abs().max() < 1e-5
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert config["inference_mode"]
    assert AutoTokenizer.from_pretrained(tmp_path / "run").chat_template == tokenizer.chat_template


STACKS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "same targets": ("llama", {}, {"r": 2}),
    "other ranks, alphas and targets": (
        "llama",
        {"r": 8, "lora_alpha": 3, "target_modules": ["q_proj", "up_proj", "embed_tokens"]},
        {"r": 2, "use_rslora": True, "target_modules": ["q_proj", "lm_head", "embed_tokens"]},
    ),
    "saved by the first": ("llama", {"modules_to_save": ["lm_head"]}, {"r": 2}),
    "saved by the second": ("llama", {}, {"r": 2, "modules_to_save": ["lm_head"]}),
    "saved by both": (
        "llama",
        {"modules_to_save": ["lm_head"]},
        {"r": 2, "modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    "gpt2": ("gpt2", {"target_modules": ["c_attn"]}, {"r": 2}),
}


@pytest.mark.parametrize(("model_type", "first", "second"), STACKS.values(), ids=STACKS.keys())
@pytest.mark.parametrize("tied", [False, True])
def test_a_new_adapter_over_an_sft_adapter_is_exported_as_one(
    tmp_path: Path,
    tokenizer: Any,
    save_base: Any,
    save_sft: Any,
    make_recipe: Any,
    load: Callable[..., Policy],
    model_type: str,
    first: dict[str, Any],
    second: dict[str, Any],
    tied: bool,
) -> None:
    save_base(model_type, tie_word_embeddings=tied)
    policy = load(make_recipe(save_sft(**first), lora={"start": "new", **second}))
    disturb(policy)
    trained = logps(policy.causal)
    policy.export(tmp_path / "run", tokenizer)
    assert (logps(plain(tmp_path / "base", tmp_path / "run")) - trained).abs().max() < 1e-4


def test_the_joined_adapter_names_targets_as_people_do(
    tmp_path: Path, tokenizer: Any, save_base: Any, save_sft: Any, make_recipe: Any, load: Callable[..., Policy]
) -> None:
    save_base("llama")
    sft = save_sft(r=4, target_modules=["q_proj"])
    load(make_recipe(sft, lora={"start": "new", "r": 2, "target_modules": ["q_proj"]})).export(
        tmp_path / "run", tokenizer
    )
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj"]
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (6, 6, {})


def test_a_continued_adapter_is_exported_without_its_frozen_copy(
    tmp_path: Path, tokenizer: Any, save_base: Any, save_sft: Any, make_recipe: Any, load: Callable[..., Policy]
) -> None:
    save_base("llama")
    sft = save_sft(modules_to_save=["lm_head"])
    policy = load(make_recipe(sft, lora={"start": "continue"}))
    disturb(policy)
    policy.export(tmp_path / "run", tokenizer)
    names = [set(load_file(folder / "adapter_model.safetensors")) for folder in (sft, tmp_path / "run")]
    assert names[0] == names[1]
    assert (logps(plain(tmp_path / "base", tmp_path / "run")) - logps(policy.causal)).abs().max() < 1e-5


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3", "mixtral"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_whole_model_gives_the_trained_log_probs_in_plain_transformers(
    tmp_path: Path,
    tokenizer: Any,
    save_base: Any,
    make_recipe: Any,
    load: Callable[..., Policy],
    model_type: str,
    tied: bool,
) -> None:
    save_base(model_type, tie_word_embeddings=tied)
    policy = load(make_recipe())
    disturb(policy)
    policy.export(tmp_path / "run", tokenizer)
    assert torch.equal(logps(plain(tmp_path / "run")), logps(policy.causal))
    with safe_open(tmp_path / "run" / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) is not tied  # noqa: SIM118


def test_a_whole_model_is_saved_in_the_compute_dtype_with_its_own_configuration(
    tmp_path: Path, tokenizer: Any, save_base: Any, make_recipe: Any, load: Callable[..., Policy]
) -> None:
    save_base("llama", attention_dropout=0.25)
    before = json.loads((tmp_path / "base" / "config.json").read_text())
    policy = load(make_recipe(model={"dtype": "bfloat16"}))
    policy.causal.set_attn_implementation("eager")
    assert policy.causal.config.use_cache is False
    policy.export(tmp_path / "run", tokenizer)
    after = json.loads((tmp_path / "run" / "config.json").read_text())
    assert after.pop("dtype") == "bfloat16"
    assert before.pop("dtype") == "float32"
    assert after == before
    with safe_open(tmp_path / "run" / "model.safetensors", "pt") as file:
        assert file.get_tensor("model.norm.weight").dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in policy.model.parameters())


def test_a_failed_export_leaves_what_was_there(
    tmp_path: Path, save_base: Any, tokenizer: Any, make_recipe: Any, load: Callable[..., Policy]
) -> None:
    save_base("llama")
    policy = load(make_recipe(lora={"r": 4}))
    run = tmp_path / "run"
    policy.export(run, tokenizer)
    (run / "README.md").write_text("mine")
    files = {file.name: file.read_bytes() for file in run.iterdir()}

    class Broken:
        def save_pretrained(self, folder: Path) -> None:
            raise OSError("no space left")

    disturb(policy)
    with pytest.raises(OSError, match="no space"):
        policy.export(run, Broken())  # type: ignore[arg-type]
    assert {file.name: file.read_bytes() for file in run.iterdir()} == files

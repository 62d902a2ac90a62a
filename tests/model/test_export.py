"""An export, loaded with transformers and peft alone, computes the same as the trained policy."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from model_samples import disturb, logps, plain
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig

from dpoctl.model import export
from dpoctl.model.export import export_model
from dpoctl.model.generate import stops_of
from dpoctl.model.load import load_run
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
    "llama dora": ("llama", {"tie_word_embeddings": True}, {"r": 4, "use_dora": True, "modules_to_save": ["lm_head"]}),
    "gpt2 dora": ("gpt2", {}, {"r": 4, "use_dora": True, "use_rslora": True}),
    "llama ranks": ("llama", {}, {"r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.*": 7}}),
    "llama one layer": ("llama", {}, {"r": 4, "layers_to_transform": [1]}),
    "llama expression": ("llama", {}, {"r": 4, "target_modules": r".*layers\.0.*(q|up)_proj"}),
}


@pytest.mark.parametrize(("model_type", "changes", "lora"), ROUTES.values(), ids=ROUTES.keys())
def test_an_adapter_gives_the_same_logps_in_peft(
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
    export_model(policy, tmp_path / "run", tokenizer)
    loaded = plain(tmp_path / "base", tmp_path / "run")
    assert (logps(loaded) - trained).abs().max() < 1e-5
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
def test_a_new_adapter_and_an_sft_adapter_are_exported_as_one(
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
    export_model(policy, tmp_path / "run", tokenizer)
    assert (logps(plain(tmp_path / "base", tmp_path / "run")) - trained).abs().max() < 1e-4


def test_the_joined_adapter_has_short_target_names(
    tmp_path: Path, tokenizer: Any, save_base: Any, save_sft: Any, make_recipe: Any, load: Callable[..., Policy]
) -> None:
    save_base("llama")
    sft = save_sft(r=4, target_modules=["q_proj"])
    export_model(
        load(make_recipe(sft, lora={"start": "new", "r": 2, "target_modules": ["q_proj"]})), tmp_path / "run", tokenizer
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
    export_model(policy, tmp_path / "run", tokenizer)
    names = [set(load_file(folder / "adapter_model.safetensors")) for folder in (sft, tmp_path / "run")]
    assert names[0] == names[1]
    assert (logps(plain(tmp_path / "base", tmp_path / "run")) - logps(policy.causal)).abs().max() < 1e-5


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3", "mixtral"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_whole_model_gives_the_same_logps_in_transformers(
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
    export_model(policy, tmp_path / "run", tokenizer)
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
    export_model(policy, tmp_path / "run", tokenizer)
    after = json.loads((tmp_path / "run" / "config.json").read_text())
    assert after.pop("dtype") == "bfloat16"
    assert before.pop("dtype") == "float32"
    assert after == before
    with safe_open(tmp_path / "run" / "model.safetensors", "pt") as file:
        assert file.get_tensor("model.norm.weight").dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in policy.model.parameters())


def test_a_failed_export_changes_no_file(
    tmp_path: Path, save_base: Any, tokenizer: Any, make_recipe: Any, load: Callable[..., Policy]
) -> None:
    save_base("llama")
    policy = load(make_recipe(lora={"r": 4}))
    run = tmp_path / "run"
    export_model(policy, run, tokenizer)
    (run / "README.md").write_text("mine")
    files = {file.name: file.read_bytes() for file in run.iterdir()}

    class Broken:
        def save_pretrained(self, folder: Path) -> None:
            raise OSError("no space left")

    disturb(policy)
    with pytest.raises(OSError, match="no space"):
        export_model(policy, run, Broken())  # type: ignore[arg-type]
    assert {file.name: file.read_bytes() for file in run.iterdir()} == files


END_OF_TEXT, END_OF_TURN, OTHER = 0, 2, 7  # the base stops at one, the template ends turns with another


@pytest.mark.parametrize("lora", [None, {"r": 2}], ids=["whole", "adapter"])
@pytest.mark.parametrize("own", [END_OF_TEXT, [END_OF_TEXT, OTHER], None], ids=str)
def test_an_export_stops_where_training_ended_turns(
    tmp_path: Path, tokenizer: Any, save_base: Any, make_recipe: Any, load: Callable[..., Policy], own: Any, lora: Any
) -> None:
    base = save_base("llama", eos_token_id=None)
    base.generation_config.eos_token_id = own
    base.generation_config.repetition_penalty = 1.5
    base.generation_config.save_pretrained(tmp_path / "base")
    export_model(load(make_recipe(**({} if lora is None else {"lora": lora}))), tmp_path / "run", tokenizer)
    saved = GenerationConfig.from_pretrained(tmp_path / "run")
    stops = saved.eos_token_id if isinstance(saved.eos_token_id, list) else [saved.eos_token_id]
    others = own if isinstance(own, list) else [] if own is None else [own]
    assert stops == [END_OF_TURN, *others]
    assert (saved.pad_token_id, saved.repetition_penalty) == (tokenizer.pad_token_id, 1.5)
    run = load_run(tmp_path / "run", torch.device("cpu"), torch.float32)
    assert stops_of(run.causal, tokenizer) == tuple(stops)


def test_peft_generates_to_the_end_of_a_turn_with_the_settings_of_the_run(
    tmp_path: Path, tokenizer: Any, save_base: Any, make_recipe: Any, load: Callable[..., Policy]
) -> None:
    from peft import AutoPeftModelForCausalLM

    save_base("llama", eos_token_id=END_OF_TEXT)
    policy = load(make_recipe(lora={"r": 2, "modules_to_save": ["lm_head"]}))
    head: Any = policy.causal.lm_head
    with torch.no_grad():
        head.modules_to_save["default"].weight.zero_()  # all scores are equal, and the lowest id is chosen
    policy.causal.config.bos_token_id = None
    export_model(policy, tmp_path / "run", tokenizer)
    settings = GenerationConfig.from_pretrained(tmp_path / "run", eos_token_id=[END_OF_TURN, END_OF_TEXT])
    loaded: Any = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run", generation_config=settings)
    assert loaded.generation_config.eos_token_id == [END_OF_TURN, END_OF_TEXT]
    written = loaded.generate(input_ids=torch.tensor([[5, 6]]), max_new_tokens=8, do_sample=False)
    assert written.shape[1] == 3


def test_the_stops_of_an_sft_adapter_stay_those_of_the_adapter_trained_on_it(
    tmp_path: Path, tokenizer: Any, save_base: Any, save_sft: Any, make_recipe: Any, load: Callable[..., Policy]
) -> None:
    save_base("llama", eos_token_id=END_OF_TEXT)
    sft = save_sft()
    settings = json.loads((sft / "generation_config.json").read_text())
    (sft / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [END_OF_TURN, OTHER]}))
    export_model(load(make_recipe(sft, lora={"start": "new", "r": 2})), tmp_path / "run", tokenizer)
    assert GenerationConfig.from_pretrained(tmp_path / "run").eos_token_id == [END_OF_TURN, OTHER]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's files."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    ("model_type", "changes"), [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("mixtral", {})]
)
def test_a_sharded_model_has_the_tensors_of_one_that_is_not_in_several_files(
    model_type: str,
    changes: dict[str, Any],
    tmp_path: Path,
    tokenizer: Any,
    save_base: Any,
    make_recipe: Any,
    load: Callable[..., Policy],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_base(model_type, **changes)
    policy = load(make_recipe())
    export_model(policy, tmp_path / "whole", tokenizer)
    monkeypatch.setattr(export, "FILE_BYTES", 50_000)
    one: Any = SimpleNamespace(whole=torch.Tensor.detach)
    export_model(policy, tmp_path / "parts", tokenizer, sharding=one)
    expected, found = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "parts")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert torch.equal(logps(plain(tmp_path / "parts")), logps(plain(tmp_path / "whole")))

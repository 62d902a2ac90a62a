"""A merged model is base + adapter in one folder, for anyone who has transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_samples import logps, plain
from safetensors import SafetensorError, safe_open
from tiny_runs import merge as merged_settings
from transformers import AutoTokenizer, GenerationConfig

from dpoctl.errors import DiskError, RunError, UsageError
from dpoctl.files import temporary_folder
from dpoctl.tasks import merge

Run = Callable[..., dict[str, Any]]
LORA = {"lora": {"r": 4, "lora_alpha": 8}, "training.learning_rate": 1e-2}


def greedy(model: Any, folder: Path | str) -> str:
    """What plain transformers writes, most likely token by token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "is the paper maybe a method?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        out = model.generate(**ids, max_new_tokens=24, do_sample=False)
    return str(tokenizer.decode(out[0]))


def base_of(run: Path | str) -> Path:
    return Path(json.loads((Path(run) / "adapter_config.json").read_text())["base_model_name_or_path"])


def assert_same_model(run: Path, merged: Path) -> None:
    one, two = plain(merged), plain(base_of(run), run)
    assert (logps(one) - logps(two)).abs().max() < 1e-4
    assert (logps(one) - logps(plain(base_of(run)))).abs().max() > 0.05
    two.generation_config = GenerationConfig.from_pretrained(run)
    assert GenerationConfig.from_pretrained(merged).eos_token_id == two.generation_config.eos_token_id
    assert greedy(one, merged) == greedy(two, run)


def test_a_merged_model_generates_what_base_and_adapter_do(
    dpo_recipe: dict[str, Any], train: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(train(dpo_recipe, LORA)["training"]["output_dir"])
    capsys.readouterr()
    merge.run(run, json_output=True)
    said = json.loads(capsys.readouterr().out)
    assert said["output"] == str(run / "merged")
    assert said["error"] < said["allowed"] < said["effect"]
    assert_same_model(run, run / "merged")
    names = {file.name for file in (run / "merged").iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert "adapter_config.json" not in names
    assert AutoTokenizer.from_pretrained(run / "merged").chat_template
    settings = json.loads((run / "merged" / "generation_config.json").read_text())
    assert AutoTokenizer.from_pretrained(run).eos_token_id in [settings["eos_token_id"]]
    assert len({file.stat().st_mode for file in (run / "merged").iterdir()}) == 1


@pytest.mark.long("new")
@pytest.mark.parametrize("start", ["new", "continue"])
def test_a_run_over_an_sft_adapter_merges_both(
    start: str, sft_recipe: dict[str, Any], dpo_recipe: dict[str, Any], train: Run, tmp_path: Path
) -> None:
    sft = train(sft_recipe, LORA | {"training.output_dir": str(tmp_path / "sft")})["training"]["output_dir"]
    lora = {"start": start} if start == "continue" else {"start": start, "r": 3, "lora_alpha": 5}
    run = Path(train(dpo_recipe, {"model.model_name_or_path": sft, "lora": lora})["training"]["output_dir"])
    merge.run(run, output=tmp_path / "plain")
    assert_same_model(run, tmp_path / "plain")


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=str,
)
def test_tied_ends_that_the_adapter_tells_apart_stay_apart(
    lora: dict[str, Any], dpo_recipe: dict[str, Any], tiny_model: Any, train: Run
) -> None:
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(dpo_recipe["model"]["model_name_or_path"])
    run = Path(train(dpo_recipe, merged_settings(LORA, {"lora": LORA["lora"] | lora}))["training"]["output_dir"])
    merge.run(run)
    assert_same_model(run, run / "merged")


def test_a_run_over_4_bit_weights_is_merged_into_the_original_ones(
    dpo_recipe: dict[str, Any], tiny_model: Any, train: Run
) -> None:
    pytest.importorskip("bitsandbytes")
    tiny_model("llama").to(torch.bfloat16).save_pretrained(dpo_recipe["model"]["model_name_or_path"])
    run = Path(train(dpo_recipe, LORA | {"quantization": {"load_in_4bit": True}})["training"]["output_dir"])
    merge.run(run)
    config = json.loads((run / "merged" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    with safe_open(run / "merged" / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    exact = logps(plain(base_of(run), run))
    assert (logps(plain(run / "merged")) - exact).square().mean().sqrt() < 0.05


def test_the_precision_of_the_merged_weights_can_be_chosen(dpo_recipe: dict[str, Any], train: Run) -> None:
    run = Path(train(dpo_recipe, LORA)["training"]["output_dir"])
    merge.run(run, dtype="float16")
    assert json.loads((run / "merged" / "config.json").read_text())["dtype"] == "float16"


def test_what_cannot_be_merged_is_refused_in_one_line(dpo_recipe: dict[str, Any], train: Run, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a run"):
        merge.run(tmp_path)
    whole = Path(train(dpo_recipe)["training"]["output_dir"])
    with pytest.raises(UsageError, match="has no adapter: all weights were trained"):
        merge.run(whole)
    (whole / "config.json").unlink()
    with pytest.raises(UsageError, match="has not finished"):
        merge.run(whole)
    run = Path(train(dpo_recipe, LORA | {"training.output_dir": str(tmp_path / "adapter")})["training"]["output_dir"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(UsageError, match="already exists"):
        merge.run(run, output=tmp_path / "mine")
    base = json.loads((base_of(run) / "config.json").read_text())
    quantised = base | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (base_of(run) / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(UsageError, match="adapters are not merged into quantised weights"):
        merge.run(run)


def test_a_merge_that_computes_something_else_leaves_nothing(
    dpo_recipe: dict[str, Any], train: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(train(dpo_recipe, LORA)["training"]["output_dir"])
    before = sorted(run.iterdir())
    monkeypatch.setattr(merge, "merge_adapter", lambda policy: policy.model.unload())
    with pytest.raises(RunError, match="differs from base"):
        merge.run(run)
    assert sorted(run.iterdir()) == before


def test_the_check_works_without_the_data(dpo_recipe: dict[str, Any], pairs: Path, train: Run) -> None:
    run = Path(train(dpo_recipe, LORA)["training"]["output_dir"])
    pairs.unlink()
    merge.run(run)
    assert (run / "merged" / "model.safetensors").is_file()


def test_what_a_killed_merge_left_is_removed_and_what_a_neighbour_writes_is_not(
    dpo_recipe: dict[str, Any], train: Run
) -> None:
    run = Path(train(dpo_recipe, LORA)["training"]["output_dir"])
    (run / ".merged.0a1b2c3d.tmp").mkdir()
    (run / ".merged.0a1b2c3d.tmp" / "model.safetensors").write_text("torn")
    with temporary_folder(run / "merged") as neighbour:
        merge.run(run)
        assert list(run.glob(".*.tmp")) == [neighbour]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left (os error 28)")]
)
def test_a_full_disk_ends_a_merge_in_one_line_and_leaves_nothing(
    error: Exception, dpo_recipe: dict[str, Any], train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(train(dpo_recipe, LORA)["training"]["output_dir"])

    def full(model: Any, folder: Path, tokenizer: Any) -> None:
        (folder / "model.safetensors").write_text("half")
        raise error

    monkeypatch.setattr(merge, "save_merged", full)
    target = tmp_path / "elsewhere" / "merged"
    said = rf"^{target.parent} cannot be written: the disk is full \([\d.,]+ .B free\); free some disk space"
    with pytest.raises(DiskError, match=said):
        merge.run(run, output=target)
    assert list(target.parent.iterdir()) == []

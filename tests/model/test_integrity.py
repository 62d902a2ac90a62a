"""What the files of a model must be, and what is said of those that are not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_world import save_adapter
from transformers import AutoModelForCausalLM, GPT2Config

from dpoctl.errors import SetupError
from dpoctl.model.export import export_model
from dpoctl.model.integrity import fingerprint_model, verify_export
from dpoctl.model.load import load_run
from dpoctl.model.policy import Policy
from dpoctl.model.source import find_source
from dpoctl.model.tokenizer import read_tokenizer

CPU = torch.device("cpu")


def setting(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    held = load_file(folder / "model.safetensors")
    change(held)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


def flip(file: Path) -> None:
    """Flip one bit of the last number."""
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)


def config(**values: Any) -> Callable[[Path], object]:
    return lambda folder: setting(folder / "config.json", **values)


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "a layer less": (
        config(num_hidden_layers=1),
        r"hold the weight 'model\.layers\.1\..* and 8 more, for which there is no",
    ),
    "a layer more": (
        config(num_hidden_layers=3),
        r"num_hidden_layers in config.json is 3, and its files hold 2 layers",
    ),
    "no layers": (config(num_hidden_layers=-1), r"num_hidden_layers in config.json is -1, and not a whole number of 1"),
    "a million layers": (
        config(num_hidden_layers=10**9),
        r"num_hidden_layers in config.json is 1000000000, and its files",
    ),
    "a width that is too large": (
        config(hidden_size=10**9),
        r"has shape \[384, 64\] in model.safetensors, and \[384, 1000000000\] by",
    ),
    "a setting of another kind": (
        config(rope_parameters={"rope_type": 7}),
        r"config.json: rope_parameters is .*: KeyError",
    ),
    "a rate of 7": (config(attention_dropout=7), r"attention_dropout in config.json is 7, and not a number from 0"),
    "architectures of numbers": (
        config(architectures=[1]),
        r"architectures in config.json is \[1\], and not a list of",
    ),
    "no config": (lambda f: (f / "config.json").write_text("[]"), "config.json"),
    "biases that are dropped": (
        lambda f: tensors(f, lambda held: held.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)})),
        r"hold the weight 'model.layers.0.self_attn.q_proj.bias', for which there is no place in the LlamaForCausalLM",
    ),
    "one weight twice": (
        lambda f: tensors(f, lambda held: held.update({"norm.weight": torch.ones(64)})),
        r"'norm.weight' and 'model.norm.weight' are two values of one weight|"
        r"'model.norm.weight' and 'norm.weight' are two values of one weight",
    ),
    "a weight less": (
        lambda f: tensors(f, lambda held: held.pop("model.norm.weight")),
        "lacks the weight 'model.norm.weight'",
    ),
    "whole numbers": (
        lambda f: tensors(f, lambda held: held.update({"model.norm.weight": torch.ones(64, dtype=torch.int64)})),
        r"'model.norm.weight' in model.safetensors has numbers of type I64, and weights are floating-point",
    ),
    "a file that is cut": (
        lambda f: (f / "model.safetensors").write_bytes(b"12345678"),
        r"model.safetensors is damaged: ",
    ),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        "it has no model.safetensors; save it with safetensors",
    ),
    "generation settings": (
        lambda f: (f / "generation_config.json").write_text('{"eos_token_id": {"a": 1}}'),
        r"eos_token_id in generation_config.json is .*, and not a token id",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_files_and_configuration_must_describe_one_model(what: str, tiny_llama_folder: Path) -> None:
    change, message = WRONG[what]
    change(tiny_llama_folder)
    with pytest.raises(SetupError, match=message):
        load_run(tiny_llama_folder, CPU, torch.float32)


def test_weights_that_the_patterns_of_transformers_let_pass_are_refused_too(tmp_path: Path) -> None:
    """The biases of `c_attn` match the pattern for the causal masks of old checkpoints, `attn.bias`."""
    gpt2 = GPT2Config(vocab_size=384, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    AutoModelForCausalLM.from_config(gpt2).save_pretrained(tmp_path)
    masks = {f"transformer.h.{n}.attn.bias": torch.ones(1, 1, 64, 64) for n in (0, 1)}
    tensors(tmp_path, lambda held: held.update(masks))
    load_run(tmp_path, CPU, torch.float32)
    tensors(tmp_path, lambda held: held.update({"transformer.h.2.attn.c_attn.bias": torch.ones(96)}))
    with pytest.raises(SetupError, match=r"hold the weight 'transformer.h.2.attn.c_attn.bias', for which"):
        load_run(tmp_path, CPU, torch.float32)


INDEX = "model.safetensors.index.json"


def move(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    files = sorted(set(index.values()))
    name = next(name for name, file in index.items() if file == files[0])
    setting(folder / INDEX, weight_map=index | {name: files[1]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: setting(f / INDEX, weight_map={}),
            "weight_map in model.safetensors.index.json does not name a file",
        ),
        (
            lambda f: setting(f / INDEX, weight_map={"a": "../x.safetensors"}),
            r"names the file '../x.safetensors', which",
        ),
        (move, r"model.safetensors.index.json has the weight '.*' in model-00002-of-.*, and it is in model-00001-of-"),
        (lambda f: next(f.glob("model-00002*")).unlink(), r"names the file 'model-00002-.*', which is not there"),
    ],
)
def test_an_index_must_be_that_of_its_files(
    change: Callable[[Path], object], message: str, tiny_llama: Any, tmp_path: Path
) -> None:
    tiny_llama.save_pretrained(tmp_path, max_shard_size="200KB")
    load_run(tmp_path, CPU, torch.float32)
    change(tmp_path)
    with pytest.raises(SetupError, match=message):
        load_run(tmp_path, CPU, torch.float32)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", {"model_max_length": [1]}, r"tokenizer_config.json: model_max_length is \[1\]: "),
        ("tokenizer_config.json", {"pad_token": False}, r"tokenizer_config.json: pad_token is false: "),
        ("tokenizer.json", {"model": {"type": "BPE"}}, r"tokenizer.json: "),
        ("config.json", {"vocab_size": "x"}, r"vocab_size in config\.json is"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_refused_with_file_and_setting(
    file: str, content: dict[str, Any], message: str, tiny_llama_folder: Path
) -> None:
    setting(tiny_llama_folder / file, **content)
    with pytest.raises(SetupError, match=message):
        read_tokenizer(find_source(str(tiny_llama_folder)))


@pytest.fixture
def exported(tiny_llama_folder: Path, tokenizer: Any, tmp_path: Path) -> Path:
    policy = load_run(tiny_llama_folder, CPU, torch.float32)
    export_model(policy, tmp_path / "run", tokenizer)
    return tmp_path / "run"


def test_a_flipped_bit_in_an_export_is_told(exported: Path) -> None:
    load_run(exported, CPU, torch.float32)
    flip(exported / "model.safetensors")
    with pytest.raises(SetupError, match=r"run/model.safetensors is damaged: .*delete .*model_manifest.json"):
        load_run(exported, CPU, torch.float32)
    (exported / "model_manifest.json").unlink()
    assert isinstance(load_run(exported, CPU, torch.float32), Policy)


def test_other_files_of_an_export_may_be_edited_and_are_named(
    exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setting(exported / "generation_config.json", max_length=9)
    (exported / "chat_template.jinja").unlink()
    verify_export(find_source(str(exported)))
    said = capsys.readouterr().err
    assert "run: changed since the model was exported: chat_template.jinja, generation_config.json" in said


def test_a_manifest_cannot_be_edited_and_covers_the_weights_that_are_used(exported: Path) -> None:
    (exported / "model.safetensors").rename(exported / "other.safetensors")
    setting(exported / "config.json", transformers_weights="other.safetensors")
    with pytest.raises(SetupError, match=r"other.safetensors is not a file of the exported model"):
        load_run(exported, CPU, torch.float32)
    setting(exported / "model_manifest.json", files={})
    with pytest.raises(SetupError, match=r"model_manifest.json is damaged"):
        load_run(exported, CPU, torch.float32)


def test_an_adapter_whose_base_has_changed_is_told(
    tiny_llama_folder: Path, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = load_run(save_adapter(tmp_path / "adapter", tiny_llama_folder), CPU, torch.float32)
    known = fingerprint_model(find_source(str(tiny_llama_folder)))["weights"]
    export_model(adapter, tmp_path / "run", tokenizer, base_weights=known)
    load_run(tmp_path / "run", CPU, torch.float32)
    assert "warning" not in capsys.readouterr().err
    tensors(tiny_llama_folder, lambda held: held["model.norm.weight"].add_(1e-3))
    load_run(tmp_path / "run", CPU, torch.float32)
    assert "run' was trained on other weights than those of its base " in capsys.readouterr().err
    flip(tmp_path / "run" / "adapter_model.safetensors")
    with pytest.raises(SetupError, match=r"adapter_model.safetensors is damaged: "):
        load_run(tmp_path / "run", CPU, torch.float32)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 10**9}, r"has rank 2 in adapter_model.safetensors, and r is 1000000000 in adapter_config.json"),
        ({"r": "two"}, r"r in adapter_config.json is no number of 1 or more"),
        ({"lora_alpha": None}, r"lora_alpha in adapter_config.json is no number"),
        ({"target_modules": [1]}, r"target_modules in adapter_config.json is no list of names"),
        ({"layers_to_transform": 1.5}, r"does not fit its base model: "),
    ],
)
def test_a_setting_of_an_adapter_that_is_wrong_is_refused_by_its_name(
    values: dict[str, Any], message: str, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "adapter", tiny_llama_folder)
    setting(adapter / "adapter_config.json", **values)
    with pytest.raises(SetupError, match=message):
        load_run(adapter, CPU, torch.float32)


def test_an_export_into_a_folder_that_something_blocks_is_one_line(tiny_llama_folder: Path, tokenizer: Any) -> None:
    policy = load_run(tiny_llama_folder, CPU, torch.float32)
    (tiny_llama_folder / "config.json").unlink()
    (tiny_llama_folder / "config.json").mkdir()
    with pytest.raises(SetupError, match=r"config.json cannot be written: Is a directory; remove what is there"):
        export_model(policy, tiny_llama_folder, tokenizer)
    assert not list(tiny_llama_folder.glob(".export-*"))

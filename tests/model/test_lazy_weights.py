"""Lazy weights: what a model gets that is read in parts equals, bit by bit, what one gets that is loaded whole."""

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from architectures import ARCHITECTURES, BY_TYPE
from forked import fork
from huggingface_hub import constants
from model_samples import disturb
from safetensors.torch import load_file, save_file
from tiny_world import HUB_ID, fill_hub_cache, save_llama
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from dpoctl.errors import SetupError
from dpoctl.model import sharding
from dpoctl.model.export import export_model
from dpoctl.model.fused_layers import fuse_layers
from dpoctl.model.lazy_weights import StoredTensor, is_lazy, read_whole
from dpoctl.model.load import _load_weights, load_policy, load_run
from dpoctl.model.sharding import Sharding, is_sharded
from dpoctl.model.source import find_source
from dpoctl.recipe.schema import QuantizationSection, Recipe

CPU = torch.device("cpu")
MIB = 1 << 20
SHORT = ["llama", "gemma2", "gpt2", "falcon_h1", "gemma4_text"]
CONVERTED = ["mixtral", "qwen3_next"]
TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
PACKED = QuantizationSection(load_in_4bit=True)


def loaded(folder: Path, *, lazy: bool, dtype: torch.dtype = torch.float32, packed: Any = None) -> Any:
    return _load_weights(find_source(str(folder)), "auto", dtype, CPU, packed, keep=[], lora=True, lazy=lazy)


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, those of tied layers under both names."""
    return {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}


def assert_same_when_read(folder: Path, **options: Any) -> Any:
    """Load a model both ways, read all of it, compare, and return it."""
    whole, lazy = loaded(folder, lazy=False, **options), loaded(folder, lazy=True, **options)
    assert any(map(is_lazy, lazy.parameters()))
    read_whole(lazy)
    expected, found = tensors(whole), tensors(lazy)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    assert len(list(lazy.parameters())) == len(list(whole.parameters()))
    assert lazy.generation_config.to_dict() == whole.generation_config.to_dict()
    assert lazy.config.to_dict() == whole.config.to_dict()
    assert lazy.name_or_path == whole.name_or_path
    return lazy


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the weights in a folder."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_every_architecture_is_read_as_it_is_loaded(
    tmp_path: Path, pytestconfig: pytest.Config, stderr: Callable[[], str]
) -> None:
    all_faults = pytestconfig.getoption("--all-faults", default=False)
    for architecture in ARCHITECTURES:
        kind = architecture.model_type
        if not all_faults and kind not in SHORT + CONVERTED:
            continue
        folder = tmp_path / kind
        architecture.build().save_pretrained(folder)
        lazy = loaded(folder, lazy=True, dtype=torch.bfloat16)
        said = stderr()
        if any(map(is_lazy, lazy.parameters())):
            assert_same_when_read(folder, dtype=torch.bfloat16)
            assert kind not in CONVERTED
        else:
            assert kind not in SHORT
            assert "cannot be read in parts: each process loads all of it before it is divided" in said


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_quantised_weights_have_the_bits_of_a_model_that_is_loaded_whole(
    kind: str, tmp_path: Path, tiny_model: Any
) -> None:
    tiny_model(kind).save_pretrained(tmp_path)
    lazy = assert_same_when_read(tmp_path, dtype=torch.bfloat16, packed=PACKED)
    whole = loaded(tmp_path, lazy=False, dtype=torch.bfloat16, packed=PACKED)
    packed = {name: p for name, p in lazy.named_parameters() if type(p).__name__ == "Params4bit"}
    assert packed
    for name, parameter in packed.items():
        state, expected = parameter.quant_state, whole.get_parameter(name).quant_state
        assert torch.equal(state.absmax, expected.absmax)
        assert state.shape == expected.shape
        assert lazy.get_submodule(name.removesuffix(".weight")).quant_state is state


@pytest.mark.parametrize("equal", [True, False])
def test_tied_weights_that_are_both_stored_are_tied_if_they_are_equal(
    equal: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    save_llama(tmp_path, tokenizer, tie_word_embeddings=True)
    head = "lm_head.weight"
    edit(tmp_path, lambda state: state.update({head: state["model.embed_tokens.weight"] * (1.0 if equal else 2.0)}))
    lazy = assert_same_when_read(tmp_path)
    assert (lazy.lm_head.weight is lazy.model.embed_tokens.weight) == equal


def test_a_head_that_alone_is_stored_is_the_embedding_too(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    save_llama(tmp_path, tokenizer, tie_word_embeddings=True)
    edit(tmp_path, lambda state: state.update({"lm_head.weight": state.pop("model.embed_tokens.weight")}))
    lazy = assert_same_when_read(tmp_path)
    assert lazy.lm_head.weight is lazy.model.embed_tokens.weight


def test_names_in_the_files_are_mapped_as_transformers_maps_them(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    save_llama(tmp_path / "tied", tokenizer, tie_word_embeddings=True)
    AutoModel.from_pretrained(tmp_path / "tied").save_pretrained(tmp_path / "backbone")
    assert not any(name.startswith("model.") for name in load_file(tmp_path / "backbone" / "model.safetensors"))
    assert_same_when_read(tmp_path / "backbone")
    config = transformers.Gemma3Config(
        text_config={**TEXT, "vocab_size": 384, "num_key_value_heads": 1},
        vision_config={**TEXT, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14},
    )
    transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "tower")
    assert_same_when_read(tmp_path / "tower")


def test_files_of_an_index_and_generation_settings_are_read(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_llama(tmp_path / "one", tokenizer))
    model.generation_config.temperature, model.generation_config.do_sample = 0.4, True
    model.save_pretrained(tmp_path / "many", max_shard_size="50KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert assert_same_when_read(tmp_path / "many").generation_config.temperature == 0.4
    (tmp_path / "many" / "generation_config.json").unlink()
    old = json.loads((tmp_path / "many" / "config.json").read_text())
    (tmp_path / "many" / "config.json").write_text(json.dumps(old | {"temperature": 0.3, "do_sample": True}))
    assert_same_when_read(tmp_path / "many")


def test_a_model_of_the_hub_is_read_from_its_cache(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_hub_cache(tmp_path / "hub", {"main": save_llama(tmp_path / "one", tokenizer)})
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    whole, lazy = (_load_hub(lazy=lazy) for lazy in (False, True))
    assert any(map(is_lazy, lazy.parameters()))
    read_whole(lazy)
    assert all(torch.equal(one, tensors(lazy)[name]) for name, one in tensors(whole).items())
    assert lazy.name_or_path == HUB_ID


def _load_hub(*, lazy: bool) -> Any:
    source = find_source(HUB_ID)
    return _load_weights(source, "auto", torch.float32, CPU, None, keep=[], lora=True, lazy=lazy)


@pytest.mark.parametrize("lazy", [True, False])
def test_weights_that_do_not_fit_are_refused_by_name(
    lazy: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    folder, name = save_llama(tmp_path / "tiny", tokenizer), "model.layers.1.mlp.up_proj.weight"
    edit(folder, lambda state: state.update({name: torch.zeros(5, 64), "other.weight": torch.zeros(3)}))
    with pytest.raises(SetupError, match=rf"'{name}' has shape \[5, 64\] in .*, and \[96, 64\] by config.json"):
        loaded(folder, lazy=lazy)
    edit(folder, lambda state: state.update({name: torch.zeros(96, 64), "model.norm.weight": torch.zeros(65)}))
    with pytest.raises(SetupError, match=r"'model.norm.weight' has shape \[65\]"):
        loaded(folder, lazy=lazy)
    edit(folder, lambda state: state.pop("model.norm.weight"))
    with pytest.raises(SetupError, match=r"lacks the weight 'model.norm.weight' of LlamaForCausalLM"):
        loaded(folder, lazy=lazy)
    many = tmp_path / "many"
    AutoModelForCausalLM.from_pretrained(save_llama(tmp_path / "one", tokenizer)).save_pretrained(
        many, max_shard_size="50KB"
    )
    tokenizer.save_pretrained(many)
    next(iter(sorted(many.glob("*.safetensors")))).unlink()
    with pytest.raises(SetupError, match="cannot be loaded"):
        loaded(many, lazy=lazy)


def test_one_of_the_layers_that_are_alike_is_read_to_compare_it_with_its_fused_form(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_llama(tmp_path, tokenizer, num_hidden_layers=4)
    lazy, read = loaded(folder, lazy=True), counted_bytes(monkeypatch)
    assert fuse_layers(lazy, torch.float32) == fuse_layers(loaded(folder, lazy=False), torch.float32) == 4 + 9
    assert read[0] == 3 * 64 * 96 * 4
    assert all(is_lazy(parameter) for parameter in lazy.model.layers[0].mlp.parameters())


def counted_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the bytes that are read from the files from now on."""
    read, original = [0], StoredTensor.read

    def counting(self: StoredTensor, *rows: int) -> Tensor:
        tensor = original(self, *rows)
        read[0] += tensor.nbytes
        return tensor

    monkeypatch.setattr(StoredTensor, "read", counting)
    return read


NEW = {"r": 4, "target_modules": "all-linear"}
SAVED = {"modules_to_save": ["embed_tokens", "lm_head"]}
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "full in bfloat16": {"training": {"param_dtype": "bfloat16"}},
    "tied": {"model": {"model_name_or_path": "tied"}},
    "in host memory": {"training": {"cpu_offload": True}},
    "new rows": {"model": {"model_name_or_path": "short"}},
    "new rows of a tied embedding": {"model": {"model_name_or_path": "short-tied"}},
    "LoRA": {"lora": NEW, "model": {"dtype": "bfloat16"}},
    "LoRA on the embedding": {"lora": {"target_modules": ["q_proj", "embed_tokens"]}},
    "modules that are trained whole": {"lora": NEW | SAVED, "model": {"dtype": "bfloat16"}},
    "layers that are trained whole": {"lora": {"target_modules": ["q_proj"], "modules_to_save": ["down_proj", "norm"]}},
    "an adapter over an adapter": {"lora": NEW | {"start": "new"}, "model": {"model_name_or_path": "adapter"}},
    "an adapter that is continued": {"lora": {"start": "continue"}, "model": {"model_name_or_path": "adapter"}},
    "an adapter with new rows": {"lora": {"start": "continue"}, "model": {"model_name_or_path": "adapter-rows"}},
    "a new adapter over one with new rows": {"lora": NEW, "model": {"model_name_or_path": "adapter-rows"}},
    "4-bit": {"lora": NEW, "quantization": {"load_in_4bit": True}, "model": {"dtype": "bfloat16"}},
    "4-bit in host memory": {
        "lora": NEW,
        "quantization": {"load_in_4bit": True},
        "training": {"cpu_offload": True},
    },
    "4-bit with modules that are trained whole": {"lora": NEW | SAVED, "quantization": {"load_in_4bit": True}},
    "GPT-2 in 4 bits": {
        "lora": NEW,
        "quantization": {"load_in_4bit": True},
        "model": {"model_name_or_path": "gpt2"},
    },
    "experts": {"model": {"model_name_or_path": "mixtral"}},
    "a run": {},
    "a run with an adapter": {},
}


def recipe_of(folder: Path, case: dict[str, Any]) -> Recipe:
    model = {"model_name_or_path": "tiny", "dtype": "float32"} | case.get("model", {})
    return Recipe.model_validate(
        {
            "method": "dpo",
            "data": {"train": ["pairs.jsonl"]},
            "training": {"output_dir": "run", "learning_rate": 1e-3, "sharding": "full"} | case.get("training", {}),
            "model": model | {"model_name_or_path": str(folder / model["model_name_or_path"])},
            **{name: case[name] for name in ("lora", "quantization") if name in case},
        }
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Models and adapters of which no dimension is even, so that the parts of two ranks differ."""
    folder = tmp_path_factory.mktemp("lazy")
    rows, odd = len(tokenizer) | 1, {"intermediate_size": 97, "num_hidden_layers": 3}
    save_llama(folder / "tiny", tokenizer, vocab_size=rows, **odd)
    save_llama(folder / "tied", tokenizer, vocab_size=rows, tie_word_embeddings=True, **odd)
    save_llama(folder / "short", tokenizer, vocab_size=len(tokenizer) - 3, **odd)
    save_llama(folder / "short-tied", tokenizer, vocab_size=len(tokenizer) - 3, tie_word_embeddings=True, **odd)
    for kind in ("gpt2", "mixtral"):
        BY_TYPE[kind].build(vocab_size=rows).save_pretrained(folder / kind)
        tokenizer.save_pretrained(folder / kind)
    for name, base, lora in (("adapter", "tiny", {"target_modules": ["q_proj"]}), ("adapter-rows", "short", SAVED)):
        policy = load_policy(recipe_of(folder, {"lora": lora, "model": {"model_name_or_path": base}}), tokenizer, CPU)
        disturb(policy)
        export_model(policy, folder / name, tokenizer)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=1024, num_hidden_layers=12, num_attention_heads=8
    )
    large = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    large.save_pretrained(folder / "large", max_shard_size="30MB")
    tokenizer.save_pretrained(folder / "large")
    return folder


@pytest.fixture(scope="module")
def ranks(world: Path, tokenizer: PreTrainedTokenizerFast) -> list[dict[str, Any]]:
    """What each of two ranks found, by case."""
    pids = [fork(lambda rank=rank: _work(rank, world, tokenizer)) for rank in range(2)]
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0, 0]
    return [json.loads((world / f"found-{rank}.json").read_text()) for rank in range(2)]


def _work(rank: int, world: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    dist.init_process_group("gloo", init_method=f"file://{world / 'meeting'}", rank=rank, world_size=2)
    found = {name: _differences(name, case, world, tokenizer) for name, case in CASES.items()}
    found["large"] = _measured(world, tokenizer)
    found["large in 4 bits"] = _whole_at_a_time(world, tokenizer)
    (world / f"found-{rank}.json").write_text(json.dumps(found))
    dist.barrier()


def _differences(name: str, case: dict[str, Any], world: Path, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Load a case whole and in parts, and return what differs, and where parts are."""
    recipe = recipe_of(world, case)
    if name.startswith("a run"):
        folder = world / ("adapter" if "adapter" in name else "tiny")
        policies = [load_run(folder, CPU, torch.float32, lazy=lazy) for lazy in (False, True)]
    else:
        policies = [load_policy(recipe, tokenizer, CPU, lazy=lazy) for lazy in (False, True)]
    lazy = sum(map(is_lazy, policies[1].causal.parameters()))
    division = Sharding(CPU, 2, offload=recipe.training.cpu_offload)
    division.divide(policies[1].model)
    expected, parts = (tensors(policy.causal) for policy in policies)
    with torch.no_grad():
        gathered = {key: division.whole(tensor) for key, tensor in parts.items()}
    different = expected.keys() ^ gathered.keys()
    for key, tensor in expected.items():
        is_same = gathered[key].dtype == tensor.dtype and torch.equal(gathered[key], tensor)
        if not is_same or parts[key].requires_grad != tensor.requires_grad:
            different.add(key)
    return {"different": sorted(different), "lazy": lazy, "still": any(map(is_lazy, policies[1].causal.parameters()))}


def _measured(world: Path, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Load a larger model in parts, and return the bytes read and the growth of the process's own memory."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        read = counted_bytes(monkeypatch)
        peak, loading = [0], [True]

        def watch() -> None:
            while loading[0]:
                peak[0] = max(peak[0], _own_memory())
                time.sleep(0.001)

        before = _own_memory()
        watcher = threading.Thread(target=watch)
        watcher.start()
        policy = load_policy(recipe_of(world, {"model": {"model_name_or_path": "large"}}), tokenizer, CPU, lazy=True)
        Sharding(CPU, 2).divide(policy.model)
        loading[0] = False
        watcher.join()
        return {"read": read[0], "peak": peak[0] - before}


def _whole_at_a_time(world: Path, tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Divide a model of 4 bits, and return the most elements of whole weights at a time, and those of a layer."""
    recipe = recipe_of(world, CASES["4-bit"] | {"model": {"model_name_or_path": "large"}})
    policy = load_policy(recipe, tokenizer, CPU, lazy=True)
    layer = sum(p.numel() for p in policy.causal.model.layers[0].parameters() if type(p).__name__ == "Params4bit")
    most, original = [0], sharding.fully_shard

    def watched(module: nn.Module, **options: Any) -> None:
        frozen = [p for p in policy.causal.parameters() if not p.requires_grad and p.ndim > 1]
        held = [p for p in frozen if not is_lazy(p) and not p.is_meta and not is_sharded(p)]
        most[0] = max(most[0], sum(p.numel() for p in held))
        original(module, **options)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sharding, "fully_shard", watched)
        Sharding(CPU, 2).divide(policy.model)
    return {"most": most[0], "layer": layer}


def _own_memory() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("RssAnon"))) * 1024


@pytest.mark.parametrize("case", CASES)
def test_the_parts_of_two_ranks_are_those_of_the_whole_model(case: str, ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found[case]["different"] == []
        assert (found[case]["lazy"] > 0) == (case != "experts")
        assert not found[case]["still"]


def test_a_rank_reads_and_holds_its_half(world: Path, ranks: list[dict[str, Any]]) -> None:
    size = sum(file.stat().st_size for file in (world / "large").glob("*.safetensors"))
    assert size > 100 * MIB
    for found in ranks:
        assert found["large"]["read"] < 0.501 * size
        assert found["large"]["peak"] < 0.5 * size + 20 * MIB


def test_one_layer_at_a_time_is_whole_while_a_model_is_quantised(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert 0 < found["large in 4 bits"]["most"] == found["large in 4 bits"]["layer"]

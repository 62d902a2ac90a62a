"""What loads, what is built, and what is refused before any weight is read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_samples import logits, logps, plain

from dpoctl.errors import SetupError, UsageError
from dpoctl.model import source
from dpoctl.model.load import load_policy, resolve_dtype
from dpoctl.model.policy import Policy
from dpoctl.model.tokenizer import load_tokenizer

CPU = torch.device("cpu")
TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {**TOWER, "vocab_size": 384, "num_hidden_layers": 2}
SCRATCH = {
    "config": {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
               "num_attention_heads": 2},
    "tokenizer": {"vocab_size": 300},
}  # fmt: skip


def texts() -> Any:
    return iter(["the paper is fine, the reviewer is not. "] * 20)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.T5Config(**{"d_model": 16, "num_layers": 1}), "is an encoder-decoder (t5)"),
        (transformers.BartConfig(), "is an encoder-decoder (bart)"),
        (transformers.BertConfig(), "is an encoder (bert)"),
        (transformers.ViTConfig(), "(vit) has no causal head"),
        (transformers.LlamaConfig(architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification"),
        (transformers.LlamaConfig(architectures=["LlamaModel"]), "is a LlamaModel: it has no causal head"),
    ],
)
def test_what_is_no_causal_decoder_is_refused_by_its_config(
    tmp_path: Path, make_recipe: Any, load: Callable[..., Policy], config: Any, message: str
) -> None:
    config.save_pretrained(tmp_path / "base")
    with pytest.raises(UsageError) as caught:
        load(make_recipe())
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("config", "narrowed"),
    [
        (
            transformers.Gemma3Config(
                text_config={**TEXT, "num_key_value_heads": 1, "head_dim": 8},
                vision_config={**TOWER, "image_size": 28, "patch_size": 14},
            ),
            "Gemma3ForCausalLM",
        ),
        (
            transformers.LlavaConfig(
                text_config={**TEXT, "model_type": "llama"},
                vision_config={**TOWER, "model_type": "clip_vision_model", "image_size": 28, "patch_size": 14},
            ),
            "LlamaForCausalLM",
        ),
    ],
    ids=["gemma3", "llava"],
)
def test_a_multimodal_checkpoint_is_narrowed_to_its_text_tower(
    tmp_path: Path,
    tokenizer: Any,
    make_recipe: Any,
    load: Callable[..., Policy],
    said: Callable[[], str],
    config: Any,
    narrowed: str,
) -> None:
    torch.manual_seed(0)
    whole = transformers.AutoModelForImageTextToText.from_config(config).eval()
    whole.save_pretrained(tmp_path / "base")
    policy = load(make_recipe())
    assert type(policy.causal).__name__ == narrowed
    assert f"its text tower is trained, as a {narrowed}" in said()
    assert torch.allclose(logits(policy.causal), logits(whole), atol=1e-5)
    policy.export(tmp_path / "run", tokenizer)
    assert torch.equal(logps(plain(tmp_path / "run")), logps(policy.causal))


def test_a_checkpoint_without_its_head_is_refused(
    tmp_path: Path, save_base: Any, make_recipe: Any, load: Callable[..., Policy]
) -> None:
    model = save_base("llama")
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    model.save_pretrained(tmp_path / "base", state_dict=state)
    with pytest.raises(SetupError, match=r"lacks weights of LlamaForCausalLM: 'lm_head.weight'"):
        load(make_recipe())


@pytest.mark.parametrize("where", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
def test_an_attention_kernel_from_elsewhere_is_refused(
    tmp_path: Path, save_base: Any, make_recipe: Any, load: Callable[..., Policy], where: str
) -> None:
    save_base("llama")
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), where: "someone/kernel"}))
    with pytest.raises(UsageError, match="'someone/kernel', which is not allowed"):
        load(make_recipe())


def test_code_that_comes_with_a_model_does_not_run(
    tmp_path: Path, save_base: Any, make_recipe: Any, load: Callable[..., Policy]
) -> None:
    save_base("llama")
    folder = tmp_path / "base"
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="comes with its own code"):
        load(make_recipe())
    assert not (tmp_path / "ran").exists()


def test_pickled_and_broken_weights_are_refused(
    tmp_path: Path, save_base: Any, make_recipe: Any, load: Callable[..., Policy]
) -> None:
    save_base("llama")
    weights = tmp_path / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(SetupError, match="cannot be loaded"):
        load(make_recipe())
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(SetupError, match="cannot be loaded"):
        load(make_recipe())


@pytest.mark.parametrize("name", ["./gone", "/gone/for/good", "~/gone"])
def test_a_folder_that_is_not_there_is_named(make_recipe: Any, load: Callable[..., Policy], name: str) -> None:
    with pytest.raises(SetupError, match=f"model folder '{name}' does not exist"):
        load(make_recipe(name))


def test_a_hub_id_that_cannot_be_reached_is_named_at_once(
    make_recipe: Any, load: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "hub_is_reachable", lambda: False)
    with pytest.raises(SetupError, match=r"'mistralai/Mistral-7B-v0.1' is no folder here, and no connection") as caught:
        load(make_recipe("mistralai/Mistral-7B-v0.1"))
    assert caught.value.exit_code == 5
    with pytest.raises(SetupError, match=r"'mistralai/Mistral-7B-v0.1' is no folder here"):
        load_tokenizer(make_recipe("mistralai/Mistral-7B-v0.1"), texts)


def test_auto_dtype_on_a_cpu_is_float32_whatever_it_could_do():
    assert resolve_dtype("auto", torch.device("cpu")) is torch.float32


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "float16"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")])
def test_auto_dtype_on_cuda_is_bfloat16_from_ampere_on(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    assert resolve_dtype("auto", torch.device("cuda")) == getattr(torch, expected)


def scratch(make_recipe: Any, **config: Any) -> Any:
    spec = {**SCRATCH, "config": {**SCRATCH["config"], **config}}
    return make_recipe(model={"model_name_or_path": None, "from_scratch": spec})


def test_a_model_from_scratch_depends_on_recipe_and_data_only(tmp_path: Path, make_recipe: Any) -> None:
    recipe = scratch(make_recipe)
    tokenizer = load_tokenizer(recipe, texts)
    one, two = (load_policy(recipe, tokenizer, CPU) for _ in range(2))
    ids = torch.arange(20)[None]
    assert torch.equal(logits(one.causal, ids), logits(two.causal, ids))
    assert one.causal.config.vocab_size == len(tokenizer)
    assert one.causal.config.eos_token_id == tokenizer.eos_token_id
    one.export(tmp_path / "run", tokenizer)
    again = plain(tmp_path / "run")
    assert again.generation_config.eos_token_id == tokenizer.eos_token_id
    assert torch.equal(logits(again, ids), logits(one.causal, ids))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "lama"}, "no model_type 'lama'; did you mean 'llama'?"),
        ({"model_type": "vit"}, "'vit' has no causal language model"),
        ({"hiden_size": 32}, "'hiden_size' is no setting of LlamaConfig; did you mean 'hidden_size'?"),
        ({"vocab_size": 10}, "vocab_size is 10, less than the tokenizer's 270"),
        ({"hidden_size": "wide"}, "model.from_scratch.config: "),
        ({"num_attention_heads": 5}, "model.from_scratch.config: "),
    ],
)
def test_a_wrong_configuration_is_one_line(make_recipe: Any, config: dict[str, Any], message: str) -> None:
    recipe = scratch(make_recipe, **config)
    tokenizer = load_tokenizer(scratch(make_recipe), texts)
    with pytest.raises(UsageError) as caught:
        load_policy(recipe, tokenizer, CPU)
    assert message.replace("270", str(len(tokenizer))) in str(caught.value)


@pytest.mark.parametrize("sections", [{"lora": {"r": 4}}, {"quantization": {"load_in_4bit": True}, "lora": {}}])
def test_a_model_from_scratch_is_trained_whole(make_recipe: Any, tokenizer: Any, sections: dict[str, Any]) -> None:
    recipe = scratch(make_recipe).model_copy(
        update={name: getattr(make_recipe(**sections), name) for name in ("lora", "quantization")}
    )
    with pytest.raises(UsageError, match="from scratch is trained whole"):
        load_policy(recipe, tokenizer, CPU)


def test_new_tokens_need_rows_that_are_trained(
    tmp_path: Path, save_base: Any, tokenizer: Any, make_recipe: Any
) -> None:
    save_base("llama", vocab_size=len(tokenizer) - 2)
    with pytest.raises(UsageError, match=r"modules_to_save: \[embed_tokens, lm_head\]"):
        load_policy(make_recipe(lora={"r": 4}), tokenizer, CPU)
    whole = load_policy(make_recipe(), tokenizer, CPU)
    assert whole.causal.get_input_embeddings().weight.shape[0] == len(tokenizer)
    ends = ["embed_tokens", "lm_head"]
    policy = load_policy(make_recipe(lora={"r": 4, "modules_to_save": ends}), tokenizer, CPU)
    policy.export(tmp_path / "sft", tokenizer)
    again = load_policy(make_recipe(tmp_path / "sft", lora={"start": "new", "r": 4}), tokenizer, CPU)
    assert torch.equal(logits(again.causal), logits(policy.causal))

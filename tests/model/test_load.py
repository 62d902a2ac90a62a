"""Loading a policy: weights, text towers, precision, embedding rows, and the memory that it takes."""

import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_samples import logits, logps, plain
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, core_model_loading

from dpoctl.errors import SetupError, UsageError
from dpoctl.model.export import export_model
from dpoctl.model.load import _load_weights, load_policy, resolve_dtype
from dpoctl.model.policy import Policy
from dpoctl.model.source import find_source
from dpoctl.recipe.schema import QuantizationSection

CPU = torch.device("cpu")
TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {**TOWER, "vocab_size": 384, "num_hidden_layers": 2}
MIB = 1 << 20
SHARD = 10 * MIB
# Loads a model to a device, and prints the peak growth of the process's own memory in bytes.
PROGRAM = """
import sys, threading, time
import torch, transformers
torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
from dpoctl.model.load import _load_weights
from dpoctl.model.source import find_source

folder, device = sys.argv[1], sys.argv[2]
def own_memory():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("RssAnon"))) * 1024
peak, loading = [0], [True]
def watch():
    while loading[0]:
        peak[0] = max(peak[0], own_memory())
        time.sleep(0.001)
source = find_source(folder)
before = own_memory()
watcher = threading.Thread(target=watch)
watcher.start()
model = _load_weights(source, "auto", torch.bfloat16, torch.device(device), None, keep=[], lora=True)
loading[0] = False
watcher.join()
print(peak[0] - before)
"""


@pytest.mark.parametrize(
    ("config", "text_class"),
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
def test_the_text_tower_of_a_multimodal_checkpoint_is_loaded(
    tmp_path: Path,
    tokenizer: Any,
    make_recipe: Any,
    load: Callable[..., Policy],
    stderr: Callable[[], str],
    config: Any,
    text_class: str,
) -> None:
    torch.manual_seed(0)
    whole = transformers.AutoModelForImageTextToText.from_config(config).eval()
    whole.save_pretrained(tmp_path / "base")
    policy = load(make_recipe())
    assert type(policy.causal).__name__ == text_class
    assert f"is multimodal ({config.model_type}): only its text tower is trained, as a {text_class}" in stderr()
    assert torch.allclose(logits(policy.causal), logits(whole), atol=1e-5)
    export_model(policy, tmp_path / "run", tokenizer)
    assert torch.equal(logps(plain(tmp_path / "run")), logps(policy.causal))


def test_a_checkpoint_without_its_head_is_refused(
    tmp_path: Path, save_base: Any, make_recipe: Any, load: Callable[..., Policy]
) -> None:
    model = save_base("llama")
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    model.save_pretrained(tmp_path / "base", state_dict=state)
    with pytest.raises(SetupError, match=r"lacks the weight 'lm_head.weight' of LlamaForCausalLM; give a complete"):
        load(make_recipe())


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


def test_auto_dtype_on_a_cpu_is_float32():
    assert resolve_dtype("auto", torch.device("cpu")) is torch.float32


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "float16"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")])
def test_auto_dtype_on_a_gpu_is_bfloat16_from_ampere_on(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    assert resolve_dtype("auto", torch.device("cuda")) == getattr(torch, expected)


def test_rows_for_new_tokens_must_be_trained(tmp_path: Path, save_base: Any, tokenizer: Any, make_recipe: Any) -> None:
    save_base("llama", vocab_size=len(tokenizer) - 2)
    with pytest.raises(UsageError) as refusal:
        load_policy(make_recipe(lora={"r": 4}), tokenizer, CPU)
    assert str(refusal.value) == (
        f"the tokenizer has {len(tokenizer)} tokens, but the model's embedding has {len(tokenizer) - 2} rows; "
        "train the new rows: set lora.modules_to_save: [embed_tokens, lm_head]"
    )
    whole = load_policy(make_recipe(), tokenizer, CPU)
    assert whole.causal.get_input_embeddings().weight.shape[0] == len(tokenizer)
    policy = load_policy(make_recipe(lora={"r": 4, "modules_to_save": ["embed_tokens", "lm_head"]}), tokenizer, CPU)
    export_model(policy, tmp_path / "sft", tokenizer)
    stacked = load_policy(make_recipe(tmp_path / "sft", lora={"start": "new", "r": 4}), tokenizer, CPU)
    assert torch.equal(logits(stacked.causal), logits(policy.causal))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Save a model of 200 MiB in shards of 10 MiB."""
    folder = tmp_path_factory.mktemp("sharded")
    config = LlamaConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=1536, num_hidden_layers=32, num_attention_heads=8
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu").save_pretrained(folder, max_shard_size=SHARD)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_host_never_holds_a_whole_model(sharded: Path) -> None:
    """No tensor is kept on the device `meta`, so the host's memory is that of loading alone."""
    size = sum(file.stat().st_size for file in sharded.glob("*.safetensors"))
    assert size > 200 * MIB
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(sharded), "meta"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert int(result.stdout.split()[-1]) < SHARD + 90 * MIB


def test_weights_are_quantised_one_by_one(tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tensors in full precision exist at the same time."""
    model = tiny_model("llama", num_hidden_layers=12)
    model.save_pretrained(tmp_path)
    held, peak = [0], [0]
    materialize = core_model_loading._materialize_copy

    def watched(*arguments: Any, **options: Any) -> torch.Tensor:
        tensor = materialize(*arguments, **options)
        size = tensor.numel() * tensor.element_size()
        held[0] += size
        peak[0] = max(peak[0], held[0])
        weakref.finalize(tensor, lambda: held.__setitem__(0, held[0] - size))
        return tensor

    monkeypatch.setattr(core_model_loading, "_materialize_copy", watched)
    packed = QuantizationSection(load_in_4bit=True)
    loaded = _load_weights(
        find_source(str(tmp_path)), "auto", torch.bfloat16, torch.device("cpu"), packed, keep=[], lora=True
    )
    layers = sum(p.numel() for p in model.model.layers.parameters()) * 2
    embedding_and_head = 2 * model.lm_head.weight.numel() * 2
    assert any(type(p).__name__ == "Params4bit" for p in loaded.parameters())
    # Embedding, head and norms are not quantised; of the layers only a few weights are held at a time.
    assert peak[0] < embedding_and_head + 0.25 * layers


def test_only_the_weights_that_match_a_pattern_are_trained(
    save_base: Any, make_recipe: Any, load: Callable[..., Policy]
) -> None:
    save_base("llama", tie_word_embeddings=True)
    policy = load(make_recipe(training={"trainable": [r"layers\.1\..*q_proj", "lm_head"]}))
    assert list(policy.trainable_state()) == ["model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"]
    with pytest.raises(
        UsageError, match=r"no weight of this model matches 'layers\\.9'; its weights have names such as"
    ):
        load(make_recipe(training={"trainable": ["norm", r"layers\.9"]}))

"""Policies of real proportions on a fake GPU, made as the loader makes them, and steps of real-like lengths."""

import math
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
import transformers
from memory_store import MemoryStore
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from dpoctl.data.tokenize import Example
from dpoctl.model import fused_layers, linear_head, load
from dpoctl.model.policy import Policy
from dpoctl.model.source import ModelSource
from dpoctl.model.traced import one_kernel, pack, to_fakes
from dpoctl.recipe import Recipe

GPU = torch.device("cuda:0")
BF16 = torch.bfloat16
KINDS = ("full", "lora", "4bit", "8bit")
# Shapes of models that people train; vocabularies too. `llama` is Llama 3.1 8B.
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
    },
    "qwen3": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151_936,
    },
    "mistral": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32_000,
        "sliding_window": 128,
    },
    "gemma2": {
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_hidden_layers": 2,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "vocab_size": 256_000,
        "sliding_window": 128,
    },
    "gemma3_text": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262_208,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0}


def world() -> FakeTensorMode:
    """Return a world of fakes, into which small real tensors may enter."""
    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def fakes_count_as_parameters() -> Iterator[None]:
    """Let dpoctl take a fake parameter for one, where it looks at the exact class."""
    real = linear_head.nn
    vars(linear_head)["nn"] = types.SimpleNamespace(**{**vars(real), "Parameter": FakeTensor})
    try:
        yield
    finally:
        vars(linear_head)["nn"] = real


def recipe(kind: str, loss: Mapping[str, Any] | None = None, method: str = "dpo") -> Recipe:
    """Return the recipe of a run of a kind, `auto` where it need not choose."""
    sections: dict[str, Any] = {
        "method": method,
        "model": {"model_name_or_path": "a-model", "dtype": "bfloat16"},
        "data": {"train": [{"path": "rows.jsonl"}]},
        "training": {"output_dir": "runs/out", "learning_rate": 1e-6},
    }
    if loss is not None:
        sections["dpo"] = {"loss": dict(loss)}
    if kind != "full":
        sections["lora"] = LORA
    if kind in ("4bit", "8bit"):
        wide = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True} if kind == "4bit" else {}
        sections["quantization"] = {f"load_in_{kind}": True, **wide}
    return Recipe.model_validate(sections)


def build(fakes: FakeTensorMode, family: str, kind: str, **changes: Any) -> Policy:
    """Return a policy whose weights are fakes on the GPU, made by the loader's own steps.

    Args:
        fakes: the world they are of.
        family: a key of `SHAPES`.
        kind: one of `KINDS`.
        changes: to the shape.
    """
    config = AutoConfig.for_model(family, max_position_embeddings=8192, **SHAPES[family] | changes)
    dtype = torch.float32 if kind == "full" else BF16
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
        model.train(False)
        if kind in ("4bit", "8bit"):
            pack(model, recipe(kind), BF16)
        lora = recipe(kind).lora
        policy = (
            load._full_policy(model, None, BF16, None)
            if lora is None
            else load._lora_policy(model, ModelSource(name="a-model"), None, lora, BF16, 0)
        )
    to_fakes(policy.model, fakes, GPU)
    load._disable_dropout(policy, None)
    _fuse(policy, family)
    return policy


def _fuse(policy: Policy, family: str) -> None:
    """Fuse the layers that are fused in a small model of real numbers; of fakes nobody knows whether they agree."""
    kinds = _fused_kinds(family)
    stand_ins = {
        "agrees_on_random_rows": lambda module, *_: type(module) in kinds,
        "_compiled_product": lambda _: one_kernel(),
    }
    real = {name: vars(fused_layers)[name] for name in stand_ins}
    vars(fused_layers).update(stand_ins)
    try:
        fused_layers.fuse_layers(policy.causal, policy.dtype, compiled=True)
    finally:
        vars(fused_layers).update(real)


@cache
def _fused_kinds(family: str) -> set[type[nn.Module]]:
    small = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL), dtype=BF16)
    fused_layers.fuse_layers(small, BF16)
    return {type(module) for module in small.modules() if "forward" in vars(module)}


def spread(count: int, mean: int, width: float = 0.5) -> list[int]:
    """Return lengths as those of dialogues are spread: the quantiles of a log-normal distribution."""
    middle = math.log(mean) - width**2 / 2
    return [round(math.exp(middle + width * NormalDist().inv_cdf((number + 0.5) / count))) for number in range(count)]


def pairs(count: int = 16, seed: int = 0, vocabulary: int = 32_000) -> MemoryStore:
    """Return preference pairs as long as hh's: prompts of about 150 tokens, answers of about 80; of three sources."""
    rng = np.random.default_rng(seed)
    prompts, chosen, rejected = (rng.permutation(spread(count, mean)) for mean in (150, 80, 80))
    return MemoryStore(
        [
            Example(
                shared=rng.integers(4, vocabulary, prompt),
                shared_scored=np.zeros(prompt, dtype=bool),
                suffixes=tuple(rng.integers(4, vocabulary, answer) for answer in answers),
                suffixes_scored=tuple(np.ones(answer, dtype=bool) for answer in answers),
                pairs=np.array([[0, 1]]),
                source=number % 3,
            )
            for number, (prompt, *answers) in enumerate(zip(prompts, chosen, rejected, strict=True))
        ]
    )


def demonstrations(count: int = 16, seed: int = 0) -> MemoryStore:
    """Return the same prompts with their first answers alone, labelled in turns."""
    return MemoryStore(
        [
            Example(
                shared=one.shared,
                shared_scored=one.shared_scored,
                suffixes=one.suffixes[:1],
                suffixes_scored=one.suffixes_scored[:1],
                pairs=np.zeros((0, 2), dtype=np.int64),
                label=number % 2,
                target=0 if number % 2 else -1,
                source=one.source,
            )
            for number, one in enumerate(pairs(count, seed).examples)
        ]
    )


transformers.logging.set_verbosity_error()

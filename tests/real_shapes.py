"""Shapes of real models, and the memory that weights, gradients and optimizer state of a recipe take by arithmetic."""

from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from dpoctl.recipe.schema import Recipe

Shape = dict[str, Any]


def shape(kind: str, hidden: int, inner: int, layers: int, heads: int, keys: int, vocab: int, **more: Any) -> Shape:
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "vocab_size": vocab,
        "pad_token_id": None,
        **more,
    }


TIED: Shape = {"tie_word_embeddings": True}
UNTIED: Shape = {"tie_word_embeddings": False}
MISTRAL = shape("mistral", 4096, 14336, 32, 32, 8, 32000, **UNTIED)
LLAMA3 = shape("llama", 4096, 14336, 32, 32, 8, 128256, **UNTIED)
OLMO2_1B = shape("olmo2", 2048, 8192, 16, 16, 16, 100352, **UNTIED)
QWEN3 = {"head_dim": 128}
GEMMA3 = {"head_dim": 256}
SMOLLM2_135M = shape("llama", 576, 1536, 30, 9, 3, 49152, **TIED)
SMOLLM2_1B = shape("llama", 2048, 8192, 24, 32, 32, 49152, **TIED)
PYTHIA = shape("gpt_neox", 2560, 10240, 32, 32, 32, 50304, **UNTIED)
SHAPES: dict[str, Shape] = {
    "HuggingFaceTB/SmolLM2-135M": SMOLLM2_135M,
    "runs/smollm2-135m-sft": SMOLLM2_135M,
    "HuggingFaceTB/SmolLM2-1.7B": SMOLLM2_1B,
    "runs/smollm2-1.7b-sft": SMOLLM2_1B,
    "HuggingFaceTB/SmolLM3-3B": shape("smollm3", 2048, 11008, 36, 16, 4, 128256, **TIED),
    "Qwen/Qwen3-0.6B": shape("qwen3", 1024, 3072, 28, 16, 8, 151936, **TIED, **QWEN3),
    "Qwen/Qwen3-0.6B-Base": shape("qwen3", 1024, 3072, 28, 16, 8, 151936, **TIED, **QWEN3),
    "Qwen/Qwen3-4B-Instruct-2507": shape("qwen3", 2560, 9728, 36, 32, 8, 151936, **TIED, **QWEN3),
    "Qwen/Qwen3-8B": shape("qwen3", 4096, 12288, 36, 32, 8, 151936, **UNTIED, **QWEN3),
    "meta-llama/Llama-3.1-8B-Instruct": LLAMA3,
    "meta-llama/Meta-Llama-3-8B-Instruct": LLAMA3,
    "allenai/Llama-3.1-Tulu-3-8B-SFT": LLAMA3 | {"vocab_size": 128264},
    "google/gemma-3-1b-it": shape("gemma3_text", 1152, 6912, 26, 4, 1, 262144, **TIED, **GEMMA3),
    "google/gemma-3-4b-it": shape("gemma3_text", 2560, 10240, 34, 8, 4, 262208, **TIED, **GEMMA3),
    "mistralai/Mistral-7B-v0.1": MISTRAL,
    "alignment-handbook/zephyr-7b-sft-full": MISTRAL,
    "alignment-handbook/zephyr-7b-sft-qlora": MISTRAL,
    "teknium/OpenHermes-2.5-Mistral-7B": MISTRAL | {"vocab_size": 32002},
    "mistralai/Mistral-7B-Instruct-v0.3": MISTRAL | {"vocab_size": 32768},
    "allenai/OLMo-2-0425-1B": OLMO2_1B,
    "allenai/OLMo-2-0425-1B-SFT": OLMO2_1B,
    "allenai/OLMo-2-1124-7B-SFT": shape("olmo2", 4096, 11008, 32, 32, 32, 100352, **UNTIED),
    "microsoft/Phi-4-mini-instruct": shape("phi3", 3072, 8192, 32, 24, 8, 200064, **TIED),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": shape("llama", 2048, 5632, 22, 32, 4, 32000, **UNTIED),
    "EleutherAI/pythia-2.8b": PYTHIA,
    "runs/pythia28-hh-sft": PYTHIA,
    "gpt2": {"model_type": "gpt2"},
}
"""By the name in a recipe: the sizes in the model's config.json."""
STATES = {"rmsprop": 4, "adamw_8bit": 2, "paged_adamw_8bit": 2}
"""Bytes of optimizer state for a trained number; 8 for AdamW in float32."""
FOUR_BITS = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a number in NF4: 4 bits, an 8-bit constant for 64 of them, and a float32 one for 256 of those constants."""


@cache
def counts(name: str) -> tuple[int, int, int]:
    """The numbers of a model, those of its linear layers without the head, and the features in and out of those."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES[name]), dtype=torch.bfloat16)
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    features = sum(m.in_features + m.out_features for m in linear)
    return model.num_parameters(), sum(m.weight.numel() for m in linear), features


def gibibytes(recipe: Recipe) -> float:
    """Weights, gradients and optimizer state, on one device that holds all of them."""
    name, lora = str(recipe.model.model_name_or_path), recipe.lora
    everything, linear, features = counts(name)
    state = 4 + 4 + STATES.get(recipe.training.optim, 8)
    if lora is None:
        return everything * state / 2**30
    stored = 2.0 * everything
    if recipe.quantization is not None and recipe.quantization.load_in_4bit:
        stored = FOUR_BITS * linear + 2.0 * (everything - linear)
    return (stored + lora.r * features * state) / 2**30

"""Architectures as tiny random models, and the layout that the probe must give each of them.

`python tests/architectures.py` prints the table of docs/architectures.md.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dpoctl.model.attention import Layout

COMMON: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
    "attention_dropout": 0.0,
}
WINDOW: dict[str, Any] = {"sliding_window": 8}
MIXED: dict[str, Any] = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS: dict[str, Any] = {
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
LATENT: dict[str, Any] = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
DELTA: dict[str, Any] = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
MAMBA: dict[str, Any] = {
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_ssm": 64,
    "mamba_n_groups": 1,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "n_groups": 1,
    "mamba_chunk_size": 16,
    "chunk_size": 16,
}
NO_DROPOUT: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

# What the tiny model of a type is besides.
CHANGES: dict[str, dict[str, Any]] = {
    "mistral": WINDOW,
    "ministral": MIXED,
    "mixtral": EXPERTS,
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 16},
    "qwen3_moe": EXPERTS,
    "gemma2": MIXED | {"query_pre_attn_scalar": 8},
    "gemma3_text": MIXED | {"query_pre_attn_scalar": 8},
    "gemma4_text": MIXED
    | {
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 384,
        "num_kv_shared_layers": 0,
        "global_head_dim": 16,
    },
    "phi3": WINDOW,
    "phimoe": EXPERTS,
    "gpt2": NO_DROPOUT,
    "gpt_bigcode": NO_DROPOUT,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "starcoder2": WINDOW,
    "cohere": {"logit_scale": 0.3},
    "cohere2": MIXED,
    "olmo3": MIXED,
    "olmoe": EXPERTS,
    "granite": {"logits_scaling": 4.0},
    "granitemoe": EXPERTS | {"logits_scaling": 4.0},
    "deepseek_v2": EXPERTS | LATENT,
    "deepseek_v3": EXPERTS | LATENT,
    "glm4_moe": EXPERTS | {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "exaone4": MIXED,
    "gpt_oss": MIXED | EXPERTS,
    "minimax_m2": EXPERTS,
    "falcon": {"head_dim": None},
    "gptj": NO_DROPOUT | {"rotary_dim": 4},
    "codegen": NO_DROPOUT | {"rotary_dim": 4},
    "xglm": {"d_model": 32, "ffn_dim": 48, "attention_heads": 4, "num_layers": 2, "dropout": 0.0},
    "qwen3_next": EXPERTS | DELTA | {"shared_expert_intermediate_size": 16},
    "qwen3_5_text": DELTA,
    "olmo_hybrid": DELTA | {"num_key_value_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "state_size": 8, "n_groups": 1, "chunk_size": 16},
    "falcon_mamba": {"state_size": 8},
    "falcon_h1": MAMBA,
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "granitemoehybrid": MAMBA | EXPERTS | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 16},
    "jamba": MAMBA | EXPERTS | {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "zamba2": MAMBA
    | {"layers_block_type": ["mamba", "hybrid"], "mamba_ngroups": 1, "mamba_headdim": 8, "n_mamba_heads": 8},
    "nemotron_h": MAMBA | {"layers_block_type": ["mamba", "attention"]},
    "minimax": EXPERTS,
    "bloom": {"hidden_dropout": 0.0},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 512},
    "gpt_neo": {
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
        "embed_dropout": 0.0,
        "resid_dropout": 0.0,
    },
    "llama4_text": EXPERTS | {"attention_chunk_size": 8, "intermediate_size_mlp": 48},
    "deepseek_v32": EXPERTS | LATENT | {"index_n_heads": 2, "index_head_dim": 16},
}


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Attributes:
        name: as its authors call it.
        model_type: in `config.json`.
        layout: that the probe must choose on a CPU.
        models: that people know.
        special: what a layout must respect.
    """

    name: str
    model_type: str
    layout: Layout
    models: str
    special: str = ""

    def build(self, **changes: Any) -> PreTrainedModel:
        """Build it with seeded random weights, and a configuration changed further."""
        whole = COMMON | CHANGES.get(self.model_type, {}) | changes
        config = AutoConfig.for_model(self.model_type, **{k: v for k, v in whole.items() if v is not None})
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


ARCHITECTURES = [
    Architecture("Llama", "llama", "shared", "Llama 2 and 3, TinyLlama, Vicuna, SmolLM2, DeepSeek-R1 distilled"),
    Architecture("Mistral", "mistral", "shared", "Mistral 7B, Zephyr", "sliding window"),
    Architecture("Ministral", "ministral", "shared", "Ministral 8B", "full and sliding layers"),
    Architecture("Ministral 3", "ministral3", "shared", "Ministral 3", "queries scaled by position"),
    Architecture("Mixtral", "mixtral", "shared", "Mixtral 8x7B", "experts"),
    Architecture("Qwen2", "qwen2", "shared", "Qwen 1.5, 2 and 2.5"),
    Architecture("Qwen2-MoE", "qwen2_moe", "shared", "Qwen1.5-MoE", "experts, one shared"),
    Architecture("Qwen3", "qwen3", "shared", "Qwen3 0.6B to 32B", "norms on queries and keys"),
    Architecture("Qwen3-MoE", "qwen3_moe", "shared", "Qwen3-30B-A3B", "experts"),
    Architecture("Gemma", "gemma", "shared", "Gemma 2B and 7B"),
    Architecture("Gemma 2", "gemma2", "shared", "Gemma 2", "soft caps on scores and logits, sliding window"),
    Architecture(
        "Gemma 3", "gemma3_text", "shared", "Gemma 3, text tower", "full and sliding layers, two rotary tables"
    ),
    Architecture(
        "Gemma 4", "gemma4_text", "shared", "Gemma 4, text tower", "full and sliding layers of unequal head sizes"
    ),
    Architecture("Phi", "phi", "shared", "Phi 1, 1.5 and 2", "bias on the head"),
    Architecture("Phi 3", "phi3", "shared", "Phi 3 and 4", "sliding window"),
    Architecture("Phi-MoE", "phimoe", "shared", "Phi-3.5-MoE", "experts"),
    Architecture("GPT-2", "gpt2", "shared", "GPT-2, DistilGPT-2", "learned positions"),
    Architecture("GPT-BigCode", "gpt_bigcode", "shared", "SantaCoder, StarCoder", "one head of keys"),
    Architecture("GPT-NeoX", "gpt_neox", "shared", "Pythia, Dolly"),
    Architecture("OPT", "opt", "shared", "OPT", "learned positions"),
    Architecture("BioGPT", "biogpt", "shared", "BioGPT", "learned positions"),
    Architecture("StarCoder 2", "starcoder2", "shared", "StarCoder 2", "sliding window"),
    Architecture("Cohere", "cohere", "shared", "Command R", "scaled logits"),
    Architecture("Cohere 2", "cohere2", "shared", "Command R7B, Aya", "full and sliding layers, scaled logits"),
    Architecture("OLMo", "olmo", "shared", "OLMo"),
    Architecture("OLMo 2", "olmo2", "shared", "OLMo 2, Tülu 3"),
    Architecture("OLMo 3", "olmo3", "shared", "OLMo 3", "full and sliding layers"),
    Architecture("OLMoE", "olmoe", "shared", "OLMoE", "experts"),
    Architecture("Granite", "granite", "shared", "Granite 3", "scaled logits and residuals"),
    Architecture("Granite-MoE", "granitemoe", "shared", "Granite 3 1B-A400M", "experts, scaled logits"),
    Architecture("DeepSeek-V2", "deepseek_v2", "shared", "DeepSeek-V2-Lite", "latent attention, experts"),
    Architecture("DeepSeek-V3", "deepseek_v3", "shared", "DeepSeek-V3, R1, Kimi-K2", "latent attention, experts"),
    Architecture("GLM", "glm", "shared", "GLM-4-9B"),
    Architecture("GLM-4", "glm4", "shared", "GLM-4-0414"),
    Architecture("GLM-4-MoE", "glm4_moe", "shared", "GLM-4.5, 4.6", "experts"),
    Architecture("Persimmon", "persimmon", "shared", "Persimmon 8B"),
    Architecture("SmolLM 3", "smollm3", "shared", "SmolLM3 3B", "layers without rotation"),
    Architecture("ERNIE 4.5", "ernie4_5", "shared", "ERNIE 4.5 0.3B"),
    Architecture("EXAONE 4", "exaone4", "shared", "EXAONE 4", "full and sliding layers"),
    Architecture("gpt-oss", "gpt_oss", "shared", "gpt-oss-20b", "attention sinks, sliding window, experts"),
    Architecture("Apertus", "apertus", "shared", "Apertus"),
    Architecture("Arcee", "arcee", "shared", "AFM 4.5B"),
    Architecture("Seed-OSS", "seed_oss", "shared", "Seed-OSS-36B"),
    Architecture("Helium", "helium", "shared", "Helium 1"),
    Architecture("Hunyuan", "hunyuan_v1_dense", "shared", "Hunyuan 0.5B to 7B"),
    Architecture("MiniMax-M2", "minimax_m2", "shared", "MiniMax-M2", "experts"),
    Architecture("BitNet", "bitnet", "shared", "BitNet b1.58 2B"),
    Architecture("Falcon", "falcon", "masked", "Falcon 7B and 40B", "attention of its own"),
    Architecture("StableLM", "stablelm", "masked", "StableLM 2, Zephyr 3B", "passes nothing on to its attention"),
    Architecture("Nemotron", "nemotron", "masked", "Minitron, Nemotron 4", "passes nothing on to its attention"),
    Architecture("GPT-J", "gptj", "masked", "GPT-J 6B", "attention of its own"),
    Architecture("CodeGen", "codegen", "masked", "CodeGen", "attention of its own"),
    Architecture("XGLM", "xglm", "masked", "XGLM", "attention of its own"),
    Architecture(
        "Qwen3-Next", "qwen3_next", "padded", "Qwen3-Next-80B-A3B", "state: Gated DeltaNet; `packed` with its kernels"
    ),
    Architecture(
        "Qwen3.5", "qwen3_5_text", "padded", "Qwen3.5, text tower", "state: Gated DeltaNet; `packed` with its kernels"
    ),
    Architecture(
        "OLMo Hybrid", "olmo_hybrid", "padded", "OLMo Hybrid", "state: Gated DeltaNet; `packed` with its kernels"
    ),
    Architecture("LFM2", "lfm2", "padded", "LFM2", "state: short convolutions"),
    Architecture("Mamba", "mamba", "padded", "Mamba", "state"),
    Architecture("Mamba 2", "mamba2", "padded", "Mamba 2", "state"),
    Architecture("Falcon-Mamba", "falcon_mamba", "padded", "Falcon-Mamba 7B", "state"),
    Architecture("Falcon-H1", "falcon_h1", "padded", "Falcon-H1", "state beside attention in every layer"),
    Architecture("Bamba", "bamba", "padded", "Bamba 9B", "state: Mamba 2"),
    Architecture("Granite 4", "granitemoehybrid", "padded", "Granite 4", "state: Mamba 2, experts"),
    Architecture("Jamba", "jamba", "padded", "Jamba", "state: Mamba, experts"),
    Architecture("Zamba 2", "zamba2", "padded", "Zamba 2", "state: Mamba 2"),
    Architecture("Nemotron-H", "nemotron_h", "padded", "Nemotron-H, Nemotron Nano 2", "state: Mamba 2"),
    Architecture("RecurrentGemma", "recurrent_gemma", "padded", "RecurrentGemma", "state: gated recurrence"),
    Architecture("MiniMax", "minimax", "padded", "MiniMax-Text-01", "state: lightning attention, experts"),
    Architecture("Bloom", "bloom", "padded", "BLOOM, BLOOMZ", "ALiBi, by column"),
    Architecture("MPT", "mpt", "padded", "MPT 7B", "ALiBi, by column"),
    Architecture("GPT-Neo", "gpt_neo", "padded", "GPT-Neo, TinyStories", "windows by column"),
    Architecture(
        "Llama 4", "llama4_text", "padded", "Llama 4 Scout, text tower", "chunks of attention, queries scaled by column"
    ),
    Architecture("DeepSeek-V3.2", "deepseek_v32", "padded", "DeepSeek-V3.2", "an indexer chooses the keys"),
]
BY_TYPE = {architecture.model_type: architecture for architecture in ARCHITECTURES}


def table() -> str:
    """The table of docs/architectures.md."""
    rows = [f"| {a.name} | {a.models} | `{a.layout}` | {a.special} |" for a in ARCHITECTURES]
    return "\n".join(["| architecture | models | layout | what is special |", "|---|---|---|---|", *rows])


if __name__ == "__main__":
    print(table())  # noqa: T201

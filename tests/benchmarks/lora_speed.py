"""Measure forward and backward of a LoRA model in 4 bits (QLoRA), fused and with peft's own layers, in turns.

    python tests/benchmarks/lora_speed.py

On a GPU if there is one, else on the CPU. The ratio of the medians is what counts; the peak is that of all tensors.
"""

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dpoctl.model.fused_lora import fuse_lora
from dpoctl.model.lora import cast_trainable_to_float32
from dpoctl.model.quantize import prepare_quantised_layers

ROUNDS = 7
TOKENS = 1024
WIDTH = 1024


def build(*, fused: bool) -> tuple[nn.Module, nn.Module]:
    """Return a decoder of four layers with adapters on all linear layers, and the model inside."""
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=WIDTH, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=16
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    layers = [(name, module) for name, module in model.model.named_modules() if isinstance(module, nn.Linear)]
    for name, layer in layers:
        packed = Linear4bit(
            layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
        )
        packed.load_state_dict(layer.state_dict())
        model.model.set_submodule(name, packed)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    vars(model)["is_loaded_in_4bit"] = True
    prepare_quantised_layers(model)
    model.requires_grad_(False)
    adapted: Any = get_peft_model(
        model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)
    )
    cast_trainable_to_float32(model, torch.bfloat16)
    if fused:
        fuse_lora(model)
    return adapted, model.model


def step(model: nn.Module, decoder: nn.Module) -> float:
    """Return the seconds of a forward and a backward."""
    model.zero_grad()
    device = next(decoder.parameters()).device
    x = torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)
    began = time.perf_counter()
    with torch.autocast(device.type, torch.bfloat16):
        out = decoder(inputs_embeds=x.requires_grad_(), use_cache=False).last_hidden_state
    out.float().square().mean().backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    """Print a table."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from flops import counted

    models = {"fused": build(fused=True), "peft": build(fused=False)}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(ROUNDS + 1):
        for name, pair in models.items():
            seconds[name].append(step(*pair))
    peaks = {}
    for name, pair in models.items():
        with counted() as count:
            step(*pair)
        peaks[name] = count.peak_bytes
    middle = {name: statistics.median(found[1:]) for name, found in seconds.items()}
    lines = ["| layers | s a step | of fused | peak MB | of fused |", "|---|---|---|---|---|"]
    lines += [
        f"| {name} | {middle[name]:.3f} | {middle[name] / middle['fused']:.2f} | {peaks[name] / 1e6:.0f} "
        f"| {peaks[name] / peaks['fused']:.2f} |"
        for name in models
    ]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

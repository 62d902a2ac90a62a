"""How long a checkpoint of 58 M parameters takes, against writing its bytes and against copying them.

python tests/benchmarks/save_speed.py [folder]
"""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from dpoctl.files import sync
from dpoctl.runs.checkpoint import Checkpoint, Saver, capture_rng, copied

SIZES = {"vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8}
ROUNDS = 5


def model_after_a_step() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """58 M parameters, and Adam's moments of them."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_attention_heads=8, num_key_value_heads=8)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return model, optimizer


def seconds(action: Callable[[], object]) -> float:
    began = time.monotonic()
    action()
    return time.monotonic() - began


def main() -> None:
    """Print the medians."""
    model, optimizer = model_after_a_step()
    state = optimizer.state_dict()
    checkpoint = Checkpoint(1, dict(model.named_parameters()), state, capture_rng())
    tensors = {f"w.{name}": value.detach() for name, value in checkpoint.weights.items()}
    tensors |= {f"{key}.{name}": value for key, slots in state["state"].items() for name, value in slots.items()}
    folder = Path(tempfile.mkdtemp(dir=sys.argv[1] if len(sys.argv) > 1 else None))
    times: dict[str, list[float]] = {"write": [], "copy": [], "stall": [], "save": []}

    def write() -> None:
        save_file(tensors, folder / "plain.safetensors")
        sync(folder / "plain.safetensors")

    for number in range(ROUNDS):
        times["write"].append(seconds(write))
        (folder / "plain.safetensors").unlink()
        times["copy"].append(seconds(lambda: copied(checkpoint)))
        checkpoint.step = number + 1
        saver = Saver(folder / "checkpoints", keep=2)
        began = time.monotonic()
        times["stall"].append(seconds(lambda saver=saver: saver.save(checkpoint)))
        saver.wait()
        times["save"].append(time.monotonic() - began)
    shutil.rmtree(folder)
    size = sum(value.nbytes for value in tensors.values()) / 1e6
    sys.stdout.write(f"{size:.0f} MB on {os.cpu_count()} cores, medians of {ROUNDS}\n")
    for name, values in times.items():
        share = median(values) / median(times["write"])
        sys.stdout.write(f"  {name:6} {median(values):.2f} s  (x {share:.2f} of writing)\n")


if __name__ == "__main__":
    main()

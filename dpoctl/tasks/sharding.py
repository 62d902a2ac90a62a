"""The decision whether to divide a model over the ranks, before it is loaded."""

import os

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from dpoctl import console
from dpoctl.core.optim import state_bytes
from dpoctl.errors import UsageError
from dpoctl.model.from_config import build_skeleton
from dpoctl.model.load import compute_dtype, weight_dtype
from dpoctl.model.memory import free_bytes
from dpoctl.model.modules import is_trainable
from dpoctl.model.sharding import Sharding
from dpoctl.recipe.consistency import WHOLE_MATRICES
from dpoctl.recipe.schema import Recipe, TrainingSection
from dpoctl.tasks import fsdp_options

# The rest is for activations, of which at least some must fit.
STATES_SHARE = 0.85
FOUR_BITS = 0.55
"""Bytes of a weight of 4 bits, with its share of the scales."""


def choose_sharding(
    recipe: Recipe, accelerator: Accelerator, tokenizer: PreTrainedTokenizerBase, *, is_known: bool = True
) -> Sharding | None:
    """Decide whether to divide the model of a recipe over the ranks; the same on all of them.

    Args:
        recipe: checked and complete.
        accelerator: ranks, device and precision.
        tokenizer: of the recipe.
        is_known: whether the recipe says how large the model is; if not, `auto` does not divide it.

    Returns:
        The division, or None if each rank shall hold the whole model.

    Raises:
        UsageError: the recipe asks for sharding, and it cannot be done for this model or this number of processes.
    """
    training, ranks = recipe.training, accelerator.num_processes
    asked = fsdp_options.request(os.environ)
    if asked:
        _say_what_runs(training, ranks)
    # One process has nothing to share, but may move what it holds to host memory.
    if training.sharding == "none" or (ranks == 1 and not training.cpu_offload):
        if training.sharding == "full" and not asked:
            console.note(
                "training.sharding: full has no effect: one process has nothing to divide; see --num-processes"
            )
        return None
    if training.sharding == "auto" and not asked and not (is_known and _exceeds(recipe, accelerator, tokenizer)):
        _say_without_effect(training)
        return None
    dtype = compute_dtype(recipe, accelerator.device)
    _refuse(recipe, ranks, dtype)
    gathered = dtype if recipe.lora is None and dtype != torch.float32 else None
    return Sharding(accelerator.device, ranks, training.replicas, gathered, training.cpu_offload)


def _say_without_effect(training: TrainingSection) -> None:
    """Say which keys have no effect, because the model is not divided."""
    keys = {"replicas": training.replicas > 1, "cpu_offload": training.cpu_offload}
    for key in (key for key, is_set in keys.items() if is_set):
        console.note(
            f"training.{key} has no effect: training.sharding: auto does not divide a model that fits; "
            "set training.sharding: full to divide it"
        )


def _say_what_runs(training: TrainingSection, ranks: int) -> None:
    """Say what runs in the place of accelerate's FSDP."""
    keys = ["training.sharding: full"]
    keys += [f"training.replicas: {training.replicas}"] if training.replicas > 1 else []
    keys += ["training.cpu_offload: true"] if training.cpu_offload else []
    own = f"dpoctl's own sharding runs, torch's fully_shard ({', '.join(keys)})"
    alone, idle = "one process has nothing to divide", ", ".join(fsdp_options.without_effect(os.environ))
    console.say(
        f"sharding: accelerate was asked for FSDP: {own if ranks > 1 or training.cpu_offload else alone}"
        + (f"; without effect: {idle}" if idle else "")
    )


def _refuse(recipe: Recipe, ranks: int, dtype: torch.dtype) -> None:
    """Check that a model can be divided.

    Raises:
        UsageError: it cannot.
    """
    training, quantization = recipe.training, recipe.quantization
    if ranks % training.replicas:
        raise UsageError(
            f"training.replicas is {training.replicas}, which does not divide {ranks} processes",
            hint="set it to the number of machines, or to 1",
        )
    if training.optim in WHOLE_MATRICES:
        raise UsageError(
            f"training.optim: {training.optim} needs whole matrices, and a sharded model has parts of them",
            hint="set training.optim: adamw, or training.sharding: none",
        )
    lora = recipe.lora
    if lora is not None and (lora.use_dora or lora.changes_base):
        key = "use_dora" if lora.use_dora else "init_lora_weights"
        raise UsageError(
            f"lora.{key} needs whole weight matrices, and a sharded model has parts of them",
            hint=f"remove lora.{key}, or set training.sharding: none",
        )
    if dtype == torch.float16:
        raise UsageError("a sharded model cannot compute in float16", hint="set model.dtype: bfloat16")
    if quantization is not None and quantization.load_in_8bit:
        raise UsageError(
            "a model of 8 bits cannot be sharded: bitsandbytes keeps its weights outside of the parameters",
            hint="set quantization.load_in_4bit: true instead, or training.sharding: none",
        )


def _exceeds(recipe: Recipe, accelerator: Accelerator, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether weights, gradients and optimizer state do not fit on every rank; says the arithmetic if so."""
    needed = needed_bytes(recipe, build_skeleton(recipe, tokenizer), accelerator.device)
    # The ranks of a machine share the memory of its CPUs.
    sharers = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if accelerator.device.type == "cpu" else 1
    free = torch.tensor([free_bytes(accelerator.device) / sharers], dtype=torch.float64, device=accelerator.device)
    least, ranks = float(accelerator.gather(free).min()), accelerator.num_processes
    if needed <= STATES_SHARE * least:
        return False
    console.say(
        f"sharding: weights, gradients and optimizer state need {needed / 1e9:.1f} GB, and {least / 1e9:.1f} GB are "
        f"free for each process: divided over {ranks} processes, {needed / 1e9 / ranks * recipe.training.replicas:.1f} "
        "GB each"
    )
    return True


def needed_bytes(recipe: Recipe, model: nn.Module, device: torch.device) -> float:
    """Return the bytes of weights, gradients and optimizer state of a model that is not divided.

    Args:
        recipe: how it is trained.
        model: the model, with its adapter; it needs no memory.
        device: where it is trained.
    """
    dtype = compute_dtype(recipe, device)
    sizes = {True: 0, False: 0}
    for name, parameter in model.named_parameters():
        is_adapter = ".lora_" in name or ".modules_to_save." in name
        is_trained = is_adapter if recipe.lora else is_trainable(name, recipe.training.trainable)
        sizes[is_trained] += parameter.numel()
    is_packed = recipe.quantization is not None and recipe.quantization.load_in_4bit
    frozen = FOUR_BITS if is_packed else weight_dtype(recipe, dtype).itemsize
    cast = 2 if recipe.training.param_dtype == "float32" and dtype != torch.float32 else 0
    return sizes[False] * frozen + sizes[True] * (sum(state_bytes(recipe.training)) + cast)

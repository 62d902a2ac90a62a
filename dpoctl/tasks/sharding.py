"""The decision whether to divide a model over the ranks, for a training or an evaluation, before it is loaded."""

import os

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedTokenizerBase

from dpoctl import console
from dpoctl.core.planner import Lengths
from dpoctl.data.cache import Cache, cache_dir
from dpoctl.data.store import TokenStore
from dpoctl.errors import UsageError, UserError
from dpoctl.model.load import compute_dtype
from dpoctl.model.memory import free_bytes
from dpoctl.model.sharding import Sharding
from dpoctl.recipe.consistency import WHOLE_MATRICES
from dpoctl.recipe.schema import Recipe, TrainingSection
from dpoctl.tasks import fsdp_options
from dpoctl.tasks.estimate import Estimator
from dpoctl.tasks.fit import LEFT_FOR_STEPS, in_bytes
from dpoctl.tasks.footprint import Subject, states_of

WHOLE_EVAL = "evaluate it with one process, or merge and serve it: --model-url"
HELD_IN_EVAL = ("weights", "copies in another precision")
"""What of the states of a training an evaluation holds too."""


def choose_sharding(
    recipe: Recipe,
    accelerator: Accelerator,
    tokenizer: PreTrainedTokenizerBase,
    store: TokenStore | None = None,
    *,
    is_known: bool = True,
) -> Sharding | None:
    """Decide whether to divide the model of a recipe over the ranks; the same on all of them.

    Args:
        recipe: checked and complete.
        accelerator: ranks, device and precision.
        tokenizer: of the recipe.
        store: the training rows; without them only weights, gradients and optimizer state are compared.
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
    if training.sharding == "auto" and not asked and not (is_known and _exceeds(recipe, accelerator, tokenizer, store)):
        _say_without_effect(training)
        return None
    dtype = compute_dtype(recipe, accelerator.device)
    _refuse(recipe, ranks, dtype)
    return _division(recipe, accelerator, training.replicas, dtype)


def choose_eval_sharding(
    recipe: Recipe,
    accelerator: Accelerator,
    tokenizer: PreTrainedTokenizerBase,
    *,
    models: int,
    is_known: bool = True,
) -> Sharding | None:
    """Decide whether to divide the models of an evaluation over the ranks; the same on all of them.

    Args:
        recipe: of the run.
        accelerator: ranks, device and precision.
        tokenizer: of the recipe.
        models: the number of models of that size that a rank holds at a time.
        is_known: whether the recipe says how large the model is; if not, `auto` does not divide it.

    Returns:
        The division, or None if each rank shall hold whole models.

    Raises:
        UsageError: they have to be divided, and cannot be.
    """
    training, ranks = recipe.training, accelerator.num_processes
    asked = fsdp_options.request(os.environ)
    if ranks == 1 or training.sharding == "none":
        return None
    must = training.sharding == "full" or asked
    if not must and not (is_known and _eval_exceeds(recipe, accelerator, tokenizer, models)):
        return None
    dtype = compute_dtype(recipe, accelerator.device)
    refuse_undividable(recipe, dtype, WHOLE_EVAL)
    # The run may have had another number of processes.
    replicas = training.replicas if ranks % training.replicas == 0 else 1
    console.say(f"sharding: the models are divided over {ranks // replicas} processes")
    return _division(recipe, accelerator, replicas, dtype)


def _division(recipe: Recipe, accelerator: Accelerator, replicas: int, dtype: torch.dtype) -> Sharding:
    """Return the division of a model; the ranks gather the weights of full training in the computation's dtype."""
    gathered = dtype if recipe.lora is None and dtype != torch.float32 else None
    return Sharding(accelerator.device, accelerator.num_processes, replicas, gathered, recipe.training.cpu_offload)


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
    training = recipe.training
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
    if recipe.method == "sft" and recipe.sft.router_aux_loss_coef is not None:
        raise UsageError(
            "sft.router_aux_loss_coef has not been tried with a sharded model",
            hint="remove it, or set training.sharding: none",
        )
    refuse_undividable(recipe, dtype)


def refuse_undividable(recipe: Recipe, dtype: torch.dtype, hint: str | None = None) -> None:
    """Check that a kind of model can be divided.

    Args:
        recipe: of the model.
        dtype: the precision of the computation.
        hint: what to do instead; None names keys of the recipe.

    Raises:
        UsageError: it cannot.
    """
    lora, quantization = recipe.lora, recipe.quantization
    if lora is not None and (lora.use_dora or lora.changes_base):
        key = "use_dora" if lora.use_dora else "init_lora_weights"
        raise UsageError(
            f"lora.{key} needs whole weight matrices, and a sharded model has parts of them",
            hint=hint or f"remove lora.{key}, or set training.sharding: none",
        )
    if dtype == torch.float16:
        raise UsageError("a sharded model cannot compute in float16", hint=hint or "set model.dtype: bfloat16")
    if quantization is not None and quantization.load_in_8bit:
        raise UsageError(
            "a model of 8 bits cannot be sharded: bitsandbytes keeps its weights outside of the parameters",
            hint=hint or "set quantization.load_in_4bit: true instead, or training.sharding: none",
        )


def _eval_exceeds(recipe: Recipe, accelerator: Accelerator, tokenizer: PreTrainedTokenizerBase, models: int) -> bool:
    """Whether the weights of an evaluation do not fit on every rank; says the arithmetic if so."""
    least = _least_free(accelerator)
    try:
        sizes = states_of(recipe, tokenizer, compute_dtype(recipe, accelerator.device))
    except UserError as error:
        # The model that a run started from may be gone, and need not be there to measure the run.
        console.note(f"sharding: every process holds whole models, because their size is not known: {error.message}")
        return False
    needed = models * sum(sizes.get(name, 0) for name in HELD_IN_EVAL)
    if needed <= LEFT_FOR_STEPS * least:
        return False
    console.say(
        f"sharding: the models of this evaluation need {in_bytes(needed)}, and {in_bytes(least)} are free for each "
        "process"
    )
    return True


def _least_free(accelerator: Accelerator) -> float:
    """Return the memory that is free for each process, on that with the least."""
    device = accelerator.device
    # The ranks of a machine share the memory of its CPUs.
    sharers = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1
    free = torch.tensor([free_bytes(device) / sharers], dtype=torch.float64, device=device)
    return float(accelerator.gather(free).min())


def _exceeds(
    recipe: Recipe, accelerator: Accelerator, tokenizer: PreTrainedTokenizerBase, store: TokenStore | None
) -> bool:
    """Whether a run does not fit on every rank if each holds the whole model; says the arithmetic if so."""
    device, ranks = accelerator.device, accelerator.num_processes
    least, dtype = _least_free(accelerator), compute_dtype(recipe, device)
    needed = sum(states_of(recipe, tokenizer, dtype).values())
    if needed <= least and store is not None:
        subject = Subject(
            recipe, tokenizer, store, Lengths.of(store), device.type, dtype, ranks, cache=Cache(cache_dir())
        )
        found = [Estimator(subject, least).choose() if accelerator.is_main_process else None]
        (estimate,) = broadcast_object_list(found)
        assert estimate is not None
        if estimate.fits:
            return False
        needed = estimate.peak
    elif needed <= LEFT_FOR_STEPS * least:
        return False
    console.say(
        f"sharding: the run needs {in_bytes(needed)}, and {in_bytes(least)} are free for each process: divided over "
        f"{ranks // recipe.training.replicas} processes, which share weights, gradients and optimizer state"
    )
    return True

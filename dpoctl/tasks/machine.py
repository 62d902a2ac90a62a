"""The machine a run finds itself on: its ranks, its precision, and how many tokens fit into a micro-batch."""

import ctypes
import logging
import os
import sys
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor

from dpoctl.core.planner import Lengths
from dpoctl.errors import SetupError
from dpoctl.model.checkpointing import activation_bytes_per_token, ladder
from dpoctl.model.load import resolve_dtype
from dpoctl.model.policy import Policy
from dpoctl.recipe.schema import Recipe

MIXED_PRECISION = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}
# One rank may tokenize for long while the others wait for it.
PATIENCE = timedelta(hours=3)
# Gradient and two moments of every trained parameter, in float32.
BYTES_PER_TRAINED = 12
# Autocast keeps the cast of every trained weight until the end of the forward.
BYTES_PER_CAST = 2
# glibc's M_MMAP_MAX: no block is mapped for itself, not even an embedding's gradient; and M_TRIM_THRESHOLD, as large as
# an int: what is free at the end of the heap stays.
MALLOC = {-4: 0, -1: (1 << 31) - 1}
# On a CPU larger micro-batches bring no speed, only memory.
CPU_TOKENS = 2048
# A few tokens less than fit: allocators need room, and the head its chunk of logits.
SLACK = 0.6


def quiet_libraries() -> None:
    """Keep the libraries' own bars and remarks out of what this program says."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def build_accelerator(recipe: Recipe) -> Accelerator:
    """Join the other ranks, on GPUs if there are any, else on CPUs.

    Raises:
        SetupError: They cannot be found.
    """
    # accelerate keeps the precision of a process's first run for all that follow; its process group stays.
    AcceleratorState._reset_state()
    on_gpu = torch.cuda.is_available()
    dtype = resolve_dtype(recipe.model.dtype, torch.device("cuda" if on_gpu else "cpu"))
    try:
        accelerator = Accelerator(
            mixed_precision=MIXED_PRECISION[dtype],
            cpu=not on_gpu,
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(seconds=recipe.training.ddp_timeout)),
                # Experts that no token of a micro-batch visits get no gradient.
                DistributedDataParallelKwargs(
                    find_unused_parameters=_has_experts(recipe), gradient_as_bucket_view=True
                ),
            ],
        )
    except (dist.DistError, RuntimeError) as error:
        if "WORLD_SIZE" not in os.environ:
            raise
        raise SetupError(
            f"rank {os.environ.get('RANK')} of {os.environ['WORLD_SIZE']} did not find the others: "
            f"{str(error).splitlines()[0][:300]}",
            hint="every rank needs the same MASTER_ADDR and MASTER_PORT, and a RANK of its own",
        ) from error
    be_patient(PATIENCE.total_seconds())
    return accelerator


def keep_freed_memory() -> None:
    """Let the C library keep what a step frees: the next step wants as much, and new pages come one by one, cleared.

    Without this a CPU spends a tenth of its time on them. Nothing happens where the library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter, size in MALLOC.items():
            mallopt(parameter, size)


def be_patient(seconds: float) -> None:
    """Set how long this process waits for the others in each exchange."""
    if dist.is_initialized():
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), dist.group.WORLD)


def token_budget(recipe: Recipe, policy: Policy, lengths: Lengths, accelerator: Accelerator) -> tuple[int, int]:
    """Return the tokens of a micro-batch, and every how many layers are recomputed: the same on all ranks.

    With `gradient_checkpointing: auto` no layer is recomputed if two of the longest records fit like that; else every
    n-th with the largest n that lets them fit; else every one. Recomputing all costs a third to a half of the speed.
    """
    training = recipe.training
    wanted, budget = training.gradient_checkpointing, training.max_tokens_per_device
    longest = int(lengths.tokens.max())
    choices = ladder() if wanted == "auto" else (int(wanted),)
    fits = {every: _fitting(policy, every, accelerator) for every in choices}
    needed = 2 * longest if budget == "auto" else max(longest, budget)
    every = next((every for every in choices if fits[every] >= needed), choices[-1])
    if budget != "auto":
        return budget, every
    return fits[every] if accelerator.device.type == "cuda" else min(fits[every], CPU_TOKENS), every


def _fitting(policy: Policy, every: int, accelerator: Accelerator) -> int:
    trained = sum(p.numel() for p in policy.model.parameters() if p.requires_grad)
    mixed = policy.dtype != torch.float32
    states = trained * (BYTES_PER_TRAINED + (BYTES_PER_CAST if mixed else 0))
    free = (_free_bytes(accelerator.device) - states) * SLACK
    per_token = activation_bytes_per_token(policy.causal.config, policy.dtype, every)
    tokens = max(1, int(free // per_token))
    everywhere: Tensor = accelerator.gather(torch.tensor([tokens], device=accelerator.device))
    return int(everywhere.min())


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        # What the allocator keeps for later use is free for us.
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _has_experts(recipe: Recipe) -> bool:
    config = recipe.model.from_scratch.config if recipe.model.from_scratch else {}
    return any("expert" in key for key in config)

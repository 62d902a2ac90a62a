"""Refuse settings of launchers that dpoctl does not support, and a process that would run alone.

Imports nothing large, so that a command is refused before it loads anything.
"""

import re
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

from dpoctl.errors import SetupError, UsageError
from dpoctl.tasks import fsdp_options
from dpoctl.tasks.fsdp_options import ON

if TYPE_CHECKING:
    from dpoctl.recipe.schema import TrainingSection


class Unsupported(NamedTuple):
    """Something that accelerate does on request, and dpoctl does not.

    Attributes:
        asked: A pattern of `NAME=value`, the value in lower case.
        reason: What is asked for, and why dpoctl does not do it.
        hint: What to do instead; `{drop}` stands for how to take the request back.
    """

    asked: str
    reason: str
    hint: str


SHARDED_HERE = "{drop}; training.sharding: full in the recipe divides a model over the processes"
UNSUPPORTED = tuple(
    Unsupported(*row)
    for row in (
        (
            rf"ACCELERATE_(USE_DEEPSPEED|DEEPSPEED_\w+)={ON}",
            "DeepSpeed: its engine runs backward and the optimizer itself, and its checkpoints are pickles",
            SHARDED_HERE,
        ),
        (
            rf"(ACCELERATE_USE_MEGATRON_LM|MEGATRON_LM_\w+)={ON}",
            "Megatron-LM: it trains models of its own in a loop of its own",
            SHARDED_HERE,
        ),
        (
            rf"ACCELERATE_USE_PARALLELISM_CONFIG={ON}|PARALLELISM_CONFIG_\w+_SIZE=(?!1$){ON}",
            "a parallelism config: dpoctl computes each layer on one device",
            SHARDED_HERE + ", and training.replicas sets the number of copies",
        ),
        (
            rf"(ACCELERATE_USE_XLA|ACCELERATE_USE_TPU|USE_TORCH_XLA)={ON}|PJRT_DEVICE=tpu",
            "TPUs: dpoctl trains on CUDA GPUs and on CPUs",
            "unset PJRT_DEVICE, set USE_TORCH_XLA=0, and request no TPU from accelerate",
        ),
        (
            "ACCELERATE_MIXED_PRECISION=fp8",
            "fp8: dpoctl computes in bfloat16, float16 or float32",
            "{drop}; use model.dtype instead",
        ),
        (
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=(?!1$).*",
            "gradient accumulation: accelerate would divide every loss once more",
            "{drop}; use training.global_batch_size instead",
        ),
        (
            "ACCELERATE_DYNAMO_BACKEND=(?!no$).*",
            "torch.compile: accelerate would compile the whole model again for batches of other lengths",
            "{drop}; use training.torch_compile instead",
        ),
    )
)
PRECISIONS = {"bf16": "bfloat16", "fp16": "float16"}
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
ONE_OF_SEVERAL = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK")
SIZES = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE")
LAST_PORT = 65535
NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def check_environment(
    environment: Mapping[str, str], dtype: str = "auto", training: "TrainingSection | None" = None
) -> None:
    """Check that this process can do what its launcher asks for, and knows the other processes.

    Args:
        environment: The environment variables of this process.
        dtype: The `model.dtype` of the recipe, where it is known.
        training: The section of the recipe; None for a command that does not shard its model.

    Raises:
        UsageError: The launcher asks for something that dpoctl does not do, or started processes that do not know of
            each other.
        SetupError: The variables that number the processes are incomplete or wrong.
    """
    refuse_unsupported(environment, dtype, training)
    _check_number(environment, "OMP_NUM_THREADS", "set it to the number of threads of a process, or unset it", least=1)
    _check_ranks(environment)
    _check_strangers(environment)


def refuse_unsupported(
    environment: Mapping[str, str],
    dtype: str = "auto",
    training: "TrainingSection | None" = None,
    *,
    source: str = "",
) -> None:
    """Refuse what dpoctl does not do.

    Args:
        environment: The variables that may ask for it.
        dtype: The precision of the run; `auto` if it is not decided yet.
        training: The section of the recipe; None for a command that does not shard its model.
        source: The file that stands behind the variables, for the message.

    Raises:
        UsageError: A variable asks for it, or for another precision, or for other sharding than the recipe.
    """
    # With torch_xla installed accelerate trains on TPUs, unless this variable forbids it.
    xla = environment.get("USE_TORCH_XLA", "true") if find_spec("torch_xla") else ""
    variables = {**environment, "USE_TORCH_XLA": xla}
    for asked, reason, hint in UNSUPPORTED:
        for name, value in variables.items():
            if re.fullmatch(asked, f"{name}={value.lower()}"):
                raise UsageError(
                    f"{source or f'{name}={value}'} requests {reason}",
                    hint=hint.format(drop=_how_to_drop(name, source)),
                )
    fsdp_options.check(environment, training, source, lambda name: _how_to_drop(name, source))
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "").lower()
    # "no" is what `accelerate launch` sets where nothing was asked for.
    wanted = PRECISIONS.get(precision, dtype)
    if dtype not in ("auto", wanted):
        raise UsageError(
            f"{source or 'ACCELERATE_MIXED_PRECISION'} requests {precision}, and the recipe computes in {dtype}",
            hint=f"{_how_to_drop('ACCELERATE_MIXED_PRECISION', source)}; or set model.dtype: {wanted}",
        )


def _how_to_drop(name: str, source: str) -> str:
    """Say how to take back what a variable, or the file behind it, requests."""
    return "remove it from the file" if source else f"unset {name}, or remove what sets it from accelerate's options"


def variables_of(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the variables by which accelerate asks for what a config file of its own asks for."""
    compiled = config.get("dynamo_config")
    compiled = compiled if isinstance(compiled, Mapping) else {}
    backends = (compiled.get("dynamo_backend"), compiled.get("backend"), config.get("dynamo_backend"), "no")
    sharded = config.get("fsdp_config") if config.get("distributed_type") == "FSDP" else None
    options = sharded.items() if isinstance(sharded, Mapping) else ()
    asked = {
        f"ACCELERATE_USE_{config.get('distributed_type')}": True,
        **{f"FSDP_{str(name).upper().removeprefix('FSDP_')}": value for name, value in options},
        "ACCELERATE_USE_PARALLELISM_CONFIG": bool(config.get("parallelism_config")),
        "ACCELERATE_MIXED_PRECISION": config.get("mixed_precision"),
        "ACCELERATE_DYNAMO_BACKEND": next(filter(None, backends)),
    }
    return {name: str(value) for name, value in asked.items()}


def _check_ranks(environment: Mapping[str, str]) -> None:
    """Check the variables that number the processes.

    Raises:
        SetupError: One is missing, is no number, or is too large.
    """
    given = [name for name in ONE_OF_SEVERAL if name in environment]
    if not given:
        return
    hint = f"start the processes with torchrun; for a job on this machine alone unset {' '.join(given)}"
    for name in (*ONE_OF_SEVERAL, *SIZES, "MASTER_PORT"):
        _check_number(environment, name, hint, least=int(name in (*SIZES, "MASTER_PORT")))
    missing = [name for name in NEEDED if name not in environment]
    if missing and (environment.get("WORLD_SIZE") != "1" or "LOCAL_RANK" in environment):
        raise SetupError(
            f"{given[0]}={environment[given[0]]} says that this process is one of several, and {missing[0]} is not "
            "set: it would run alone, or wait forever",
            hint=hint,
        )
    if int(environment.get("MASTER_PORT", "1")) > LAST_PORT:
        raise SetupError(f"MASTER_PORT is {environment['MASTER_PORT']}, and the last port is {LAST_PORT}", hint=hint)
    for name, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if size in environment and int(environment.get(name, "0")) >= int(environment[size]):
            raise SetupError(
                f"{name} is {environment[name]}, but must be smaller than {size} ({environment[size]})", hint=hint
            )


def _check_number(environment: Mapping[str, str], name: str, hint: str, *, least: int) -> None:
    """Check that a variable, if it is set, is a whole number that is large enough.

    Raises:
        SetupError: It is not.
    """
    value = environment.get(name, str(least))
    if not (value.isascii() and value.isdecimal() and int(value) >= least):
        raise SetupError(f"{name} is {value!r}, but must be a whole number, {least} or larger", hint=hint)


def _check_strangers(environment: Mapping[str, str]) -> None:
    """Look for other processes that this one does not know.

    Raises:
        UsageError: There are such processes, and each would run separately.
    """
    started = {key: int(environment[key]) for key in MPI_SIZES if environment.get(key, "").isdecimal()}
    key, size = max(started.items(), key=lambda item: item[1], default=("", 1))
    if size > 1 and "LOCAL_RANK" not in environment:
        raise UsageError(
            f"mpirun or srun started {size} processes ({key}), and each would run separately",
            hint="start one process and pass --num-processes N, or use torchrun or accelerate launch",
        )
    # torchrun counts the launchers; who numbers processes without it counts these.
    known = int(environment.get("GROUP_WORLD_SIZE") or environment.get("WORLD_SIZE") or size)
    if known < size:
        raise UsageError(
            f"{key}={size} says that mpirun or srun started {size} launchers, but this one was configured for {known}: "
            "each would run separately",
            hint=f"give each torchrun --nnodes {size} and the same --rdzv-endpoint, or start only one",
        )
    # `accelerate launch` sets these two, and no rank, where it starts one process of several: it does so wherever it
    # finds fewer than two GPUs, on every machine.
    if {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= environment.keys() and "LOCAL_RANK" not in environment:
        raise UsageError(
            "accelerate launch was asked for several processes, and started one without a rank: it would run alone",
            hint="use torchrun, or dpoctl's --num-processes N on one machine; for one process unset MASTER_ADDR",
        )

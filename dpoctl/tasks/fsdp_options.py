"""Requests of `accelerate launch --use_fsdp`: dpoctl's own sharding runs instead, if it does what is asked for.

Imports nothing large, so that a command is refused before it loads anything.
"""

import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING, NamedTuple

from dpoctl.errors import UsageError

if TYPE_CHECKING:
    from dpoctl.recipe.schema import TrainingSection

ON = r"(?!(0|f|false|n|no|off|none)$).+"
"""A value that asks for something, in lower case."""
SWITCH, MARK = "ACCELERATE_USE_FSDP", "FSDP_VERSION"
REQUEST = rf"({SWITCH}|FSDP_\w+)={ON}"
STRATEGY = "FSDP_(SHARDING_STRATEGY|RESHARD_AFTER_FORWARD)"


class FsdpOption(NamedTuple):
    """An option of accelerate that changes where a model is kept.

    Attributes:
        asked: A pattern of `NAME=value`, the value in lower case.
        is_met: Whether a recipe does what is asked for.
        what: What is asked for.
        hint: What to do, other than to take the request back.
    """

    asked: str
    is_met: "Callable[[TrainingSection], bool]"
    what: str
    hint: str


OPTIONS = tuple(
    FsdpOption(*row)
    for row in (
        (
            rf"{STRATEGY}=(hybrid_shard|4)",
            lambda training: training.replicas > 1,
            "several copies of the sharded model",
            "set training.replicas to their number, mostly that of the machines",
        ),
        (
            rf"{STRATEGY}=(shard_grad_op|2|hybrid_shard_zero2|5)|FSDP_RESHARD_AFTER_FORWARD=(?!{ON}).+",
            lambda training: False,
            "weights that stay gathered until backward, and dpoctl frees them after forward",
            "request FULL_SHARD, or HYBRID_SHARD with training.replicas",
        ),
        (
            rf"{STRATEGY}=(no_shard|no_reshard|3)",
            lambda training: False,
            "a whole model on every device",
            "set training.sharding: none, and request no FSDP",
        ),
        (
            rf"{STRATEGY}=(?!(full_shard|1|hybrid_shard|4|t|true|y|yes|on)$).+",
            lambda training: False,
            "a strategy that dpoctl does not know",
            "request FULL_SHARD",
        ),
        (
            rf"FSDP_OFFLOAD_PARAMS={ON}",
            lambda training: training.cpu_offload,
            "weights and optimizer state in host memory",
            "set training.cpu_offload: true",
        ),
        (
            rf"FSDP_ACTIVATION_CHECKPOINTING={ON}",
            lambda training: training.gradient_checkpointing is not False,
            "recomputed activations, and the recipe forbids them",
            "set training.gradient_checkpointing: true",
        ),
        (
            rf"FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD={ON}",
            lambda training: False,
            "activations in host memory, which dpoctl keeps on the device",
            "set training.gradient_checkpointing: true",
        ),
        (
            rf"FSDP_IGNORED_MODULES={ON}",
            lambda training: False,
            "modules that are left out, and training.sharding divides all of them",
            "",
        ),
    )
)
SILENT = (
    rf"FSDP_\w+=(?!{ON}).*|{STRATEGY}=.*|FSDP_(OFFLOAD_PARAMS|ACTIVATION_CHECKPOINTING)=.*"
    # Layers are found, weights loaded and checkpoints written in another way, with the same result.
    r"|FSDP_(VERSION|TRANSFORMER_CLS_TO_WRAP|MIN_NUM_PARAMS|STATE_DICT_TYPE|SYNC_MODULE_STATES)=.*"
    r"|FSDP_(CPU_RAM_EFFICIENT_LOADING|USE_ORIG_PARAMS)=.*"
    r"|FSDP_AUTO_WRAP_POLICY=transformer_based_wrap|FSDP_BACKWARD_PREFETCH=backward_pre"
)
"""Options that dpoctl meets, or that make no difference: a pattern as those above."""


def request(environment: Mapping[str, str]) -> str:
    """Return the variable that asks for FSDP, with its value; empty if none does."""
    return next(_matching(environment, REQUEST), "")


def without_effect(environment: Mapping[str, str]) -> list[str]:
    """Return the options that change only speed and memory, and do nothing here."""
    return [found for found in _matching(environment, r"FSDP_\w+=.*") if not _fits(SILENT, found)]


def check(
    environment: Mapping[str, str], training: "TrainingSection | None", source: str, drop: Callable[[str], str]
) -> None:
    """Check that the recipe does what is asked for.

    Args:
        environment: The variables that may ask for it.
        training: The section of the recipe; None for a command that holds the whole model on each device.
        source: The file that stands behind the variables, for the message.
        drop: Says how to take back what a variable asks for.

    Raises:
        UsageError: It does not.
    """
    asked = request(environment)
    if not asked:
        return
    name = asked.partition("=")[0]
    if training is None:
        raise UsageError(f"{source or asked} requests FSDP, and this command shards no model", hint=drop(name))
    if training.sharding == "none":
        raise UsageError(
            f"{source or asked} requests FSDP, and the recipe has training.sharding: none",
            hint=f"set training.sharding: full; or {drop(name)}",
        )
    for option in OPTIONS:
        for found in _matching(environment, option.asked):
            if not option.is_met(training):
                name = found.partition("=")[0]
                where = f"{source} with {found}" if source else found
                hint = "; or ".join(filter(None, (option.hint, drop(name))))
                raise UsageError(f"{where} requests {option.what}", hint=hint)


def take_over(environment: MutableMapping[str, str]) -> None:
    """Keep accelerate and transformers from sharding by themselves; `request` still finds that it was asked for."""
    if request(environment):
        # All of its options have an effect only together with this variable.
        environment.pop(SWITCH, None)
        environment.setdefault(MARK, "2")


def _matching(environment: Mapping[str, str], pattern: str) -> Iterator[str]:
    return (f"{name}={value}" for name, value in environment.items() if _fits(pattern, f"{name}={value}"))


def _fits(pattern: str, variable: str) -> bool:
    name, _, value = variable.partition("=")
    return re.fullmatch(pattern, f"{name}={value.lower()}") is not None

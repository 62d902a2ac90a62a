"""Dropout off: as modules, as numbers that functional attention reads, and as a router's noise."""

from typing import Any

from torch import nn
from transformers import PretrainedConfig

_NOISE = ("drop", "jitter_noise")


def disable_dropout(model: nn.Module, config: PretrainedConfig) -> dict[str, float]:
    """Make a model deterministic in train mode, in place.

    Policy and reference must be the same function at the first step, and a prompt that is shared by several answers
    must be one computation.

    Returns:
        What the configuration said before, to be written back into an exported one.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if _is_noise(name, value):
                setattr(module, name, type(value)(0))
    before = {name: value for name, value in vars(config).items() if _is_noise(name, value)}
    for name, value in before.items():
        setattr(config, name, type(value)(0))
    return before


def _is_noise(name: str, value: Any) -> bool:
    return isinstance(value, float) and value != 0.0 and any(word in name for word in _NOISE)

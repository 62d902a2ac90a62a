"""The optimizers of a recipe."""

from collections.abc import Collection, Iterable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer, RMSprop

from dpoctl.core.low_precision import BFloat16AdamW, rounded
from dpoctl.core.muon import MuonAdamW
from dpoctl.errors import SetupError
from dpoctl.recipe.schema import LoraSection, TrainingSection

BITSANDBYTES = {
    "adamw_8bit": "AdamW8bit",
    "paged_adamw_32bit": "PagedAdamW32bit",
    "paged_adamw_8bit": "PagedAdamW8bit",
    "lion_32bit": "Lion32bit",
    "lion_8bit": "Lion8bit",
    "paged_lion_32bit": "PagedLion32bit",
    "paged_lion_8bit": "PagedLion8bit",
}
"""The optimizers of bitsandbytes, and their classes."""
_PAGED = {"paged_adamw_32bit": 8, "paged_adamw_8bit": 2, "paged_lion_32bit": 4, "paged_lion_8bit": 1}
_MOMENTS = {"adamw_8bit": 2, "rmsprop": 4, "lion_32bit": 4, "lion_8bit": 1, "adafactor": 0}
"""Bytes of the moments of each parameter, paged ones and others. Adafactor keeps a row and a column of a matrix."""


def build_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]],
    training: TrainingSection,
    *,
    outside: Collection[str] = (),
    scales: Mapping[str, float] | None = None,
) -> Optimizer:
    """Build the recipe's optimizer over the trainable parameters; biases and norms have no weight decay.

    Args:
        parameters: the parameters by name.
        training: the settings of the optimizer.
        outside: names of parameters outside of the hidden layers, for which there is no Muon.
        scales: the learning rate of some parameters, in relation to that of all others, by name.
    """
    trained = [(name, p) for name, p in parameters if p.requires_grad]
    scales = scales or {}
    in_bfloat16 = training.param_dtype == "bfloat16"
    adam: dict[str, Any] = {
        "lr": training.learning_rate,
        "betas": (training.adam_beta1, training.adam_beta2),
        "eps": training.adam_epsilon,
    }
    if training.optim == "muon":
        hidden = {name for name, p in trained if p.ndim == 2 and name not in outside}
        matrices, others = (
            _groups([(name, p) for name, p in trained if (name in hidden) == is_hidden], scales, training)
            for is_hidden in (True, False)
        )
        muon = {"adjust_lr_fn": "match_rms_adamw"} | training.optim_args
        return MuonAdamW(matrices, others, muon | {"lr": training.learning_rate}, adam)
    groups = _groups(trained, scales, training)
    if training.optim == "adamw":
        return BFloat16AdamW(groups, seed=training.seed, **adam) if in_bfloat16 else AdamW(groups, fused=True, **adam)
    if training.optim == "rmsprop":
        return RMSprop(groups, lr=training.learning_rate, eps=training.adam_epsilon)
    if training.optim == "adafactor":
        from transformers.optimization import Adafactor  # noqa: PLC0415 - it imports peft, which takes a second

        arguments = {"scale_parameter": False} | training.optim_args
        return Adafactor(groups, lr=training.learning_rate, relative_step=False, **arguments)
    if "lion" in training.optim:
        del adam["eps"]
    kind = _bitsandbytes_class(training.optim, trained[0][1].device)
    optimizer: Optimizer = (rounded(kind, training.seed) if in_bfloat16 else kind)(groups, **adam)
    return optimizer


def rate_scales(lora: LoraSection | None, parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, float]:
    """Return the parameters that LoRA+ gives a learning rate of their own, in relation to that of the others."""
    ratio = None if lora is None else lora.loraplus_lr_ratio
    scaled = (".lora_B.", ".lora_embedding_B.", ".lora_magnitude_vector.")
    return {name: ratio for name, _ in parameters if any(part in name for part in scaled)} if ratio else {}


def _groups(
    parameters: Iterable[tuple[str, nn.Parameter]], scales: Mapping[str, float], training: TrainingSection
) -> list[dict[str, Any]]:
    """Return groups of parameters with one weight decay and one scale of the learning rate each."""
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in parameters:
        scale, decays = scales.get(name, 1.0), parameter.ndim >= 2
        fresh: dict[str, Any] = {"params": [], "weight_decay": training.weight_decay if decays else 0.0}
        fresh |= {} if scale == 1.0 else {"lr_scale": scale, "lr": training.learning_rate * scale}
        groups.setdefault((scale, not decays), fresh)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def _bitsandbytes_class(optim: str, device: torch.device) -> type[Optimizer]:
    if find_spec("bitsandbytes") is None:
        raise SetupError(f"optim {optim} needs bitsandbytes", hint="pip install 'dpoctl[quant]'")
    import bitsandbytes  # noqa: PLC0415 - an optional extra

    # Pages move between a device and its host; on a CPU alone there is nothing to page.
    name = BITSANDBYTES[optim] if device.type != "cpu" else BITSANDBYTES[optim].removeprefix("Paged")
    kind: type[Optimizer] = getattr(bitsandbytes.optim, name)
    return kind


def state_bytes(training: TrainingSection) -> tuple[int, int, int]:
    """Return the bytes of each trained parameter in full fine-tuning: its weight, its gradient, its moments.

    Pages can leave the device, so the moments of paged optimizers count as nothing.
    """
    weight = 2 if training.param_dtype == "bfloat16" else 4
    return weight, weight, 0 if training.optim in _PAGED else stored_moments(training)


def stored_moments(training: TrainingSection) -> int:
    """Return the bytes of the moments of each parameter in a checkpoint.

    Of Muon these are the moments of AdamW, the most that a parameter has.
    """
    adam = 4 if training.param_dtype == "bfloat16" else 8
    return (_MOMENTS | _PAGED).get(training.optim, adam)


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Set the learning rate of all parameter groups, times the `lr_scale` of a group that has one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)

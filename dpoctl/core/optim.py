"""The optimizers of a recipe."""

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer, RMSprop

from dpoctl.core.low_precision import BFloat16AdamW, rounded
from dpoctl.errors import SetupError
from dpoctl.recipe.schema import TrainingSection


def build_optimizer(parameters: Iterable[tuple[str, nn.Parameter]], training: TrainingSection) -> Optimizer:
    """Build the recipe's optimizer over the trainable parameters; biases and norms have no weight decay."""
    trained = [p for _, p in parameters if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    adam: dict[str, Any] = {
        "lr": training.learning_rate,
        "betas": (training.adam_beta1, training.adam_beta2),
        "eps": training.adam_epsilon,
    }
    in_bfloat16 = training.param_dtype == "bfloat16"
    if training.optim == "adamw":
        return BFloat16AdamW(groups, seed=training.seed, **adam) if in_bfloat16 else AdamW(groups, fused=True, **adam)
    if training.optim == "rmsprop":
        return RMSprop(groups, lr=training.learning_rate, eps=training.adam_epsilon)
    if find_spec("bitsandbytes") is None:
        raise SetupError(f"optim {training.optim} needs bitsandbytes", hint="pip install 'dpoctl[quant]'")
    import bitsandbytes  # noqa: PLC0415 - an optional extra

    # Pages move between a device and its host; on a CPU alone there is nothing to page.
    paged = trained[0].device.type != "cpu"
    kinds = {
        "adamw_8bit": "AdamW8bit",
        "paged_adamw_32bit": "PagedAdamW32bit" if paged else "AdamW32bit",
        "paged_adamw_8bit": "PagedAdamW8bit" if paged else "AdamW8bit",
    }
    kind = getattr(bitsandbytes.optim, kinds[training.optim])
    optimizer: Optimizer = (rounded(kind, training.seed) if in_bfloat16 else kind)(groups, **adam)
    return optimizer


def state_bytes(training: TrainingSection) -> tuple[int, int, int]:
    """Return the bytes of each trained parameter in full fine-tuning: its weight, its gradient, its moments.

    Pages can leave the device, so the moments of paged optimizers count as nothing.
    """
    weight = 2 if training.param_dtype == "bfloat16" else 4
    moments = {"adamw": 2 * weight, "adamw_8bit": 2, "rmsprop": 4}.get(training.optim, 0)
    return weight, weight, moments


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Set the learning rate of all parameter groups, times the `lr_scale` of a group that has one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)

"""Activation memory: recompute the layers in the backward pass, and what is saved by it."""

import inspect
from typing import TYPE_CHECKING, Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from dpoctl.errors import UsageError

if TYPE_CHECKING:
    from dpoctl.model.policy import Policy

_INTERMEDIATE = ("moe_intermediate_size", "intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "d_ff")


def ladder() -> tuple[int, ...]:
    """Choices from the fastest to the leanest: no layer is recomputed, every n-th one, every one."""
    enable = getattr(PreTrainedModel, "activation_checkpointing_enable", None)
    some = enable is not None and "every_n_layers" in inspect.signature(enable).parameters
    return (0, 4, 2, 1) if some else (0, 1)


def set_gradient_checkpointing(policy: "Policy", every: int) -> None:
    """Recompute every so many decoder layers in the backward pass, or none for 0.

    Raises:
        UsageError: the architecture cannot do it.
    """
    model: Any = policy.causal
    if not model.supports_gradient_checkpointing:
        if every:
            raise UsageError(
                f"{type(model).__name__} cannot recompute its layers", hint="set training.gradient_checkpointing: false"
            )
        return
    # Renamed in transformers 5; the old name is the only one before, and warns after.
    renamed = hasattr(model, "activation_checkpointing_enable")
    word = "activation" if renamed else "gradient"
    if not every:
        getattr(model, f"{word}_checkpointing_disable")()
        return
    options: dict[str, Any] = {f"{word}_checkpointing_kwargs": {"use_reentrant": False}}
    if every > 1:
        options["every_n_layers"] = every
    getattr(model, f"{word}_checkpointing_enable")(**options)
    # Only the reentrant kind needs an input that requires gradients; it costs the backward of the first layer.
    model.disable_input_require_grads()


def activation_bytes_per_token(config: PretrainedConfig, dtype: torch.dtype, every: int) -> int:
    """Estimate what a forward pass keeps for the backward pass, for each token, without the head.

    A Llama layer keeps four times its MLP's width and eight times its own in `dtype`, and its norms' inputs in
    float32; one that is recomputed keeps its input only, and is whole while its turn lasts.

    Args:
        config: of the model.
        dtype: of the computation.
        every: every so many layers are recomputed; 0 is none.

    Returns:
        Bytes per token over all layers.
    """
    hidden, layers = int(config.hidden_size), int(config.num_hidden_layers)
    sizes = (getattr(config, name, None) for name in _INTERMEDIATE)
    intermediate = int(next((size for size in sizes if size), 4 * hidden))
    intermediate *= int(getattr(config, "num_experts_per_tok", None) or 1)
    layer = dtype.itemsize * (4 * intermediate + 8 * hidden) + 16 * hidden
    again = -(-layers // every) if every else 0
    return dtype.itemsize * hidden * again + layer * (layers - again + (again > 0))

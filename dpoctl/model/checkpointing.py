"""Activation memory: recompute the layers in the backward pass, and what is saved by it."""

from typing import TYPE_CHECKING, Any

import torch
from transformers import PretrainedConfig

from dpoctl.errors import UsageError

if TYPE_CHECKING:
    from dpoctl.model.policy import Policy

_INTERMEDIATE = ("moe_intermediate_size", "intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "d_ff")


def set_gradient_checkpointing(policy: "Policy", enabled: bool) -> None:
    """Recompute every decoder layer in the backward pass, or keep what the forward pass computed.

    Raises:
        UsageError: the architecture cannot do it.
    """
    model: Any = policy.causal
    if not model.supports_gradient_checkpointing:
        if enabled:
            raise UsageError(
                f"{type(model).__name__} cannot recompute its layers", hint="set training.gradient_checkpointing: false"
            )
        return
    # Renamed in transformers 5; the old name is the only one before, and warns after.
    renamed = hasattr(model, "activation_checkpointing_enable")
    word = "activation" if renamed else "gradient"
    if not enabled:
        getattr(model, f"{word}_checkpointing_disable")()
        return
    getattr(model, f"{word}_checkpointing_enable")(**{f"{word}_checkpointing_kwargs": {"use_reentrant": False}})
    # Only the reentrant kind needs an input that requires gradients; it costs the backward of the first layer.
    model.disable_input_require_grads()


def activation_bytes_per_token(config: PretrainedConfig, dtype: torch.dtype, checkpointing: bool) -> int:
    """Estimate what a forward pass keeps for the backward pass, for each token, without the head.

    A Llama layer keeps four times its MLP's width and eight times its own in `dtype`, and its norms' inputs in
    float32; with checkpointing a layer keeps its input only, and one layer at a time is recomputed.

    Returns:
        Bytes per token over all layers.
    """
    hidden, layers = int(config.hidden_size), int(config.num_hidden_layers)
    sizes = (getattr(config, name, None) for name in _INTERMEDIATE)
    intermediate = int(next((size for size in sizes if size), 4 * hidden))
    intermediate *= int(getattr(config, "num_experts_per_tok", None) or 1)
    layer = dtype.itemsize * (4 * intermediate + 8 * hidden) + 16 * hidden
    if checkpointing:
        return dtype.itemsize * hidden * layers + layer
    return layer * layers

"""Helpers for the modules of a model: adapted layers, embedding and head, dtype of activations, dropout.

peft is not imported here, because it takes as long as torch.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

_RANDOMNESS = ("drop", "jitter_noise")


def is_adapted(module: nn.Module) -> "TypeGuard[LoraLayer]":
    """Check that a module is a layer of the model wrapped by peft, with low-rank factors beside it."""
    return isinstance(getattr(module, "lora_A", None), nn.ModuleDict)


def base_layer(module: nn.Module) -> nn.Module:
    """Return the model's own layer of an adapted module, or the module itself."""
    return module.get_base_layer() if is_adapted(module) else module


def embedding_and_head(model: PreTrainedModel) -> tuple[nn.Module, nn.Module | None]:
    """Return the input embedding and the output head of a model."""
    untyped: Any = model
    return untyped.get_input_embeddings(), untyped.get_output_embeddings()


def embedding_and_head_names(model: PreTrainedModel) -> list[str]:
    """Return the full names of the embedding and the head."""
    modules = embedding_and_head(model)
    return [name for name, module in model.named_modules() if any(module is one for one in modules)]


def outside_of_layers(model: PreTrainedModel) -> frozenset[str]:
    """Return the names of the weights of the head and of all embeddings."""
    head = embedding_and_head(model)[1]
    modules = model.named_modules()
    return frozenset(f"{name}.weight" for name, m in modules if m is head or isinstance(m, nn.Embedding))


def is_trainable(name: str, patterns: Sequence[str] | None) -> bool:
    """Whether full fine-tuning trains a weight: one of the recipe's regular expressions occurs in its name."""
    return patterns is None or any(re.search(pattern, name) for pattern in patterns)


def last_name(name: str) -> str:
    """Return the last component of a module's name, such as `q_proj`."""
    return name.rpartition(".")[2]


def layer_number(name: str) -> int | None:
    """Return the number of the decoder layer that a module belongs to by its name, as peft reads it."""
    match = re.match(r".*?\.[^.]*\.(\d+)\.", name)
    return int(match[1]) if match else None


def linear_layers(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the last names of the linear layers that an adapter can be put on, without the head."""
    head = embedding_and_head(model)[1]
    names = {
        last_name(name)
        for name, module in model.named_modules()
        if isinstance(base_layer(module), (nn.Linear, Conv1D)) and base_layer(module) is not head
        if ".lora_" not in name
    }
    return tuple(sorted(names - {"base_layer"}))


def keep_activations_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Make embeddings and norms with float32 weights return `dtype`, as linear layers do under autocast.

    Otherwise all activations between the layers are float32: twice the memory, and each linear layer casts the same
    input again. A model whose weights are stored in `dtype` computes the same way.

    Args:
        model: trained whole, under autocast.
        dtype: of the computation.
    """

    def cast_output(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        return output.to(dtype) if isinstance(output, Tensor) and output.dtype == torch.float32 else output

    for module in model.modules():
        own = list(module.parameters(recurse=False))
        is_norm = own and all(parameter.ndim == 1 for parameter in own) and not list(module.children())
        if is_norm or isinstance(module, nn.Embedding):
            module.register_forward_hook(cast_output)


def disable_dropout(model: nn.Module, config: PretrainedConfig) -> dict[str, float]:
    """Turn dropout and router noise off, in place, so that a model is deterministic in train mode.

    Policy and reference must be the same function at the first step, and a prompt shared by several responses is
    computed once.

    Returns:
        The previous values of the configuration, to be restored in an exported one.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if _is_random_rate(name, value):
                setattr(module, name, type(value)(0))
    before = {name: value for name, value in vars(config).items() if _is_random_rate(name, value)}
    for name, value in before.items():
        setattr(config, name, type(value)(0))
    return before


def _is_random_rate(name: str, value: Any) -> bool:
    return isinstance(value, float) and value != 0.0 and any(word in name for word in _RANDOMNESS)

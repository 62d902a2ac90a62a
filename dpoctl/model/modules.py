"""What the modules of a model are, told without peft: importing it takes as long as importing torch."""

from typing import TYPE_CHECKING, Any, TypeGuard

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


def is_adapted(module: nn.Module) -> "TypeGuard[LoraLayer]":
    """Whether a module is peft's, with low-rank factors beside a layer of the model."""
    return isinstance(getattr(module, "lora_A", None), nn.ModuleDict)


def bare(module: nn.Module) -> nn.Module:
    """Return the model's own layer, under the factors that may lie on it."""
    return module.get_base_layer() if is_adapted(module) else module


def ends_of(model: PreTrainedModel) -> tuple[nn.Module, nn.Module | None]:
    """The embedding and the head of a model."""
    untyped: Any = model
    return untyped.get_input_embeddings(), untyped.get_output_embeddings()


def names_of_ends(model: PreTrainedModel) -> list[str]:
    """Names of the embedding and the head."""
    ends = ends_of(model)
    return [name for name, module in model.named_modules() if any(module is end for end in ends)]


def linear_layers(model: PreTrainedModel) -> tuple[str, ...]:
    """Last names of the layers that an adapter can be put on, without the head."""
    head = ends_of(model)[1]
    found = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(bare(module), (nn.Linear, Conv1D)) and bare(module) is not head and ".lora_" not in name
    }
    return tuple(sorted(found - {"base_layer"}))

"""From a trained model to files that plain transformers loads."""

import copy
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CONFIGS = ("config.json", "adapter_config.json")


def export_full(
    model: PreTrainedModel,
    dtype: torch.dtype,
    original_config: Mapping[str, Any],
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Save a whole model in `dtype`, with the configuration values that training had changed put back."""
    with moved_into(folder) as staging:
        model.save_pretrained(staging, state_dict=_cast(model.state_dict(), dtype))
        config = copy.deepcopy(model.config)
        for name, value in {**original_config, "dtype": dtype}.items():
            setattr(config, name, value)
        config.save_pretrained(staging)
        tokenizer.save_pretrained(staging)


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Cast floating-point tensors; tied ones stay one tensor, which is how saving knows them."""
    cast: dict[tuple[int, torch.Size], Tensor] = {}
    for tensor in tensors.values():
        place = (tensor.data_ptr(), tensor.shape)
        if place not in cast:
            cast[place] = tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach()
    return {name: cast[tensor.data_ptr(), tensor.shape] for name, tensor in tensors.items()}


@contextmanager
def moved_into(folder: Path) -> Iterator[Path]:
    """A folder beside the target whose files are moved in at the end, the configuration last of all."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as staging:
        yield Path(staging)
        open_weights(Path(staging))
        for file in sorted(Path(staging).iterdir(), key=lambda file: (file.name in _CONFIGS, file.name)):
            file.replace(folder / file.name)


def open_weights(folder: Path) -> None:
    """Let those read a model's weights who may read its configuration; safetensors lets nobody but their owner."""
    (config, *_) = (folder / name for name in _CONFIGS if (folder / name).exists())
    for file in folder.glob("*.safetensors"):
        shutil.copymode(config, file)

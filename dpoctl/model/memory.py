"""Memory of a device: copies to it, gradient checkpointing of decoder layers, and an estimate of what that saves."""

import ctypes
import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from dpoctl.errors import UsageError
from dpoctl.recipe.gpus import Gpu, find_gpu

GPU_CONTEXT = 600 << 20
"""Bytes of a GPU that the driver, its context and the libraries take."""
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
# Options of glibc's malloc. M_MMAP_MAX: never map a block separately, not even the gradient of an embedding.
# M_TRIM_THRESHOLD, the largest int: never return memory to the system by itself.
_MALLOC = {-4: 0, -1: (1 << 31) - 1}
_simulated: str | None = None
_INTERMEDIATE = ("moe_intermediate_size", "intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "d_ff")


def device_kind(device: torch.device) -> str:
    """Return `cpu` or `cuda`: the kind of device by which code chooses its kernels; inside `simulating`, that kind."""
    return _simulated or device.type


@contextmanager
def simulating(kind: str) -> Iterator[None]:
    """Choose the kernels of a kind of device inside, for tensors without memory: no such device need be there."""
    global _simulated
    before, _simulated = _simulated, kind
    try:
        yield
    finally:
        _simulated = before


def machine_gpu() -> Gpu:
    """Return the first GPU of this machine, with its own memory; one that is not known gets a usual rate."""
    properties = torch.cuda.get_device_properties(0)
    known = find_gpu(properties.name)
    rate = 100e12 if known is None else known.rate
    has_bfloat16 = torch.cuda.get_device_capability(0) >= (8, 0)
    return Gpu(str(properties.name), int(properties.total_memory), rate, has_bfloat16)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or (isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on a device.

    A copy from pageable memory waits until the GPU has finished all queued work; a copy from pinned memory does not.
    """
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def checkpointing_choices() -> tuple[int, ...]:
    """Return the supported values of `every_n_layers`, from the fastest to the one with the least memory.

    0 recomputes no layer, n every n-th layer, 1 every layer.
    """
    enable = getattr(PreTrainedModel, "activation_checkpointing_enable", None)
    takes_number = enable is not None and "every_n_layers" in inspect.signature(enable).parameters
    return (0, 4, 2, 1) if takes_number else (0, 1)


def free_bytes(device: torch.device) -> int:
    """Return the memory that is free on a device."""
    if device.type == "cuda":
        # Give the system what the allocator keeps for later use, so that it counts as free.
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def keep_freed_memory() -> None:
    """Let the C library keep the memory that a step frees: the next step needs as much.

    On a CPU, getting it again from the system, page by page, takes a tenth of the time. Only glibc can do this.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter, size in _MALLOC.items():
            mallopt(parameter, size)


def return_freed_memory() -> None:
    """Return to the system what loading and passes before training have freed; only glibc can do this.

    Loading runs in threads, and what one thread has freed another does not use again.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


class MemoryMeter:
    """The most memory that this process has held on a device since the meter was made, or its peak was reset.

    On a GPU these are bytes of tensors. On a CPU they are resident bytes of the process beyond those at the start,
    which are the interpreter and the libraries.

    Args:
        device: the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._start = device, 0
        self.reset_peak()
        if device.type != "cuda":
            self._start = psutil.Process().memory_info().rss

    def reset_peak(self) -> None:
        """Start the peak again: after loading, whose files count as memory until the system takes them back."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    @property
    def counts_process(self) -> bool:
        """Whether it counts all that the process holds, and not tensors alone."""
        return self._device.type != "cuda"

    def peak(self) -> int | None:
        """Return bytes; None where the system does not tell."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        try:
            status = Path("/proc/self/status").read_text()
        except OSError:
            return None
        found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
        return None if found is None else 1024 * int(found[1]) - self._start


def set_gradient_checkpointing(causal: PreTrainedModel, every_n_layers: int) -> None:
    """Recompute every n-th decoder layer in the backward pass, or none for 0.

    Raises:
        UsageError: the architecture does not support it.
    """
    model: Any = causal
    if not model.supports_gradient_checkpointing:
        if every_n_layers:
            raise UsageError(
                f"{type(model).__name__} does not support gradient checkpointing",
                hint="set training.gradient_checkpointing: false",
            )
        return
    # Renamed in transformers 5, where the old name gives a warning.
    renamed = hasattr(model, "activation_checkpointing_enable")
    word = "activation" if renamed else "gradient"
    if not every_n_layers:
        getattr(model, f"{word}_checkpointing_disable")()
        return
    options: dict[str, Any] = {f"{word}_checkpointing_kwargs": {"use_reentrant": False}}
    if every_n_layers > 1:
        options["every_n_layers"] = every_n_layers
    getattr(model, f"{word}_checkpointing_enable")(**options)
    # Only reentrant checkpointing needs inputs that require gradients, which cost the backward of the first layer.
    model.disable_input_require_grads()


def activation_bytes_per_token(config: PretrainedConfig, dtype: torch.dtype, every_n_layers: int) -> int:
    """Estimate the memory that a forward pass keeps for the backward pass, without the head.

    A Llama layer keeps 4 x intermediate size + 8 x hidden size numbers a token in `dtype`, and the inputs of its norms
    in float32. A recomputed layer keeps only its input, but one of them at a time is held in full.

    Args:
        config: of the model.
        dtype: of the computation.
        every_n_layers: every n-th layer is recomputed; 0 is none.

    Returns:
        Bytes per token over all layers.
    """
    hidden, layers = int(config.hidden_size), int(config.num_hidden_layers)
    sizes = (getattr(config, name, None) for name in _INTERMEDIATE)
    intermediate = int(next((size for size in sizes if size), 4 * hidden))
    intermediate *= int(getattr(config, "num_experts_per_tok", None) or 1)
    layer = dtype.itemsize * (4 * intermediate + 8 * hidden) + 16 * hidden
    recomputed = -(-layers // every_n_layers) if every_n_layers else 0
    return dtype.itemsize * hidden * recomputed + layer * (layers - recomputed + (recomputed > 0))

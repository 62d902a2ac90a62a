"""Compiling decoder layers one by one with torch.compile; attention is not compiled."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from dpoctl.errors import SetupError, UsageError
from dpoctl.model.attention import SHARED_PREFIX, shared_prefix_attention


def compile_layers(model: nn.Module) -> None:
    """Compile every decoder layer for micro-batches of any size, when the layer first runs.

    Layers of the same class share the compiled code, so the time to compile does not grow with their number.

    Raises:
        UsageError: the architecture does not mark its decoder layers.
        SetupError: there is no compiler.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UsageError(
            f"training.torch_compile: {type(model).__name__} does not mark its decoder layers",
            hint="set training.torch_compile: false",
        )
    _check_compiler(layers[0])
    # Attention splits a batch at positions that differ from step to step: each of them would be compiled again.
    AttentionInterface.register(SHARED_PREFIX, torch.compiler.disable(shared_prefix_attention))
    for layer in layers:
        layer.compile(dynamic=True)


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run a model's layers uncompiled inside: generation has shapes and arguments that training never has."""
    compiled = {module: call for module in model.modules() if (call := module._compiled_call_impl) is not None}
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call


def _check_compiler(layer: nn.Module) -> None:
    if next(layer.parameters()).is_cuda:
        from torch.utils._triton import has_triton  # noqa: PLC0415 - looks for a GPU

        if not has_triton():
            raise SetupError(
                "training.torch_compile: Triton is not installed",
                hint="install triton, or set training.torch_compile: false",
            )
        return
    from torch._inductor.cpp_builder import get_cpp_compiler  # noqa: PLC0415 - a second of imports
    from torch._inductor.exc import InvalidCxxCompiler  # noqa: PLC0415

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise SetupError(
            "training.torch_compile: no C++ compiler was found",
            hint="install g++ or clang, or set training.torch_compile: false",
        ) from error

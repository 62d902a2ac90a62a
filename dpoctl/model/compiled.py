"""Decoder layers compiled one by one: what lies between matrix products is fused, attention stays as it is."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from dpoctl.errors import SetupError, UsageError
from dpoctl.model.attention import SHARED_PREFIX, shared_prefix_attention


def compile_layers(model: nn.Module) -> None:
    """Compile every decoder layer, for micro-batches of any size; it happens when a layer first runs.

    All layers of one kind share their code, so the time that it takes does not grow with their number.

    Raises:
        UsageError: the architecture does not say which its layers are.
        SetupError: there is no compiler.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UsageError(
            f"{type(model).__name__} does not say which its layers are", hint="set training.torch_compile: false"
        )
    _refuse_without_compiler(layers[0])
    # It cuts a batch by numbers that differ from step to step: each of them would be compiled anew.
    AttentionInterface.register(SHARED_PREFIX, torch.compiler.disable(shared_prefix_attention))
    for layer in layers:
        layer.compile(dynamic=True)


@contextmanager
def as_written(model: nn.Module) -> Iterator[None]:
    """Run a model's layers uncompiled inside: generating takes shapes and arguments that training never has."""
    compiled = {module: run for module in model.modules() if (run := module._compiled_call_impl) is not None}
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, run in compiled.items():
            module._compiled_call_impl = run


def _refuse_without_compiler(layer: nn.Module) -> None:
    on_gpu = next(layer.parameters()).is_cuda
    if on_gpu:
        from torch.utils._triton import has_triton  # noqa: PLC0415 - looks for a GPU

        if not has_triton():
            raise SetupError(
                "training.torch_compile: there is no Triton to compile for a GPU with",
                hint="install triton, or set training.torch_compile: false",
            )
        return
    from torch._inductor.cpp_builder import get_cpp_compiler  # noqa: PLC0415 - a second of imports
    from torch._inductor.exc import InvalidCxxCompiler  # noqa: PLC0415

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise SetupError(
            "training.torch_compile: there is no C++ compiler",
            hint="install g++ or clang, or set training.torch_compile: false",
        ) from error

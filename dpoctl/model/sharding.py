"""Sharding: each rank holds a part of every parameter, of its gradient and of its optimizer state.

torch's `fully_shard` does it: a layer's parameters are gathered before the layer runs, and freed after it. Everything
that computes must therefore go through the module that was sharded as a whole, on all ranks in step. With replicas,
groups of ranks each hold all parts, and average their gradients.

A part is a range of rows, dimension 0, in the order of the ranks.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from dpoctl.model.lazy_weights import divided


@dataclass(frozen=True)
class Sharding:
    """The division of a model over the ranks.

    Attributes:
        device: the device of this rank.
        ranks: the number of processes.
        replicas: the number of groups of ranks that each hold the whole model.
        dtype: the precision in which weights are gathered; None is that of each weight.
        offload: keep parameters, gradients and optimizer state in host memory.
    """

    device: torch.device
    ranks: int
    replicas: int = 1
    dtype: torch.dtype | None = None
    offload: bool = False

    @cached_property
    def mesh(self) -> DeviceMesh:
        """The ranks as `[replicas, shards]`, or as `[shards]` without replicas."""
        if not dist.is_initialized():
            dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        shape = (self.replicas, self.shards) if self.replicas > 1 else (self.shards,)
        return init_device_mesh(self.device.type, shape, mesh_dim_names=("replicas", "shards")[-len(shape) :])

    @property
    def shards(self) -> int:
        """The number of parts."""
        return self.ranks // self.replicas

    def divide(self, module: nn.Module) -> None:
        """Shard a module: each decoder layer by itself, then what is left.

        Args:
            module: the `Scorer`, whose forward is the only way to the model from now on.
        """
        for layer in layers_of(module):
            self._divide(layer)
        # Its parameters are freed after every forward too: outside of a forward all parameters are parts.
        self._divide(module)

    def _divide(self, module: nn.Module) -> None:
        mixed = MixedPrecisionPolicy(self.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if self.offload else OffloadPolicy()
        with divided(module, host=self.offload):
            fully_shard(module, mesh=self.mesh, reshard_after_forward=True, mp_policy=mixed, offload_policy=offload)

    def whole(self, tensor: Tensor) -> Tensor:
        """Gather a tensor on the device; every rank calls this."""
        if not isinstance(tensor, DTensor):
            return tensor
        # Collectives of the mesh need a tensor on its device, which an offloaded one is not.
        return cast(DTensor, tensor.to(self.device)).full_tensor()


class Gradients:
    """The parts of trained parameters and gradients on this rank, as plain tensors that any optimizer can take.

    Args:
        sharding: the division of the model.
        parameters: the trained parameters by name.
    """

    def __init__(self, sharding: Sharding, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        self._sharding = sharding
        self._parameters = [(name, parameter, nn.Parameter(part(parameter))) for name, parameter in parameters]

    def parts(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parts by name; they share memory with the model's parameters."""
        return ((name, own) for name, _, own in self._parameters)

    @torch.no_grad()
    def clip(self, bound: float) -> Tensor:
        """Move the gradients to the parts, clip them, and return the norm before."""
        for _, parameter, own in self._parameters:
            own.grad, parameter.grad = None if parameter.grad is None else part(parameter.grad), None
            if not own.numel():
                own.grad = None
        found = [own.grad for _, _, own in self._parameters if own.grad is not None]
        squares = torch.zeros((), dtype=torch.float32, device=self._sharding.device)
        if found:
            squares += torch.stack(torch._foreach_norm(found)).float().square().sum().to(squares.device)
        dist.all_reduce(squares, group=self._sharding.mesh.get_group("shards"))
        norm = squares.sqrt()
        scale = (bound / (norm + 1e-6)).clamp(max=1.0)
        for gradient in found:
            gradient.mul_(scale.to(gradient.device, gradient.dtype))
        return norm


def layers_of(module: nn.Module) -> list[nn.Module]:
    """Return the decoder layers of a model."""
    return [layer for layer in module.modules() if isinstance(layer, GradientCheckpointingLayer)]


def gathered_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Return the bytes of whole weights and gradients that a rank holds at a time of a sharded model.

    These are two layers, one of which is fetched while the other runs, and what is outside of all layers.

    Args:
        model: the sharded model.
        dtype: the precision of the computation.
    """

    def size(module: nn.Module) -> int:
        return sum(
            p.numel() * ((dtype.itemsize if p.is_floating_point() else p.element_size()) + 4 * p.requires_grad)
            for p in module.parameters()
        )

    layers = [size(layer) for layer in layers_of(model)]
    return size(model) - sum(layers) + 2 * max(layers, default=0)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds only a part of a tensor."""
    return isinstance(tensor, DTensor)


def part(tensor: Tensor) -> Tensor:
    """Return the part of a tensor on this rank, which shares its memory; a tensor that is not sharded as it is."""
    return cast(DTensor, tensor.detach()).to_local() if isinstance(tensor, DTensor) else tensor.detach()


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """Return the rows of a whole tensor that this rank holds of a parameter of the same shape."""
    if not isinstance(like, DTensor):
        return whole
    mesh: Any = like.device_mesh
    chunks, index = whole.chunk(mesh.size(mesh.ndim - 1)), mesh.get_local_rank(mesh.ndim - 1)
    # Of few rows there may be fewer parts than ranks.
    return chunks[index] if index < len(chunks) else whole[:0]

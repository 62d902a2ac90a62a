"""The policy: the model that is trained, with the reference that it contains, and snapshots of its trained weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpoctl.errors import RunError
from dpoctl.model.modules import is_adapted
from dpoctl.model.sharding import is_sharded, part

TRAINED = "default"
"""Name of the trained adapter; peft saves and loads this name at the root of a folder."""
FROZEN = "reference"
"""Name of the adapter of the reference, if the reference is not the base model alone."""
_WRAPPERS = (".base_layer", ".original_module")


@dataclass(kw_only=True)
class Policy:
    """A causal language model with trainable parameters in float32, and its reference if one model contains both.

    Attributes:
        model: the `PeftModel`, or the causal model itself if all weights are trained.
        causal: the `...ForCausalLM`, adapters injected, whose forward is called.
        dtype: the precision of the computation, under autocast; frozen weights are stored in it.
        kind: `full` if all weights are trained, `lora` for an adapter.
        active: names of the adapters of the policy, in the order in which they are added.
        reference_adapters: names of the adapters of the reference; none is the base model alone.
        taken_out: names of frozen adapters whose update was taken out of the base: the model was base + update.
        saved_modules: modules that an SFT adapter trained whole; part of the base here, exported with the adapter.
        original_config: values of the configuration that training changed, by name.
        base: hub id or folder of the base model.
        base_revision: branch, tag or commit of that hub id.
    """

    model: nn.Module
    causal: PreTrainedModel
    dtype: torch.dtype
    kind: Literal["full", "lora"]
    active: tuple[str, ...] = ()
    reference_adapters: tuple[str, ...] = ()
    taken_out: tuple[str, ...] = ()
    saved_modules: tuple[str, ...] = ()
    original_config: Mapping[str, Any] = field(default_factory=dict)
    base: str | None = None
    base_revision: str | None = None

    @property
    def has_live_reference(self) -> bool:
        """Whether the policy's weights contain the reference, so that it can be computed at any time."""
        return self.kind == "lora"

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Run the model as the reference inside, in eval mode.

        Enter autocast inside this context, not around it: autocast would keep weights that it cast under `no_grad` for
        the next training forward.

        Raises:
            RunError: all weights are trained, so the reference exists before the first step only.
        """
        if not self.has_live_reference:
            raise RunError("a model that is trained whole contains no reference")
        parameters = list(self.model.parameters())
        trainable = [parameter.requires_grad for parameter in parameters]
        training = self.model.training
        try:
            self.model.eval()
            self._activate(self.reference_adapters)
            yield
        finally:
            self._activate(self.active)
            self.model.train(training)
            # peft makes every adapter that it activates trainable.
            for parameter, was_trainable in zip(parameters, trainable, strict=True):
                parameter.requires_grad_(was_trainable)

    def reference_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all tensors of the reference by name, in an order that does not depend on the trained adapter.

        They include the quantisation constants of quantised weights and the scales of frozen adapters.
        """
        tensors: dict[str, Tensor] = {}
        for name, tensor in self.causal.state_dict().items():
            if isinstance(tensor, Tensor) and not (self.active and f".{TRAINED}." in f"{name}."):
                tensors[_base_name(name)] = tensor
        tensors |= {name: scale for name, scale in self.adapter_scales() if name.endswith(f".{FROZEN}.scaling")}
        yield from sorted(tensors.items())

    def adapter_scales(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the scale of each adapter in each layer; it follows from `r` and `lora_alpha`, not from a weight."""
        for name, module in self.causal.named_modules():
            if is_adapted(module):
                for adapter, scale in module.scaling.items():
                    yield f"{name}.{adapter}.scaling", torch.tensor(scale)

    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the trainable parameters by name."""
        return ((name, p) for name, p in self.causal.named_parameters() if p.requires_grad)

    def trainable_state(self) -> dict[str, Tensor]:
        """Return the trainable parameters by name; they share memory with the model.

        Of a sharded model, the parts of this rank.
        """
        return {name: part(parameter) for name, parameter in self.trainable_parameters()}

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint stores: trainable parameters, and the factors that were taken out of the base."""
        return self.trainable_state() | self._taken_out()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Copy the tensors of a checkpoint into the model.

        On another machine other factors may have been taken out of the base: it becomes the one that belongs to those
        of the checkpoint.

        Raises:
            RunError: the names or shapes are not those of this model.
        """
        before = {name: tensor.clone() for name, tensor in self._taken_out().items()}
        _load_state(self.state(), state)
        if all(torch.equal(tensor, state[name].to(tensor.device)) for name, tensor in before.items()):
            return
        for name, layer in self.causal.named_modules():
            for adapter in self.taken_out if is_adapted(layer) else ():
                old = before[f"{name}.lora_B.{adapter}.weight"] @ before[f"{name}.lora_A.{adapter}.weight"]
                difference = layer.scaling[adapter] * old
                weight = layer.get_base_layer().weight
                difference = (difference.T if layer.fan_in_fan_out else difference) - layer.get_delta_weight(adapter)
                weight.data = (weight.float() + difference).to(weight.dtype)

    def _taken_out(self) -> dict[str, Tensor]:
        named = self.causal.named_parameters()
        return {name: p.detach() for name, p in named if any(f".{adapter}." in name for adapter in self.taken_out)}

    def _activate(self, adapters: tuple[str, ...]) -> None:
        tuner: Any = self.model.base_model
        if adapters:
            tuner.enable_adapter_layers()
            tuner.set_adapter(list(adapters))
        else:
            tuner.disable_adapter_layers()


class Snapshot:
    """A copy of a policy's trainable parameters, which can replace them temporarily.

    Frozen weights are not copied, so for an adapter the copy is as large as the adapter.

    Args:
        policy: the policy to copy.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._tensors = {name: tensor.clone() for name, tensor in policy.trainable_state().items()}

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Run the policy's model with the parameters of the snapshot inside, and restore its own afterwards.

        Enter autocast inside this context, not around it: autocast identifies the weights that it has cast by their
        memory. No backward may run inside.
        """
        parameters = dict(self._policy.trainable_parameters())
        self._exchange(parameters)
        try:
            yield
        finally:
            self._exchange(parameters)

    @torch.no_grad()
    def _exchange(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Exchange the parameters' values with those of the snapshot."""
        for name, parameter in parameters.items():
            if is_sharded(parameter):
                # What the parameter is gathered from is fixed memory: its content must change.
                before = part(parameter).clone()
                part(parameter).copy_(self._tensors[name])
                self._tensors[name].copy_(before)
            else:
                parameter.data, self._tensors[name] = self._tensors[name], parameter.data

    @torch.no_grad()
    def move(self, alpha: float) -> None:
        """Move the snapshot towards the current policy: snapshot <- alpha * policy + (1 - alpha) * snapshot."""
        for name, tensor in self._policy.trainable_state().items():
            self._tensors[name].lerp_(tensor, alpha)

    def state(self) -> dict[str, Tensor]:
        """Return the tensors by name; they share memory with the snapshot."""
        return self._tensors

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Copy the tensors of a checkpoint into the snapshot.

        Raises:
            RunError: the names or shapes are not those of this model.
        """
        _load_state(self._tensors, state)


def _load_state(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Copy the tensors of a checkpoint into those of a model, after a check of all names and shapes."""
    if unmatched := sorted(tensors.keys() ^ state.keys()):
        raise RunError(
            f"the checkpoint belongs to another model: only one of the two has '{unmatched[0]}' "
            f"({len(unmatched)} such weights)"
        )
    for name, tensor in tensors.items():
        if tensor.shape != state[name].shape:
            raise RunError(
                f"the checkpoint belongs to another model: '{name}' has shape {list(state[name].shape)} in the "
                f"checkpoint and {list(tensor.shape)} in the model"
            )
    for name, tensor in tensors.items():
        tensor.copy_(state[name])


def _base_name(name: str) -> str:
    """Return the name that a weight has in the base model, without peft's wrappers."""
    if ".lora_" in name:
        return name
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name

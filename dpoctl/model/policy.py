"""The model that is trained, and the reference that is inside it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpoctl.errors import RunError
from dpoctl.model.export import export_full
from dpoctl.model.modules import is_adapted

TRAINED = "default"
"""The adapter that is trained; peft saves and loads this name at the root of a folder."""
FROZEN = "reference"
"""The adapter that the reference is computed with, where that is not the bare base model."""

_WRAPPINGS = (".base_layer", ".original_module")


@dataclass(kw_only=True)
class Policy:
    """A causal language model with its trainable part in float32, and its reference where one model holds both.

    Attributes:
        model: the `PeftModel`, or the model itself when all of it is trained.
        causal: the `...ForCausalLM`, with adapters injected: what computes.
        dtype: the precision of the computation, to be run under autocast; frozen weights are stored in it.
        kind: whether all weights are trained or an adapter.
        active: adapters that make up the policy together, in the order they are added.
        reference_adapters: those that make up the reference; none is the bare base model.
        saved_modules: modules that an SFT adapter trained whole: part of the base here, of the adapter when exported.
        original_config: values of the configuration that training changed, by name.
        base: hub id or folder of the model under the adapter.
        base_revision: branch, tag or commit of that hub id.
    """

    model: nn.Module
    causal: PreTrainedModel
    dtype: torch.dtype
    kind: Literal["full", "lora"]
    active: tuple[str, ...] = ()
    reference_adapters: tuple[str, ...] = ()
    saved_modules: tuple[str, ...] = ()
    original_config: Mapping[str, Any] = field(default_factory=dict)
    base: str | None = None
    base_revision: str | None = None

    @property
    def has_live_reference(self) -> bool:
        """Whether the reference can be computed at any time with the weights at hand."""
        return self.kind == "lora"

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside it the model computes the reference, without dropout.

        Enter an autocast region of its own inside, never around: autocast would otherwise keep weights that it cast
        under `no_grad` for the training forward that follows.

        Raises:
            RunError: all weights are trained, so the reference exists before the first step only.
        """
        if not self.has_live_reference:
            raise RunError("a model that is trained whole holds no reference besides itself")
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
            # Switching adapters marks whatever is active as trainable.
            for parameter, was_trainable in zip(parameters, trainable, strict=True):
                parameter.requires_grad_(was_trainable)

    def reference_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Everything that the reference is computed from, in a fixed order, whatever the trained adapter targets.

        Packed weights come with their quantisation constants, frozen adapters with their scale.
        """
        found: dict[str, Tensor] = {}
        for name, tensor in self.causal.state_dict().items():
            if isinstance(tensor, Tensor) and not (self.active and f".{TRAINED}." in f"{name}."):
                found[_plain_name(name)] = tensor
        found |= {name: scale for name, scale in self.adapter_scales() if name.endswith(f".{FROZEN}.scaling")}
        yield from sorted(found.items())

    def adapter_scales(self) -> Iterator[tuple[str, Tensor]]:
        """What each adapter is multiplied by, layer by layer: `r` and `lora_alpha` stand in no weight."""
        for name, module in self.causal.named_modules():
            if is_adapted(module):
                for adapter, scale in module.scaling.items():
                    yield f"{name}.{adapter}.scaling", torch.tensor(scale)

    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained, by name."""
        return ((name, p) for name, p in self.causal.named_parameters() if p.requires_grad)

    def trainable_state(self) -> dict[str, Tensor]:
        """The trainable parameters by name: what a checkpoint holds. They share memory with the model."""
        return {name: parameter.detach() for name, parameter in self.trainable_parameters()}

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Put the trainable parameters of a checkpoint back in place.

        Raises:
            RunError: the names or shapes are not those of this model.
        """
        parameters = dict(self.trainable_parameters())
        if parameters.keys() != state.keys():
            odd = sorted(parameters.keys() ^ state.keys())
            raise RunError(f"the checkpoint is of another model: {len(odd)} weights differ, such as '{odd[0]}'")
        with torch.no_grad():
            for name, parameter in parameters.items():
                if parameter.shape != state[name].shape:
                    raise RunError(
                        f"the checkpoint is of another model: '{name}' is {list(state[name].shape)} there "
                        f"and {list(parameter.shape)} here"
                    )
                parameter.copy_(state[name])

    def export(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Save what transformers, or transformers and peft, load as they are: weights, config, tokenizer, template.

        Each file is moved in whole, the weights first.
        """
        if self.kind == "full":
            export_full(self.causal, self.dtype, self.original_config, folder, tokenizer)
        else:
            from dpoctl.model.export_adapter import export_adapter  # noqa: PLC0415 - peft takes a second to import

            export_adapter(self, folder, tokenizer)

    def _activate(self, adapters: tuple[str, ...]) -> None:
        tuner: Any = self.model.base_model
        if adapters:
            tuner.enable_adapter_layers()
            tuner.set_adapter(list(adapters))
        else:
            tuner.disable_adapter_layers()


def _plain_name(name: str) -> str:
    if ".lora_" in name:
        return name
    for wrapping in _WRAPPINGS:
        name = name.replace(wrapping, "")
    return name

"""Merging an adapter into the weights of its base model, and checking that the result computes the same."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import torch
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from dpoctl.errors import RunError, UsageError
from dpoctl.model.export import make_weights_readable, save_generation_settings
from dpoctl.model.head import select_logps
from dpoctl.model.integrity import write_export_manifest
from dpoctl.model.modules import embedding_and_head
from dpoctl.model.policy import TRAINED, Policy
from dpoctl.model.probe import TOLERANCE
from dpoctl.model.source import ModelSource, find_decoder, reading_model


@dataclass(frozen=True)
class Agreement:
    """Differences of log-probabilities after a merge: root mean squares, in nats per token.

    Attributes:
        error: between the merged model and base + adapter.
        effect: between the base and base + adapter.
        allowed: the largest error that rounding in this precision explains.
        tokens: number of tokens compared.
    """

    error: float
    effect: float
    allowed: float
    tokens: int

    @classmethod
    def of(cls, base: Tensor, adapted: Tensor, merged: Tensor, dtype: torch.dtype) -> Self:
        """Compare log-probabilities `[n]` of the same tokens.

        Args:
            base: under the base alone.
            adapted: under base + adapter.
            merged: under the merged model.
            dtype: the precision of all three.
        """
        spread = max(1.0, float(adapted.double().std()))
        return cls(_distance(merged, adapted), _distance(base, adapted), TOLERANCE[dtype] * spread, len(adapted))

    def check(self) -> None:
        """Check that the merged model agrees with base + adapter.

        Raises:
            RunError: the error is larger than allowed, or not finite.
        """
        if not self.error <= self.allowed:
            raise RunError(
                f"the merged model differs from base + adapter by {self.error:.2g} nats per token, "
                f"more than the {self.allowed:.2g} that rounding explains",
                hint="nothing was written",
            )

    @property
    def loses_much(self) -> bool:
        """Whether the rounding error is more than a quarter of the adapter's effect."""
        return self.error > 0.25 * self.effect


def stored_dtype(source: ModelSource) -> torch.dtype:
    """Return the precision that a model's weights are stored in.

    Raises:
        UsageError: the weights are quantised.
    """
    config = find_decoder(source).config
    if getattr(config, "quantization_config", None) is not None:
        raise UsageError(
            f"base model '{source.name}' is quantised, and adapters are not merged into quantised weights",
            hint="name the unquantised model in the run's adapter_config.json",
        )
    stored: Any = config.dtype
    return stored if stored in TOLERANCE else torch.float32


def merge_adapter(policy: Policy) -> PreTrainedModel:
    """Add the policy's adapter to the weights of its base, in place; each weight is rounded once.

    Returns:
        The model without adapter layers; the policy can no longer be used.
    """
    _untie(policy.causal)
    for module in policy.causal.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.modules_to_save[TRAINED].to(next(module.original_module.parameters()).dtype)
    merging: Any = policy.model
    merged: PreTrainedModel = merging.merge_and_unload()
    return merged


def save_merged(model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Save weights, configuration, generation settings, tokenizer and chat template of a merged model."""
    model.save_pretrained(folder)
    make_weights_readable(folder)
    tokenizer.save_pretrained(folder)
    save_generation_settings(model, folder, tokenizer)
    write_export_manifest(folder)


def load_merged(folder: Path, device: torch.device, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load a saved model with transformers alone."""
    with reading_model(str(folder)):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", local_files_only=True, use_safetensors=True, trust_remote_code=trust_remote_code
        )
    cast(nn.Module, model).to(device)
    return model


@torch.no_grad()
def logps_of(causal: PreTrainedModel, rows: Sequence[Sequence[int]], dtype: torch.dtype) -> Tensor:
    """Return `[n]` log-probabilities, on the CPU, of all tokens of some rows except the first of each.

    Args:
        causal: in eval mode.
        rows: token ids, at least two each.
        dtype: the precision to compute in.
    """
    logps = []
    for row in rows:
        ids = torch.tensor([list(row)], device=causal.device)
        with torch.autocast(causal.device.type, dtype, enabled=dtype != torch.float32):
            logits = causal(input_ids=ids, use_cache=False).logits[0, :-1]
        logps.append(select_logps(logits, ids[0, 1:]).cpu())
    return torch.cat(logps)


def _untie(causal: PreTrainedModel) -> None:
    """Give the head its own weight if an adapter makes it differ from the embedding."""
    embedding, head = embedding_and_head(causal)
    adapted = any(isinstance(module, (LoraLayer, ModulesToSaveWrapper)) for module in (embedding, head))
    if head is None or not adapted or not getattr(causal.config, "tie_word_embeddings", False):
        return
    base: Any = head.get_base_layer() if isinstance(head, LoraLayer) else getattr(head, "original_module", head)
    base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
    causal.config.tie_word_embeddings = False


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).square().mean().sqrt())

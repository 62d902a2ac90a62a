"""An adapter merged into the weights of its base: one plain model, and the proof that it computes the same."""

import json
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
from dpoctl.model.decoder import find_decoder
from dpoctl.model.export import open_weights
from dpoctl.model.head import select_logps
from dpoctl.model.modules import ends_of
from dpoctl.model.policy import TRAINED, Policy
from dpoctl.model.probe import TOLERANCE
from dpoctl.model.source import Source, read_json, reading

GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class Agreement:
    """How near a merged model is to base + adapter, in nats per token (root mean square of the differences).

    Attributes:
        error: between the merged model and base + adapter.
        effect: between base and base + adapter: what the adapter does at all.
        allowed: the error that rounding in this precision explains.
        tokens: that were compared.
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
        """See that the merged model computes what base + adapter does.

        Raises:
            RunError: It does not, or not with finite numbers.
        """
        if not self.error <= self.allowed:
            raise RunError(
                f"the merged model differs from base + adapter by {self.error:.2g} nats per token, "
                f"more than the {self.allowed:.2g} that rounding explains",
                hint="nothing was written",
            )

    @property
    def loses_much(self) -> bool:
        """Whether rounding takes away a good part of what the adapter does."""
        return self.error > 0.25 * self.effect


def stored_dtype(source: Source) -> torch.dtype:
    """The precision that a model's weights are stored in.

    Raises:
        UsageError: They are quantised, or there is no telling.
    """
    config = find_decoder(source).config
    if getattr(config, "quantization_config", None) is not None:
        raise UsageError(
            f"the base model '{source.name}' is quantised, and nothing is merged into quantised weights",
            hint="name its unquantised original in the run's adapter_config.json",
        )
    stored: Any = config.dtype
    return stored if stored in TOLERANCE else torch.float32


def merge_adapter(policy: Policy) -> PreTrainedModel:
    """Add the policy's adapter to the weights under it, in place, each weight rounded once.

    Returns:
        The plain model; the policy is used up.
    """
    _untie(policy.causal)
    for module in policy.causal.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.modules_to_save[TRAINED].to(next(module.original_module.parameters()).dtype)
    merging: Any = policy.model
    merged: PreTrainedModel = merging.merge_and_unload()
    return merged


def save_merged(model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Save a merged model as plain transformers loads it: weights, configuration, tokenizer, template.

    Its generation settings are the base's, with the tokenizer's end-of-turn among the tokens that end a text.
    """
    model.save_pretrained(folder)
    open_weights(folder)
    tokenizer.save_pretrained(folder)
    settings = read_json(folder / GENERATION_CONFIG) if (folder / GENERATION_CONFIG).is_file() else {}
    named = settings.get("eos_token_id")
    stops = named if isinstance(named, list) else [] if named is None else [named]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in stops:
        stops = [tokenizer.eos_token_id, *stops]
    settings |= {"eos_token_id": stops[0] if len(stops) == 1 else stops, "pad_token_id": tokenizer.pad_token_id}
    # Written as it is: transformers refuses to save settings that are odd and were touched, as some bases' are.
    known = {name: value for name, value in settings.items() if value not in (None, [])}
    (folder / GENERATION_CONFIG).write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")


def load_merged(folder: Path, device: torch.device, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load a saved model as any user of transformers would."""
    with reading(str(folder)):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", local_files_only=True, use_safetensors=True, trust_remote_code=trust_remote_code
        )
    cast(nn.Module, model).to(device)
    return model


@torch.no_grad()
def logps_of(causal: PreTrainedModel, rows: Sequence[Sequence[int]], dtype: torch.dtype) -> Tensor:
    """Return `[n]` log-probabilities of every token of some rows but their first, on the CPU.

    Args:
        causal: in eval mode.
        rows: token ids, at least two each.
        dtype: the precision to compute in, where weights of several stand together.
    """
    found = []
    for row in rows:
        ids = torch.tensor([list(row)], device=causal.device)
        with torch.autocast(causal.device.type, dtype, enabled=dtype != torch.float32):
            logits = causal(input_ids=ids, use_cache=False).logits[0, :-1]
        found.append(select_logps(logits, ids[0, 1:]).cpu())
    return torch.cat(found)


def _untie(causal: PreTrainedModel) -> None:
    """Give the head weights of its own where an adapter makes it differ from the embedding."""
    embedding, head = ends_of(causal)
    touched = any(isinstance(end, (LoraLayer, ModulesToSaveWrapper)) for end in (embedding, head))
    if head is None or not touched or not getattr(causal.config, "tie_word_embeddings", False):
        return
    bare: Any = head.get_base_layer() if isinstance(head, LoraLayer) else getattr(head, "original_module", head)
    bare.weight = nn.Parameter(bare.weight.detach().clone(), requires_grad=False)
    causal.config.tie_word_embeddings = False


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).square().mean().sqrt())

"""What tests of policies look at, and how they stand in for training."""

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from dpoctl.model.policy import Policy

IDS = torch.tensor([[7, 31, 150, 9, 222, 64, 8, 8, 301, 17, 90, 45, 3, 12, 77, 260]])


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


def logps(model: Any) -> torch.Tensor:
    return logits(model).log_softmax(-1)


def reference_logits(policy: Policy) -> torch.Tensor:
    with policy.reference():
        return logits(policy.causal)


def disturb(policy: Policy, scale: float = 0.05) -> None:
    """Move every trainable weight, as training would."""
    generator = torch.Generator().manual_seed(1)
    for tensor in policy.trainable_state().values():
        tensor.add_(torch.randn(tensor.shape, generator=generator) * scale)


def plain(base: Path, adapter: Path | None = None) -> Any:
    """Load with transformers and peft alone."""
    with warnings.catch_warnings():
        # peft itself reads a property that transformers has renamed, and warns of patterns that it wrote.
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return model if adapter is None else PeftModel.from_pretrained(model, adapter)

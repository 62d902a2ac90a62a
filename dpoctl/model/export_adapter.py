"""From a trained adapter to files that transformers and peft load."""

import copy
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dpoctl.model.export import moved_into
from dpoctl.model.modules import is_adapted
from dpoctl.model.policy import Policy

_PREFIX = "base_model.model."


def export_adapter(policy: Policy, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Save one adapter over the base model: the trained one, joined with a frozen one under it."""
    if len(policy.active) > 1:
        config, state = _joined(policy)
    else:
        trained = policy.active[0]
        config = copy.deepcopy(_peft(policy).peft_config[trained])
        if not config.target_parameters:
            config.target_modules = _shortest_names(policy.causal, _adapted(policy, trained))
        state = get_peft_model_state_dict(policy.model, adapter_name=trained, save_embedding_layers=False)
    config.inference_mode = True
    config.init_lora_weights = True
    config.base_model_name_or_path = policy.base
    config.revision = policy.base_revision
    with moved_into(folder) as staging:
        tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
        save_file(tensors, staging / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(str(staging))
        tokenizer.save_pretrained(staging)


def _joined(policy: Policy) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Stack the ranks of all active adapters: the sum of two updates is one update of both ranks together.

    The scales move into B, so that ranks, alphas and rsLoRA may differ between the adapters and between layers.
    """
    layers = {
        name: _joined_layer(module, policy.active)
        for name, module in policy.causal.named_modules()
        if is_adapted(module)
    }
    state = {f"{_PREFIX}{name}.{part}": tensor for name, parts in layers.items() for part, tensor in parts.items()}
    ranks = {name: _rank(parts) for name, parts in layers.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    unusual = {name: rank for name, rank in ranks.items() if rank != usual}

    trained = policy.active[-1]
    config = copy.deepcopy(_peft(policy).peft_config[trained])
    whole = set(config.modules_to_save or ()) | set(policy.saved_modules)
    state |= _saved_modules(policy, trained)
    config.r, config.lora_alpha, config.use_rslora = usual, usual, False
    config.rank_pattern, config.alpha_pattern = dict(unusual), dict(unusual)
    config.target_modules = _shortest_names(policy.causal, set(layers))
    config.modules_to_save = sorted(whole) or None
    config.fan_in_fan_out = any(_peft(policy).peft_config[name].fan_in_fan_out for name in policy.active)
    return config, state


def _joined_layer(layer: LoraLayer, adapters: Iterable[str]) -> dict[str, Tensor]:
    linear = [name for name in adapters if name in layer.lora_A]
    if linear:
        return {
            "lora_A.weight": torch.cat([_weight(layer.lora_A[name]) for name in linear], dim=0),
            "lora_B.weight": torch.cat([_weight(layer.lora_B[name]) * layer.scaling[name] for name in linear], dim=1),
        }
    embedding = [name for name in adapters if name in layer.lora_embedding_A]
    return {
        "lora_embedding_A": torch.cat([layer.lora_embedding_A[name] for name in embedding], dim=0),
        "lora_embedding_B": torch.cat(
            [layer.lora_embedding_B[name] * layer.scaling[name] for name in embedding], dim=1
        ),
    }


def _weight(module: nn.Module) -> Tensor:
    return cast(Tensor, module.weight)


def _rank(parts: Mapping[str, Tensor]) -> int:
    return next(tensor.shape[0] for part, tensor in parts.items() if "_A" in part)


def _saved_modules(policy: Policy, trained: str) -> dict[str, Tensor]:
    """Modules that were trained whole, by either adapter; the trained adapter's own copy wins."""
    own = get_peft_model_state_dict(policy.model, adapter_name=trained, save_embedding_layers=False)
    saved = {name: tensor for name, tensor in own.items() if ".lora_" not in name}
    for name in policy.saved_modules:
        if not any(key.startswith(f"{_PREFIX}{name}.") for key in saved):
            module = policy.causal.get_submodule(name)
            saved |= {f"{_PREFIX}{name}.{key}": tensor for key, tensor in module.state_dict().items()}
    return saved


def _adapted(policy: Policy, adapter: str) -> set[str]:
    layers = ((name, m) for name, m in policy.causal.named_modules() if is_adapted(m))
    return {name for name, layer in layers if adapter in layer.scaling}


def _shortest_names(model: nn.Module, targeted: set[str]) -> list[str]:
    """Last name components, such as `q_proj`, where they mean these modules and no others; else full names."""
    last = {name.rpartition(".")[2] for name in targeted}
    inside = tuple(f"{name}." for name in targeted)
    meant = {
        name for name, _ in model.named_modules() if name.rpartition(".")[2] in last and not name.startswith(inside)
    }
    return sorted(last if meant == targeted else targeted)


def _peft(policy: Policy) -> Any:
    return policy.model

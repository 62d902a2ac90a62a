"""A new model with seeded random weights, from a transformers configuration."""

import difflib
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dpoctl.errors import UsageError
from dpoctl.model.decoder import Decoder
from dpoctl.model.source import reading, reason

if TYPE_CHECKING:
    from dpoctl.recipe.schema import FromScratch


def build_model(
    spec: "FromScratch", tokenizer: PreTrainedTokenizerBase, *, seed: int, attention: str = "auto"
) -> PreTrainedModel:
    """Build a new model in float32, with weights that depend on the configuration and the seed only.

    Raises:
        UsageError: transformers has no such model type or no causal model of it, or the configuration is wrong.
    """
    given = dict(spec.config)
    model_type = given.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        close = difflib.get_close_matches(str(model_type), list(CONFIG_MAPPING.keys()), n=1)
        raise UsageError(
            f"model.from_scratch.config: transformers knows no model_type '{model_type}'",
            hint=f"did you mean '{close[0]}'?" if close else None,
        )
    config_class = CONFIG_MAPPING[model_type]
    if config_class not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UsageError(f"model.from_scratch.config: '{model_type}' has no causal language model")
    config = _build_config(config_class, given, tokenizer)
    build: Any = AutoModelForCausalLM.from_config
    with torch.random.fork_rng(devices=[]), reading(f"{model_type} from scratch"):
        torch.default_generator.manual_seed(seed)
        model: PreTrainedModel = build(
            config, dtype=torch.float32, attn_implementation=Decoder(config).attention(attention)
        )
    model.generation_config = GenerationConfig.from_model_config(config)
    model.train(False)
    return model


def _build_config(config_class: Any, given: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    known = config_class()
    for key in given:
        if not hasattr(known, key):
            close = difflib.get_close_matches(key, list(vars(known)), n=1)
            raise UsageError(
                f"model.from_scratch.config: '{key}' is no setting of {config_class.__name__}",
                hint=f"did you mean '{close[0]}'?" if close else None,
            )
    if given.get("vocab_size", len(tokenizer)) < len(tokenizer):
        raise UsageError(
            f"model.from_scratch.config.vocab_size is {given['vocab_size']}, less than the tokenizer's {len(tokenizer)}"
        )
    special = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    try:
        built: PretrainedConfig = config_class(**{**special, **given})
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UsageError(f"model.from_scratch.config: {reason(error)}") from error
    return built

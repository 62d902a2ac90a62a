"""A model without its weights: which modules it has and how large it is, in a fraction of a second."""

from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from dpoctl.model.decoder import find_decoder
from dpoctl.model.scratch import build_model
from dpoctl.model.source import ADAPTER_CONFIG, base_of, find_source, reading

if TYPE_CHECKING:
    from dpoctl.recipe.schema import Recipe


def build_skeleton(recipe: "Recipe", tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Build a recipe's model on the meta device, with the adapter that it asks for.

    Raises:
        SetupError: the model's configuration cannot be reached or read.
        UsageError: it is no causal language model, or nothing in it is what the adapter is meant for.
    """
    with torch.device("meta"):
        model = _bare_model(recipe, tokenizer)
        if recipe.lora is not None and recipe.lora.start == "new":
            from dpoctl.model.lora import add_adapter  # noqa: PLC0415 - peft takes a second to import

            add_adapter(model, recipe.lora, seed=recipe.training.seed)
    return model


def _bare_model(recipe: "Recipe", tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    section = recipe.model
    if section.from_scratch is not None:
        return build_model(section.from_scratch, tokenizer, seed=recipe.training.seed)
    source = find_source(
        section.model_name_or_path or "", revision=section.revision, trust_remote_code=section.trust_remote_code
    )
    adapter = source.file(ADAPTER_CONFIG)
    if adapter is not None and not (adapter.parent / "config.json").exists():
        source = base_of(adapter.parent, trust_remote_code=section.trust_remote_code)
    decoder = find_decoder(source)
    build: Any = AutoModelForCausalLM.from_config
    with reading(source.name):
        model: PreTrainedModel = build(
            decoder.config,
            attn_implementation=decoder.attention("auto"),
            trust_remote_code=section.trust_remote_code,
        )
    return model

"""Models built from a transformers configuration: with seeded random weights, or on the meta device without weights."""

import difflib
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import replace
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
from dpoctl.model.source import (
    ADAPTER_CONFIG,
    Decoder,
    ModelSource,
    base_of,
    blamed_for_building,
    find_decoder,
    first_line,
    reading_model,
    recipe_source,
)

if TYPE_CHECKING:
    from dpoctl.recipe.schema import FromScratch, Recipe


def build_model(
    spec: "FromScratch", tokenizer: PreTrainedTokenizerBase, *, seed: int, attention: str = "auto"
) -> PreTrainedModel:
    """Build a new model in float32, with weights that depend on the configuration and the seed only.

    Raises:
        UsageError: transformers has no such model type or no causal model of it, or the configuration is wrong.
    """
    config = _scratch_config(spec, tokenizer)
    build: Any = AutoModelForCausalLM.from_config
    with torch.random.fork_rng(devices=[]), reading_model(f"{config.model_type} from scratch"):
        torch.default_generator.manual_seed(seed)
        model: PreTrainedModel = build(
            config, dtype=torch.float32, attn_implementation=Decoder(config).attention_name(attention)
        )
    model.generation_config = GenerationConfig.from_model_config(config)
    model.train(False)
    return model


def _scratch_config(spec: "FromScratch", tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    given = dict(spec.config)
    model_type = given.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        raise UsageError(
            f"model.from_scratch.config: transformers has no model_type '{model_type}'",
            hint=_did_you_mean(str(model_type), CONFIG_MAPPING.keys()),
        )
    config_class = CONFIG_MAPPING[model_type]
    if config_class not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UsageError(f"model.from_scratch.config: '{model_type}' has no causal language model")
    return _build_config(config_class, given, tokenizer)


def decoder_config(recipe: "Recipe", tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """Return the configuration of a recipe's model, without building it; of an adapter, that of its base.

    Raises:
        SetupError: the model's configuration cannot be reached or read.
        UsageError: it is not a causal language model.
    """
    if (spec := recipe.model.from_scratch) is not None:
        return _scratch_config(spec, tokenizer)
    return find_decoder(_base_source(recipe)).config


def build_base(recipe: "Recipe", tokenizer: PreTrainedTokenizerBase, layers: int | None = None) -> PreTrainedModel:
    """Build a recipe's model on the meta device, without weights and without an adapter.

    Args:
        recipe: names or describes the model.
        tokenizer: of the recipe.
        layers: build only so many decoder layers; None builds all.

    Raises:
        SetupError: the model's configuration cannot be reached or read.
        UsageError: it is not a causal language model.
    """
    with torch.device("meta"):
        return _base_model(recipe, tokenizer, layers)


def build_skeleton(recipe: "Recipe", tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedModel:
    """Build a recipe's model on the meta device, without weights, and add its new adapter.

    Raises:
        SetupError: the model's configuration cannot be reached or read.
        UsageError: it is not a causal language model, or no module matches the adapter's targets.
    """
    with torch.device("meta"):
        model = _base_model(recipe, tokenizer)
        if recipe.lora is not None and recipe.lora.start == "new":
            from dpoctl.model.lora import add_adapter  # noqa: PLC0415 - peft takes a second to import

            # There are no weights that an adapter could start with.
            lora = recipe.lora.model_copy(update={"init_lora_weights": "default"})
            add_adapter(model, lora, seed=recipe.training.seed)
    return model


def with_layers(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """Return a configuration of another depth; a list with an entry for each layer is cut."""
    depth, changed = int(config.num_hidden_layers), deepcopy(config)
    for name, value in vars(changed).items():
        if isinstance(value, list) and len(value) == depth > layers:
            setattr(changed, name, value[:layers])
    changed.num_hidden_layers = layers
    return changed


def build_empty(source: ModelSource, decoder: Decoder) -> PreTrainedModel:
    """Build a model from its configuration on the meta device, without weights.

    Raises:
        SetupError: no model can be built from it.
    """
    build: Any = AutoModelForCausalLM.from_config
    with torch.device("meta"), reading_model(source.name, "config.json", lambda: blamed_for_building(source)):
        model: PreTrainedModel = build(
            decoder.config,
            attn_implementation=decoder.attention_name("auto"),
            trust_remote_code=source.trust_remote_code,
        )
    return model


def _build_config(config_class: Any, given: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    default = config_class()
    for key in given:
        if not hasattr(default, key):
            raise UsageError(
                f"model.from_scratch.config: {config_class.__name__} has no setting '{key}'",
                hint=_did_you_mean(key, vars(default)),
            )
    if given.get("vocab_size", len(tokenizer)) < len(tokenizer):
        raise UsageError(
            f"model.from_scratch.config.vocab_size is {given['vocab_size']}, "
            f"but the tokenizer has {len(tokenizer)} tokens",
            hint="leave vocab_size out",
        )
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    try:
        config: PretrainedConfig = config_class(**{"vocab_size": len(tokenizer), **tokens, **given})
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UsageError(f"model.from_scratch.config: {first_line(error)}") from error
    return config


def _did_you_mean(name: str, known: Iterable[str]) -> str | None:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean '{close[0]}'?" if close else None


def _base_model(
    recipe: "Recipe", tokenizer: PreTrainedTokenizerBase | None, layers: int | None = None
) -> PreTrainedModel:
    section = recipe.model
    if section.from_scratch is not None:
        spec = section.from_scratch
        if layers is not None:
            spec = spec.model_copy(update={"config": _cut(spec.config, layers)})
        assert tokenizer is not None
        return build_model(spec, tokenizer, seed=recipe.training.seed)
    source = _base_source(recipe)
    decoder = find_decoder(source)
    return build_empty(
        source, decoder if layers is None else replace(decoder, config=with_layers(decoder.config, layers))
    )


def _base_source(recipe: "Recipe") -> ModelSource:
    source = recipe_source(recipe.model)
    adapter = source.file(ADAPTER_CONFIG)
    if adapter is not None and not (adapter.parent / "config.json").exists():
        source = base_of(adapter.parent, trust_remote_code=recipe.model.trust_remote_code)
    return source


def _cut(given: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Return the settings of a model from scratch at another depth."""
    config_class = CONFIG_MAPPING.get(str(given["model_type"])) if given["model_type"] in CONFIG_MAPPING else None
    key = getattr(config_class, "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")
    depth = given.get(key, given.get("num_hidden_layers"))
    cut = {
        name: value[:layers] if isinstance(value, list) and len(value) == depth else value
        for name, value in given.items()
        if name not in (key, "num_hidden_layers")
    }
    return {**cut, key: layers}

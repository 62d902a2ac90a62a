"""Which causal language model a configuration describes, or why it describes none. Reads no weights."""

from dataclasses import dataclass

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    PretrainedConfig,
)

from dpoctl.errors import UsageError
from dpoctl.model.source import Source, reading, refuse_foreign_attention

_HEADLESS_HINT = "give a causal language model, one that AutoModelForCausalLM loads"
# Where multimodal checkpoints keep the weights of their text tower, and where the text model alone keeps them.
TEXT_TOWER_KEYS = {
    r"^(model\.)?language_model\.lm_head": "lm_head",
    r"^(model\.)?language_model\.(model\.)?": "model.",
}


@dataclass(frozen=True)
class Decoder:
    """A causal text decoder, as its configuration describes it.

    Attributes:
        config: of the text model alone.
        narrowed_from: the multimodal model type that it was cut out of.
        key_mapping: checkpoint names to names of the text model, where they differ.
    """

    config: PretrainedConfig
    narrowed_from: str | None = None
    key_mapping: dict[str, str] | None = None

    @property
    def supports_sdpa(self) -> bool:
        """Whether transformers can run this architecture with `scaled_dot_product_attention`."""
        found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(self.config), None)
        return bool(getattr(found, "_supports_sdpa", False))

    def attention(self, asked: str) -> str:
        """The attention to load with; never the one that a configuration file asks for."""
        if asked != "auto":
            return asked
        return "sdpa" if self.supports_sdpa else "eager"


def find_decoder(source: Source) -> Decoder:
    """Read a model's configuration and find the causal text decoder in it.

    Raises:
        UsageError: it is an encoder-decoder, an encoder, multimodal without a text tower, or has no causal head.
        SetupError: the configuration cannot be read.
    """
    refuse_foreign_attention(source)
    with reading(source.name):
        config = AutoConfig.from_pretrained(source.name, **source.options)
    return narrow(config, source)


def narrow(config: PretrainedConfig, source: Source) -> Decoder:
    """Find the causal text decoder in a configuration.

    Raises:
        UsageError: there is none.
    """
    name = source.name
    if config.is_encoder_decoder:
        raise UsageError(f"model '{name}' is an encoder-decoder ({config.model_type})", hint=_HEADLESS_HINT)
    if source.trust_remote_code and "AutoModelForCausalLM" in getattr(config, "auto_map", {}):
        return Decoder(config)
    text = config.get_text_config(decoder=True)
    if text is not config:
        return _text_tower(config, text, name)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UsageError(f"model '{name}' ({config.model_type}) has no causal head", hint=_HEADLESS_HINT)
    # BERT's family has a causal class too, but its weights attend both ways unless they were trained as a decoder.
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and getattr(config, "is_decoder", None) is False:
        raise UsageError(f"model '{name}' is an encoder ({config.model_type})", hint=_HEADLESS_HINT)
    _refuse_other_heads(config, name)
    return Decoder(config)


def _text_tower(config: PretrainedConfig, text: PretrainedConfig, name: str) -> Decoder:
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UsageError(
            f"model '{name}' is multimodal ({config.model_type}) and its text tower has no causal class",
            hint=_HEADLESS_HINT,
        )
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        text.quantization_config = quantization
    return Decoder(text, narrowed_from=config.model_type, key_mapping=TEXT_TOWER_KEYS)


def _refuse_other_heads(config: PretrainedConfig, name: str) -> None:
    saved = config.architectures or []
    heads = ("ForCausalLM", "LMHeadModel", "LMHead", "ForConditionalGeneration")
    if not saved or any(architecture.endswith(heads) for architecture in saved):
        return
    # A bare backbone whose head is tied to its embedding lacks nothing.
    if all(architecture.endswith("Model") for architecture in saved) and config.tie_word_embeddings:
        return
    raise UsageError(f"model '{name}' is a {saved[0]}: it has no causal head", hint=_HEADLESS_HINT)

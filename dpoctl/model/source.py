"""Finding models: a hub id or a folder, an adapter and its base, the configuration of the decoder. Reads no weights."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import constants
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
)
from transformers.utils.hub import cached_file

from dpoctl.errors import SetupError, UsageError, UserError
from dpoctl.hub import hub_is_reachable
from dpoctl.model.memory import is_out_of_memory
from dpoctl.model.packages import missing_package

if TYPE_CHECKING:
    from dpoctl.recipe.schema import ModelSection

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
GENERATION_CONFIG = "generation_config.json"
LONGEST_LINE = 400
_ATTENTION_NAMES = {None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"}
_ATTENTION_KEYS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
_COUNTS = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings"),
    *("n_embd", "n_head", "n_layer", "n_positions"),
}
"""Settings of most architectures that count something; some have a list, with a number for each layer."""
_RATES = {"attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop"}
"""Rates of dropout that must be given where they are named."""
_CAUSAL_HINT = "give a causal language model, one that AutoModelForCausalLM loads"
# Names of the text tower's weights in multimodal checkpoints, and their names in the text model.
_TEXT_TOWER_KEYS = {
    r"^(model\.)?language_model\.lm_head": "lm_head",
    r"^(model\.)?language_model\.(model\.)?": "model.",
}


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A folder or hub id, as `from_pretrained` takes it.

    Attributes:
        name: hub id, or path of an existing folder.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: whether code that comes with the model may run.
    """

    name: str
    revision: str | None = None
    trust_remote_code: bool = False

    @property
    def is_local(self) -> bool:
        """Whether this is a folder on this machine."""
        return Path(self.name).is_dir()

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of every `from_pretrained` call."""
        return {**self._hub_options, "trust_remote_code": self.trust_remote_code}

    @property
    def _hub_options(self) -> dict[str, Any]:
        offline = not self.is_local and not hub_is_reachable()
        return {"revision": self.revision or "main", "local_files_only": offline}

    def file(self, filename: str) -> Path | None:
        """Return the path of a file of the model, downloaded if needed; `None` if the model has no such file."""
        with reading_model(self.name):
            path = cached_file(self.name, filename, _raise_exceptions_for_missing_entries=False, **self._hub_options)
        return None if path is None else Path(path)


def find_source(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> ModelSource:
    """Return the source for a hub id or folder; downloads nothing.

    Raises:
        SetupError: the name looks like a path, but is not a folder.
        UsageError: the name is a folder, and a revision is given.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if revision is not None:
            raise UsageError(f"model '{name}' is a folder and has no revisions", hint=f"leave out {revision!r}")
        return ModelSource(name=str(path), trust_remote_code=trust_remote_code)
    looks_like_a_path = name.startswith((".", "~", os.sep)) or (name.count("/") != 1 and os.sep in name)
    if looks_like_a_path or path.exists():
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise SetupError(f"model folder '{name}' does not exist{where}")
    return ModelSource(name=name, revision=revision, trust_remote_code=trust_remote_code)


def recipe_source(section: "ModelSection") -> ModelSource:
    """Return the source of a recipe's model; see `find_source`."""
    return find_source(
        section.model_name_or_path or "", revision=section.revision, trust_remote_code=section.trust_remote_code
    )


def find_adapter(source: ModelSource) -> Path | None:
    """Return the folder of the PEFT adapter at a source, or `None` if it is not an adapter.

    Raises:
        SetupError: the adapter has no safetensors weights.
    """
    config = source.file(ADAPTER_CONFIG)
    if config is None or (source.is_local and (config.parent / "config.json").exists()):
        return None
    weights = source.file(ADAPTER_WEIGHTS)
    if weights is None:
        raise SetupError(
            f"adapter '{source.name}' has no {ADAPTER_WEIGHTS}",
            hint="save it with safetensors: pickled weights are never opened",
        )
    return weights.parent


def base_of(adapter: Path, *, trust_remote_code: bool = False) -> ModelSource:
    """Return the model that an adapter was trained on, from its configuration.

    Raises:
        SetupError: the adapter does not name its base, or the base does not exist.
    """
    config = read_json(adapter / ADAPTER_CONFIG)
    name = config.get("base_model_name_or_path")
    if not name:
        raise SetupError(
            f"adapter '{adapter}' does not name its base model",
            hint=f"set base_model_name_or_path in its {ADAPTER_CONFIG}",
        )
    revision = None if Path(name).expanduser().is_dir() else config.get("revision")
    try:
        return find_source(name, revision=revision, trust_remote_code=trust_remote_code)
    except SetupError as error:
        raise SetupError(f"adapter '{adapter}' needs its base: {error.message}") from error


def _check_settings(source: ModelSource) -> None:
    """Refuse settings that transformers would notice too late, or that would make it download code from the hub.

    Raises:
        UsageError: the configuration names an attention that is not part of transformers.
        SetupError: a setting is not of its kind.
    """
    with reading_model(source.name, "config.json"):
        raw, _ = PretrainedConfig.get_config_dict(source.name, **source._hub_options)
    if not isinstance(raw, dict):
        raise SetupError(f"model '{source.name}' cannot be loaded: config.json is not a JSON object")
    names = raw.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise wrong_setting(source, "architectures", names, "list of names")
    for part in (raw, *(value for value in raw.values() if isinstance(value, dict))):
        for key, value in part.items():
            if key in _COUNTS and not isinstance(value, list | None) and not (type(value) is int and value > 0):
                raise wrong_setting(source, key, value, "whole number of 1 or more")
            is_rate = key.endswith(("dropout", "pdrop")) and (value is not None or key in _RATES)
            if is_rate and not (type(value) in (int, float) and 0 <= value < 1):
                raise wrong_setting(source, key, value, "number from 0 to below 1")
        for key in _ATTENTION_KEYS:
            if part.get(key) not in _ATTENTION_NAMES:
                raise UsageError(
                    f"the configuration of model '{source.name}' sets {key} to '{part[key]}', which is not allowed",
                    hint="remove it from config.json",
                )


def wrong_setting(source: ModelSource, key: str, value: object, words: str, file: str = "config.json") -> SetupError:
    """Return the error of a setting that is not what the words say."""
    shown = json.dumps(value, default=str)[:80]
    return SetupError(f"model '{source.name}' cannot be loaded: {key} in {file} is {shown}, and not a {words}")


@contextmanager
def reading_model(name: str, file: str = "", blame: Callable[[], str] = str) -> Iterator[None]:
    """Turn whatever a library raises into an error of one line that names the model.

    Memory that runs out is no error of the model, and passes.

    Args:
        name: the model.
        file: the file of it that is read, if it is one.
        blame: finds the setting in the file that is the cause, in words, or returns an empty text.

    Raises:
        SetupError: the library failed; or the model is gated, or cannot be reached.
        UsageError: the model comes with its own code.
    """
    try:
        yield
    except BaseException as error:
        # What the libraries written in Rust raise where they contradict themselves is no `Exception`.
        is_panic = type(error).__name__ == "PanicException"
        if not (is_panic or isinstance(error, Exception)) or isinstance(error, UserError) or is_out_of_memory(error):
            raise
        raise _unreadable(name, file, blame, error) from error


def blamed_setting(settings: Mapping[str, Any], works: Callable[[dict[str, Any]], object]) -> str:
    """Return the setting without which a library accepts the others, in words; empty if there is none, or several.

    Libraries raise whatever comes of a wrong value, far away from its name.

    Args:
        settings: the content of a file.
        works: raises an error if it does not accept settings.
    """
    if not _fails(works, dict(settings)):
        return ""  # it fails for another reason
    found = [key for key in settings if not _fails(works, {k: v for k, v in settings.items() if k != key})]
    return f"{found[0]} is {json.dumps(settings[found[0]], default=str)[:80]}" if len(found) == 1 else ""


def _fails(works: Callable[[dict[str, Any]], object], settings: dict[str, Any]) -> bool:
    try:
        works(settings)
    except Exception:  # whatever a library raises
        return True
    return False


def _blamed(source: ModelSource, works: Callable[[dict[str, Any]], object]) -> str:
    config = source.file("config.json")
    return "" if config is None else blamed_setting(read_json(config), works)


def _make_config(settings: dict[str, Any]) -> PretrainedConfig:
    config: PretrainedConfig = CONFIG_MAPPING[settings["model_type"]].from_dict(settings)
    return config


def _unreadable(name: str, file: str, blame: Callable[[], str], error: BaseException) -> UserError:
    """Return the error of a model that a library cannot read."""
    text = str(error)
    if "trust_remote_code" in text:
        return UsageError(f"model '{name}' comes with its own code", hint="set model.trust_remote_code: true to run it")
    if "gated" in text or "401 Client" in text or "403 Client" in text:
        return SetupError(
            f"model '{name}' is gated or private", hint="ask for access on its page, then `hf auth login`"
        )
    if "connect" in text and not hub_is_reachable():
        return SetupError(
            f"model '{name}' is not a local folder, and {constants.ENDPOINT} cannot be reached",
            hint="give a local folder, or connect to the internet",
        )
    if (missing := missing_package(name, error)) is not None:
        return missing
    speaks = isinstance(error, OSError | ValueError | SafetensorError | ImportError | StrictDataclassError)
    kind = "" if speaks or type(error) in (Exception, RuntimeError) else f"{type(error).__name__}: "
    where = ": ".join(filter(None, (file, blame())))
    return SetupError(f"model '{name}' cannot be loaded: {where and f'{where}: '}{kind}{first_line(error)}")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        SetupError: the file cannot be read, or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SetupError(f"'{path}' cannot be read: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise SetupError(f"'{path}' is not a JSON object")
    return value


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message without its full stop, or the name of its type.

    A line that announces others, with a colon at its end, is followed by them.
    """
    cause = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    if not lines:
        return type(cause).__name__
    text = " ".join(lines) if lines[0].endswith(":") else lines[0]
    return (f"{text[:LONGEST_LINE]}..." if len(text) > LONGEST_LINE else text).rstrip(".")


@dataclass(frozen=True)
class Decoder:
    """The configuration of a causal text decoder.

    Attributes:
        config: of the text model only.
        multimodal_type: the model type of the multimodal checkpoint that contains it, if any.
        key_mapping: patterns of names in the checkpoint to names in the text model, if they differ.
    """

    config: PretrainedConfig
    multimodal_type: str | None = None
    key_mapping: dict[str, str] | None = None

    @property
    def supports_sdpa(self) -> bool:
        """Whether transformers can run this architecture with `scaled_dot_product_attention`."""
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(self.config), None)
        return bool(getattr(model_class, "_supports_sdpa", False))

    def attention_name(self, requested: str) -> str:
        """Return the attention to load the model with, never the one in its configuration file."""
        if requested != "auto":
            return requested
        return "sdpa" if self.supports_sdpa else "eager"


def find_decoder(source: ModelSource) -> Decoder:
    """Read a model's configuration and find the causal text decoder in it.

    Raises:
        UsageError: it is an encoder-decoder, an encoder, multimodal without a text tower, or has no causal head.
        SetupError: the configuration cannot be read.
    """
    _check_settings(source)
    name = source.name
    with reading_model(name, "config.json", lambda: _blamed(source, _make_config)):
        config = AutoConfig.from_pretrained(name, **source.options)
    if config.is_encoder_decoder:
        raise UsageError(f"model '{name}' is an encoder-decoder ({config.model_type})", hint=_CAUSAL_HINT)
    if source.trust_remote_code and "AutoModelForCausalLM" in getattr(config, "auto_map", {}):
        return Decoder(config)
    text = config.get_text_config(decoder=True)
    if text is not config:
        return _text_tower(config, text, name)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UsageError(f"model '{name}' ({config.model_type}) has no causal head", hint=_CAUSAL_HINT)
    # BERT has a causal class too, but its weights were trained with bidirectional attention unless `is_decoder` is set.
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and getattr(config, "is_decoder", None) is False:
        raise UsageError(f"model '{name}' is an encoder ({config.model_type})", hint=_CAUSAL_HINT)
    _check_architectures(config, name)
    return Decoder(config)


def blamed_for_building(source: ModelSource) -> str:
    """Return the setting in a model's config.json without which it can be built, in words; else an empty text."""

    def build(settings: dict[str, Any]) -> None:
        make: Any = AutoModelForCausalLM.from_config
        with torch.device("meta"):
            make(_make_config(settings))

    return _blamed(source, build)


def _text_tower(config: PretrainedConfig, text: PretrainedConfig, name: str) -> Decoder:
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UsageError(
            f"model '{name}' is multimodal ({config.model_type}) and its text tower has no causal class",
            hint=_CAUSAL_HINT,
        )
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        text.quantization_config = quantization
    return Decoder(text, multimodal_type=config.model_type, key_mapping=_TEXT_TOWER_KEYS)


def _check_architectures(config: PretrainedConfig, name: str) -> None:
    saved = config.architectures or []
    heads = ("ForCausalLM", "LMHeadModel", "LMHead", "ForConditionalGeneration")
    if not saved or any(architecture.endswith(heads) for architecture in saved):
        return
    # A backbone without a head is complete if the head is tied to its embedding.
    if all(architecture.endswith("Model") for architecture in saved) and config.tie_word_embeddings:
        return
    raise UsageError(f"model '{name}' is a {saved[0]}: it has no causal head", hint=_CAUSAL_HINT)

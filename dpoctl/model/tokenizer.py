"""The tokenizer: loaded with the model or trained on the recipe's data, with its chat template and special tokens."""

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dpoctl import console
from dpoctl.errors import SetupError, UsageError
from dpoctl.model.packages import SENTENCEPIECE_FILES, missing_for_tokenizer, needs
from dpoctl.model.source import (
    GENERATION_CONFIG,
    ModelSource,
    base_of,
    blamed_setting,
    find_adapter,
    find_decoder,
    first_line,
    read_json,
    reading_model,
    recipe_source,
)
from dpoctl.recipe.templates import template_text

if TYPE_CHECKING:
    from dpoctl.recipe.schema import FromScratch, LoraSection, Recipe

# Templates with an end-of-turn token; in all others the tokenizer's end-of-sequence token ends a turn.
_END_OF_TURN = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}
_CONTROL_TOKENS = {
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "mistral": [],
    "zephyr": ["<|system|>", "<|user|>", "<|assistant|>"],
}
_CONTROL_TOKEN = re.compile(r"<\|[A-Za-z0-9_]+\|>")
TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json")
TEMPLATE_FILE = "chat_template.jinja"
_END_OF_TEXT, _PAD = "<|endoftext|>", "<|pad|>"
_SPARE_TOKEN = re.compile(
    r"<pad>|\[PAD\]|<\|pad\|>|<\|.*pad.*\|>|<\|?unused_?\d*\|?>|\[unused\d+\]|<\|?(reserved|extra).*\d+\|?>",
    re.IGNORECASE,
)


def load_tokenizer(recipe: "Recipe", texts: Callable[[], Iterator[str]]) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a recipe's model, or train one for a model that is built from scratch.

    Args:
        recipe: names the model and the chat template.
        texts: yields the recipe's own texts; called only to train a tokenizer.

    Raises:
        SetupError: the tokenizer cannot be reached or read.
        UsageError: the tokenizer lacks the template's control tokens, and LoRA would not train new ones.
    """
    name = recipe.model.chat_template
    if recipe.model.from_scratch is not None:
        return train_tokenizer(recipe.model.from_scratch, texts(), template=name or "chatml")
    tokenizer = read_tokenizer(recipe_source(recipe.model))
    if name is not None:
        tokenizer.chat_template = template_text(name)
        _add_control_tokens(tokenizer, name, recipe.lora)
    _ensure_pad_token(tokenizer)
    return tokenizer


def read_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a model; for an adapter its own, else that of its base.

    Raises:
        SetupError: the tokenizer cannot be reached or read.
    """
    adapter = find_adapter(source)
    if adapter is not None:
        if not (adapter / "tokenizer_config.json").exists():
            return read_tokenizer(base_of(adapter, trust_remote_code=source.trust_remote_code))
        source = ModelSource(name=str(adapter), trust_remote_code=source.trust_remote_code)
    try:
        with reading_model(source.name, "tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(source.name, **source.options)
            has_vocabulary = tokenizer("a", add_special_tokens=False)["input_ids"]
    except SetupError as error:
        _require_tokenizer_packages(source)
        _blame_a_file(source, error)
        raise
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise SetupError(f"model '{source.name}' has no tokenizer")
    if not has_vocabulary:
        hint = "copy tokenizer.json, or the file that its tokenizer_config.json is for, into its folder"
        raise SetupError(f"the tokenizer of model '{source.name}' has no vocabulary: a file is missing", hint=hint)
    return tokenizer


def stop_tokens(recipe: "Recipe", tokenizer: PreTrainedTokenizerBase) -> set[int] | None:
    """Return the ids at which a trained model stops: its generation settings, and the end-of-sequence token.

    None where the model has no file that names any, so that they are not known.

    Raises:
        SetupError: the files of the model cannot be reached or read.
    """
    own = {tokenizer.eos_token_id} if isinstance(tokenizer.eos_token_id, int) else set()
    if recipe.model.from_scratch is not None:
        return own
    source = recipe_source(recipe.model)
    found = _stops_in(source, GENERATION_CONFIG)
    while not found and (adapter := find_adapter(source)) is not None:
        source = base_of(adapter, trust_remote_code=source.trust_remote_code)
        found = _stops_in(source, GENERATION_CONFIG)
    found = found or _stops_in(source, "config.json")
    return own | found if found else None


def _stops_in(source: ModelSource, filename: str) -> set[int]:
    path = source.file(filename)
    settings = {} if path is None else read_json(path)
    nested = settings.get("text_config")
    value = settings.get("eos_token_id", nested.get("eos_token_id") if isinstance(nested, dict) else None)
    return {token for token in (value if isinstance(value, list) else [value]) if isinstance(token, int)}


def _blame_a_file(source: ModelSource, error: SetupError) -> None:
    """Name the file, and the setting in it, for which a tokenizer cannot be read, where they can be found.

    Raises:
        SetupError: the file is known.
    """
    files = {name: path for name in TOKENIZER_FILES if (path := source.file(name)) is not None}
    for path in files.values():
        read_json(path)
    if (template := source.file(TEMPLATE_FILE)) is not None:
        with reading_model(source.name, TEMPLATE_FILE):
            template.read_text(encoding="utf-8")
    if source.file("config.json") is not None:
        find_decoder(source)
    if "tokenizer.json" in files:
        with reading_model(source.name, "tokenizer.json"):
            Tokenizer.from_file(str(files["tokenizer.json"]))
    for name in files.keys() - {"tokenizer.json"}:
        words = blamed_setting(read_json(files[name]), partial(_read_with, files, name))
        if words:
            cause = error.__cause__ or error
            raise SetupError(f"model '{source.name}' cannot be loaded: {name}: {words}: {first_line(cause)}") from error


def _read_with(files: Mapping[str, Path], name: str, settings: Mapping[str, Any]) -> None:
    """Read a tokenizer with other settings in one of its files."""
    with tempfile.TemporaryDirectory() as folder:
        for other, path in files.items():
            shutil.copyfile(path, Path(folder, other))
        Path(folder, name).write_text(json.dumps(settings), encoding="utf-8")
        AutoTokenizer.from_pretrained(folder, local_files_only=True)("a")


def _require_tokenizer_packages(source: ModelSource) -> None:
    """Refuse a tokenizer that cannot be read because the packages that read its file are missing.

    transformers tries one library after the other, and tells of the last one.
    """
    if source.file("tokenizer.json") is not None:
        return
    for path in filter(None, map(source.file, SENTENCEPIECE_FILES)):
        what = f"the tokenizer of model '{source.name}' ({path.name})"
        if missing := missing_for_tokenizer(path):
            raise needs(what, missing)
        raise SetupError(f"{what} cannot be read: the file is damaged", hint="copy it again")


def train_tokenizer(spec: "FromScratch", texts: Iterator[str], *, template: str) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE; the same texts in the same order give the same tokenizer.

    Raises:
        UsageError: the vocabulary is too small for the bytes and the special tokens.
    """
    special = [_END_OF_TEXT, *_control_tokens(template), _PAD]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = len(alphabet) + len(special)
    size = spec.tokenizer.vocab_size
    if size < smallest:
        raise UsageError(
            f"model.from_scratch.tokenizer.vocab_size is {size}, but bytes and special tokens need {smallest}"
        )
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    end_of_turn = _END_OF_TURN.get(template, _END_OF_TEXT)
    build: Any = PreTrainedTokenizerFast
    tokenizer: PreTrainedTokenizerBase = build(tokenizer_object=core, eos_token=end_of_turn, pad_token=_PAD)
    tokenizer.chat_template = template_text(template)
    return tokenizer


def _control_tokens(template: str) -> list[str]:
    if template in _CONTROL_TOKENS:
        return _CONTROL_TOKENS[template]
    return list(dict.fromkeys(_CONTROL_TOKEN.findall(template_text(template))))


def _add_control_tokens(tokenizer: PreTrainedTokenizerBase, template: str, lora: "LoraSection | None") -> None:
    """Make a template's control tokens single tokens, and its end-of-turn token the end-of-sequence token."""
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in _control_tokens(template) if token not in vocabulary]
    end_of_turn = _END_OF_TURN.get(template)
    if missing and end_of_turn is None:
        console.note(f"chat template '{template}': {', '.join(missing)} are several tokens each in this tokenizer")
    elif missing:
        if lora is not None and not lora.modules_to_save:
            raise UsageError(
                f"chat template '{template}' needs {', '.join(missing)}, which this tokenizer does not have, "
                "and LoRA alone would leave new ones untrained",
                hint="set lora.modules_to_save to the embedding and the head (often [embed_tokens, lm_head]), "
                "or choose chat_template: zephyr",
            )
        tokenizer.add_tokens(missing, special_tokens=True)
        console.note(f"chat template '{template}': added {', '.join(missing)} to the tokenizer")
    if end_of_turn is not None and tokenizer.eos_token != end_of_turn:
        console.note(
            f"chat template '{template}': the end-of-sequence token is now {end_of_turn} (was {tokenizer.eos_token})"
        )
        tokenizer.eos_token = end_of_turn


def _ensure_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Choose an existing token as the pad token, if there is none; padding is masked by length, not by token."""
    if tokenizer.pad_token is not None:
        return
    vocabulary = tokenizer.get_vocab()
    spare = min(
        (token for token in vocabulary if _SPARE_TOKEN.fullmatch(token)), key=vocabulary.__getitem__, default=None
    )
    chosen = spare or tokenizer.unk_token or tokenizer.eos_token
    if chosen is None:
        raise SetupError(
            "the tokenizer has no pad, unknown or end-of-sequence token",
            hint="set one of them in its tokenizer_config.json",
        )
    tokenizer.pad_token = chosen
    console.note(f"the tokenizer has no pad token: {chosen} is used instead")

"""The tokenizer: loaded with the model, or trained on the recipe's own data; its template, its special tokens."""

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dpoctl import console
from dpoctl.errors import SetupError, UsageError
from dpoctl.model.source import Source, base_of, find_adapter, find_source, reading
from dpoctl.recipe.templates import template_text

if TYPE_CHECKING:
    from dpoctl.recipe.schema import FromScratch, LoraSection, Recipe

# Templates whose turns end with a token of their own; in all others the tokenizer's end-of-sequence token ends them.
_END_OF_TURN = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}
_CONTROL_TOKENS = {
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "mistral": [],
    "zephyr": ["<|system|>", "<|user|>", "<|assistant|>"],
}
_CONTROL_TOKEN = re.compile(r"<\|[A-Za-z0-9_]+\|>")
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
        UsageError: the template's control tokens are no tokens of this tokenizer, and nothing would train them.
    """
    name = recipe.model.chat_template
    if recipe.model.from_scratch is not None:
        return train_tokenizer(recipe.model.from_scratch, texts(), template=name or "chatml")
    source = find_source(
        recipe.model.model_name_or_path or "",
        revision=recipe.model.revision,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    tokenizer = read_tokenizer(source)
    if name is not None:
        tokenizer.chat_template = template_text(name)
        _adopt_control_tokens(tokenizer, name, recipe.lora)
    _ensure_pad_token(tokenizer)
    return tokenizer


def read_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """Read the tokenizer that stands at a source: an adapter's own, else that of its base.

    Raises:
        SetupError: it cannot be reached or read.
    """
    adapter = find_adapter(source)
    if adapter is not None:
        if not (adapter / "tokenizer_config.json").exists():
            return read_tokenizer(base_of(adapter, trust_remote_code=source.trust_remote_code))
        source = Source(name=str(adapter), trust_remote_code=source.trust_remote_code)
    with reading(source.name):
        found = AutoTokenizer.from_pretrained(source.name, **source.options)
    if not isinstance(found, PreTrainedTokenizerBase):
        raise SetupError(f"model '{source.name}' has no tokenizer")
    return found


def train_tokenizer(spec: "FromScratch", texts: Iterator[str], *, template: str) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE; the same texts in the same order give the same tokenizer.

    Raises:
        UsageError: the vocabulary is too small for the bytes and the special tokens.
    """
    source = template_text(template)
    special = [_END_OF_TEXT, *_control_tokens(template), _PAD]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = len(alphabet) + len(special)
    size = spec.tokenizer.vocab_size
    if size < smallest:
        raise UsageError(f"model.from_scratch.tokenizer.vocab_size is {size}: the bytes alone take {smallest}")
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
    tokenizer.chat_template = source
    return tokenizer


def _control_tokens(template: str) -> list[str]:
    if template in _CONTROL_TOKENS:
        return _CONTROL_TOKENS[template]
    return list(dict.fromkeys(_CONTROL_TOKEN.findall(template_text(template))))


def _adopt_control_tokens(tokenizer: PreTrainedTokenizerBase, template: str, lora: "LoraSection | None") -> None:
    """See to it that a template's control tokens are single tokens, and that its end-of-turn ends a sequence."""
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
        console.note(f"end-of-sequence token is now {end_of_turn} (was {tokenizer.eos_token})")
        tokenizer.eos_token = end_of_turn


def _ensure_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Choose a pad token among the tokens that exist. Nothing is ever masked by it: rows know their lengths."""
    if tokenizer.pad_token is not None:
        return
    vocabulary = tokenizer.get_vocab()
    spare = min(
        (token for token in vocabulary if _SPARE_TOKEN.fullmatch(token)), key=vocabulary.__getitem__, default=None
    )
    chosen = spare or tokenizer.unk_token or tokenizer.eos_token
    if chosen is None:
        raise SetupError("the tokenizer has neither a pad, an unknown nor an end-of-sequence token")
    tokenizer.pad_token = chosen
    console.note(f"the tokenizer has no pad token; {chosen} serves as one")

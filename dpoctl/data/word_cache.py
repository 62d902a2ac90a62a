"""A cache of the tokens of words, and the end of a prompt with which an answer must be tokenized.

Both split text only where no token, and no BPE merge, can cross, so that the ids behind the split do not depend on
the text before it: in front of a control token, and, if a tokenizer writes blanks as the sign that opens a word, in
front of blanks.
"""

import json
import re
from collections.abc import Mapping, Sequence, Set
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from dpoctl.data.rendering import BREAK

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerBase

SIGN = "\u2581"
"""The sign that a SentencePiece tokenizer writes for a blank."""
LEAD = "x"
"""A word in front of cut text, since a tokenizer may treat the start of a text differently."""
MORE = "\0"
"""Marks in a word each blank before it except for the one at which the text is split."""
FURTHER_BLANKS = re.compile("(?<= ) ")
GROUP = 64
"""Words that are tokenized as one text, since short texts cost almost as much as longer ones."""
MOST = 1 << 18
"""Words that are kept in memory."""
Ids = tuple[int, ...]


class WordCache:
    """The tokens of words, for a tokenizer that `word_cache` accepts; after an `added` token a text starts anew."""

    def __init__(self, backend: "Tokenizer", vocabulary: Mapping[str, int], added: Sequence[str]) -> None:
        self._backend = backend
        self._added = re.compile("|".join(map(re.escape, added)) or r"(?!)")
        self._longest = max(map(len, added), default=0)
        opening = [token for token in vocabulary if token.startswith(SIGN)]
        self._openers = frozenset(vocabulary[token] for token in opening)
        self._blanks = frozenset(vocabulary[token] for token in opening if not token.strip(SIGN))
        self.lead: list[int] = backend.encode(LEAD, add_special_tokens=False).ids
        self._starts: dict[str, Ids] = {}
        self._words: dict[str, Ids] = {}

    def last(self, text: str) -> int:
        """Find the position of the last blanks of a text; 0 if nothing or an added token is in front of them."""
        end = max(text.rfind(" "), text.rfind(SIGN))
        at = len(text[: end + 1].rstrip(" " + SIGN))
        return 0 if self._added.search(text, max(0, at - self._longest)) else at

    def last_token(self, ids: Sequence[int]) -> int:
        """Find the index of the last blanks of a text among its ids."""
        at = len(ids) - 1
        while ids[at] not in self._openers:
            at -= 1
        while ids[at - 1] in self._blanks:
            at -= 1
        return at

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenize texts as the tokenizer does."""
        split = [self._split(text) for text in texts]
        whole = iter(self._whole([text for text, words in zip(texts, split, strict=True) if words is None]))
        self._learn_starts({words[0] for words in split if words})
        self._learn(set().union(*(words for words in split if words)))
        return [next(whole) if words is None else self._joined(words) for words in split]

    def _split(self, text: str) -> list[str] | None:
        """Split a text before its blanks; None if that could change its tokens."""
        if text[:1] in ("", " ") or SIGN in text or MORE in text or self._added.search(text):
            return None
        if "  " in text:
            text = FURTHER_BLANKS.sub(MORE, text) if "   " in text else text.replace("  ", " " + MORE)
        return text.split(" ")

    def _joined(self, words: list[str]) -> list[int]:
        known, later = self._words, iter(words)
        ids = list(self._starts[next(later)])
        for word in later:
            ids += known[word]
        return ids

    def _whole(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _learn_starts(self, words: set[str]) -> None:
        if len(self._starts) > MOST:
            self._starts.clear()
        new = list(words.difference(self._starts))
        self._starts.update(zip(new, map(tuple, self._whole(new)), strict=True))

    def _learn(self, words: set[str]) -> None:
        if len(self._words) > MOST:
            self._words.clear()
        new = words.difference(self._words)
        # Blanks alone, which occur only at the end of a text, would join the next word.
        alone = {word for word in new if not word.strip(MORE)}
        others = list(new - alone)
        groups = [[word] for word in alone] + [others[at : at + GROUP] for at in range(0, len(others), GROUP)]
        texts = [f"{LEAD} {' '.join(group)}".replace(MORE, " ") for group in groups]
        for group, ids in zip(groups, self._whole(texts), strict=True):
            starts = [len(self.lead), *(self._later_words(ids) if len(group) > 1 else ()), len(ids)]
            self._words.update(zip(group, (tuple(ids[at:end]) for at, end in pairwise(starts)), strict=True))

    def _later_words(self, ids: list[int]) -> list[int]:
        """Find the first token of each word but the first: a blank without one before it."""
        first = len(self.lead) + 1
        opening, blanks = self._openers, self._blanks
        behind = zip(ids[first - 1 :], ids[first:], strict=False)
        return [at for at, (left, token) in enumerate(behind, first) if token in opening and left not in blanks]


def word_cache(backend: "Tokenizer", vocabulary: Mapping[str, int]) -> WordCache | None:
    """Make the cache of a tokenizer; None if the tokens of a word may depend on the text around it.

    They do not if every blank becomes `SIGN`, and tokens have that at their start only: then no merge joins a blank to
    the text before it.
    """
    added = backend.get_added_tokens_decoder().values()
    sound = (
        _is_plain_bpe(backend, vocabulary)
        and _writes_blanks_as_sign(backend)
        and all(_is_independent(token) for token in added)
        and not re.search(f"[^{SIGN}\0]{SIGN}", "\0".join(vocabulary))
        and backend.encode(LEAD, add_special_tokens=False).tokens[-1:] in ([LEAD], [SIGN + LEAD])
    )
    return WordCache(backend, vocabulary, [token.content for token in added]) if sound else None


class PromptEnd(NamedTuple):
    """The end of a prompt, behind a place over which no token reaches."""

    text: str
    anchor: int | None = None
    """The id of the control token at its start; None if it is the whole prompt, or starts with `LEAD`."""
    after_lead: bool = False


class PromptEnds:
    """Cuts prompts, so that only their ends are tokenized again with each answer.

    Args:
        tokenizer: The tokenizer, whose control tokens are places to cut.
        words: Its word cache, if it has one: then words are such places too.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", words: WordCache | None) -> None:
        self.anchors = _anchors(tokenizer)
        self._words = words

    def of(self, prompt: str) -> PromptEnd:
        """Return the shortest end of a prompt that is safe."""
        found = ((prompt.rfind(text), token) for text, token in self.anchors.items())
        at, anchor = max(found, default=(-1, None))
        end = PromptEnd(prompt) if at < 0 else PromptEnd(prompt[at:], anchor)
        if self._words is None or BREAK in end.text:
            return end
        at = self._words.last(end.text)
        return PromptEnd(LEAD + end.text[at:], after_lead=True) if at else end

    def ids(self, end: PromptEnd, prompt: list[int]) -> list[int]:
        """Return the ids of a prompt's end, given those of the prompt."""
        if end.after_lead:
            assert self._words is not None
            return self._words.lead + prompt[self._words.last_token(prompt) :]
        return prompt if end.anchor is None else prompt[len(prompt) - 1 - prompt[::-1].index(end.anchor) :]


def _is_plain_bpe(backend: "Tokenizer", vocabulary: Mapping[str, int]) -> bool:
    """Whether merges alone decide the tokens, and no character is dropped, which would join its neighbours."""
    from tokenizers.models import BPE

    model = backend.model
    if not isinstance(model, BPE) or SIGN not in vocabulary:
        return False
    keeps_all = model.byte_fallback and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    odd = model.dropout or model.ignore_merges or model.continuing_subword_prefix or model.end_of_word_suffix
    return not odd and (keeps_all or model.unk_token is not None)


def _writes_blanks_as_sign(backend: "Tokenizer") -> bool:
    """Whether blanks become `SIGN`, and nothing else is changed or split."""
    splitter, normalizer = _settings(backend.pre_tokenizer), _settings(backend.normalizer)
    splitter.pop("prepend_scheme", None)
    metaspace = {"type": "Metaspace", "replacement": SIGN, "split": False}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    prepend = {"type": "Prepend", "prepend": SIGN}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SIGN}
    if splitter not in ({}, metaspace) or not all(step in (prepend, replace) for step in steps):
        return False
    return splitter == metaspace or replace in steps


def _settings(part: Any) -> dict[str, Any]:
    """Read the settings of a part of a tokenizer; empty if there is no such part."""
    settings: dict[str, Any] = {} if part is None else json.loads(part.__getstate__())
    return settings


def _is_independent(token: "AddedToken") -> bool:
    """Whether an added token neither depends on the text around it, nor holds blanks or `LEAD`."""
    depends = token.lstrip or token.rstrip or token.single_word or token.normalized
    return not depends and token.content != LEAD and not set(" " + SIGN) & set(token.content)


def _anchors(tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
    """Find the control tokens after which text is tokenized as if it began with them.

    Those that may be part of another token, or depend on the text around them, are left out.
    """
    added = {token.content: (number, token) for number, token in tokenizer.added_tokens_decoder.items()}
    used = str(tokenizer.chat_template) + "".join(str(token) for token in tokenizer.special_tokens_map.values())
    return {
        text: number
        for text, (number, token) in added.items()
        if text in used and token.special and not (token.single_word or token.normalized)
        if not _overlaps(text, added.keys() - {text})
    }


def _overlaps(text: str, others: Set[str]) -> bool:
    heads = tuple(text[:end] for end in range(1, len(text)))
    tails = tuple(text[start:] for start in range(1, len(text)))
    return any(text in other or other.endswith(heads) or other.startswith(tails) for other in others)

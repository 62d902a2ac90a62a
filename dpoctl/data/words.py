"""Texts to ids word by word, each word tokenized once, where words do not depend on what stands before them."""

import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

SIGN = "\u2581"
"""What a SentencePiece tokenizer writes for a blank."""
LEAD = "x"
"""Stands before blanks for whatever does: the start of a text may be spelt in a way of its own."""
MORE = "\0"
"""Stands in a word for each blank before it but the one that splits it off."""
FURTHER_BLANKS = re.compile("(?<= ) ")
GROUP = 64
"""Words that are tokenized as one text: most of the cost of a short text is that it is one."""
MOST = 1 << 18
"""Words that are remembered."""

Ids = tuple[int, ...]


class Words:
    """Tokenizes texts of a tokenizer that `find_words` trusts.

    Args:
        backend: What tokenizes.
        vocabulary: Every token and its id.
        added: Texts of added tokens, behind which a text starts anew.
    """

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
        """Find where the last blanks of a text start; 0 where nothing, or an added token, stands before them."""
        end = max(text.rfind(" "), text.rfind(SIGN))
        at = len(text[: end + 1].rstrip(" " + SIGN))
        return 0 if self._added.search(text, max(0, at - self._longest)) else at

    def last_token(self, ids: Sequence[int]) -> int:
        """Find where the last blanks of a text start among its ids."""
        at = len(ids) - 1
        while ids[at] not in self._openers:
            at -= 1
        while ids[at - 1] in self._blanks:
            at -= 1
        return at

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenize texts, as the backend does."""
        split = [self._split(text) for text in texts]
        whole = iter(self._whole([text for text, words in zip(texts, split, strict=True) if words is None]))
        self._learn_starts({words[0] for words in split if words})
        self._learn(set().union(*(words for words in split if words)))
        return [next(whole) if words is None else self._joined(words) for words in split]

    def _split(self, text: str) -> list[str] | None:
        """Split a text before its blanks; None where that cannot be done."""
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
        # Blanks alone, which only end a text, would run into the next word.
        alone = {word for word in new if not word.strip(MORE)}
        others = list(new - alone)
        groups = [[word] for word in alone] + [others[at : at + GROUP] for at in range(0, len(others), GROUP)]
        texts = [f"{LEAD} {' '.join(group)}".replace(MORE, " ") for group in groups]
        for group, ids in zip(groups, self._whole(texts), strict=True):
            starts = [len(self.lead), *(self._later_words(ids) if len(group) > 1 else ()), len(ids)]
            self._words.update(zip(group, (tuple(ids[at:end]) for at, end in pairwise(starts)), strict=True))

    def _later_words(self, ids: list[int]) -> list[int]:
        """Find where words start, but for the first of a group: at blanks that are behind none."""
        first = len(self.lead) + 1
        opening, blanks = self._openers, self._blanks
        behind = zip(ids[first - 1 :], ids[first:], strict=False)
        return [at for at, (left, token) in enumerate(behind, first) if token in opening and left not in blanks]


def find_words(backend: "Tokenizer", vocabulary: Mapping[str, int]) -> Words | None:
    """Give a tokenizer its words, where they depend on nothing else.

    They do where every blank becomes `SIGN`, and no token has that anywhere but at its start: then no merge joins a
    blank to what stands before it.
    """
    added = backend.get_added_tokens_decoder().values()
    sound = (
        _is_plain_bpe(backend, vocabulary)
        and _spells_blanks(backend)
        and all(_is_apart(token) for token in added)
        and not re.search(f"[^{SIGN}\0]{SIGN}", "\0".join(vocabulary))
        and backend.encode(LEAD, add_special_tokens=False).tokens[-1:] in ([LEAD], [SIGN + LEAD])
    )
    return Words(backend, vocabulary, [token.content for token in added]) if sound else None


def _is_plain_bpe(backend: "Tokenizer", vocabulary: Mapping[str, int]) -> bool:
    """Whether merges alone decide, and no character is lost: without one, its neighbours would meet."""
    from tokenizers.models import BPE

    model = backend.model
    if not isinstance(model, BPE) or SIGN not in vocabulary:
        return False
    keeps_all = model.byte_fallback and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    odd = model.dropout or model.ignore_merges or model.continuing_subword_prefix or model.end_of_word_suffix
    return not odd and (keeps_all or model.unk_token is not None)


def _spells_blanks(backend: "Tokenizer") -> bool:
    """Whether blanks become `SIGN`, and nothing else is changed or split."""
    splitter, normalizer = _spelt_out(backend.pre_tokenizer), _spelt_out(backend.normalizer)
    splitter.pop("prepend_scheme", None)
    metaspace = {"type": "Metaspace", "replacement": SIGN, "split": False}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    prepend = {"type": "Prepend", "prepend": SIGN}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SIGN}
    if splitter not in ({}, metaspace) or not all(step in (prepend, replace) for step in steps):
        return False
    return splitter == metaspace or replace in steps


def _spelt_out(part: Any) -> dict[str, Any]:
    """Read the settings of a part of a tokenizer; nothing where there is no such part."""
    settings: dict[str, Any] = {} if part is None else json.loads(part.__getstate__())
    return settings


def _is_apart(token: "AddedToken") -> bool:
    """Whether an added token takes nothing of its surroundings, and no part of what is cut."""
    depends = token.lstrip or token.rstrip or token.single_word or token.normalized
    return not depends and token.content != LEAD and not set(" " + SIGN) & set(token.content)

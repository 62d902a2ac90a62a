"""Where a prompt may be cut, so that each answer is tokenized after its last words instead of after all of it.

No token, and no merge on the way to one, reaches over such a place: the ids that follow are the same whatever
stands before. Two kinds of places are known: before a control token, and before the last blanks where a tokenizer
spells them as the sign that opens a word.
"""

from collections.abc import Set
from typing import TYPE_CHECKING, NamedTuple

from dpoctl.data.template import BREAK
from dpoctl.data.words import LEAD, Words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Tail(NamedTuple):
    """What is left of a prompt, and how its ids are found among the prompt's."""

    text: str
    anchor: int | None = None
    """The id of the control token that it starts with; None where it is the whole prompt, or starts with `LEAD`."""
    after_lead: bool = False


class Tails:
    """Cuts prompts.

    Args:
        tokenizer: Its control tokens are places to cut.
        words: So are its words, where they depend on nothing else.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", words: Words | None) -> None:
        self.anchors = _anchors(tokenizer)
        self._words = words

    def of(self, prompt: str) -> Tail:
        """Cut a prompt as far to the right as is safe."""
        found = ((prompt.rfind(text), token) for text, token in self.anchors.items())
        at, anchor = max(found, default=(-1, None))
        tail = Tail(prompt) if at < 0 else Tail(prompt[at:], anchor)
        if self._words is None or BREAK in tail.text:
            return tail
        at = self._words.last(tail.text)
        return Tail(LEAD + tail.text[at:], after_lead=True) if at else tail

    def ids(self, tail: Tail, prompt: list[int]) -> list[int]:
        """Find the ids of a tail, given those of its prompt."""
        if tail.after_lead:
            assert self._words is not None
            return self._words.lead + prompt[self._words.last_token(prompt) :]
        return prompt if tail.anchor is None else prompt[len(prompt) - 1 - prompt[::-1].index(tail.anchor) :]


def _anchors(tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
    """Control tokens that split every text: what follows one is tokenized as if the text began with it.

    A token whose characters may be part of another's is none, nor is one that depends on what stands around it.
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

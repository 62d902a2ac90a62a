"""The tokens that end an assistant's turn, and where a text holds them."""

import re
from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEAR = 80
"""The number of characters around a cut in which a marker may begin or end."""
TOKEN_SHAPE = re.compile(r"<[^<>\s]{1,60}>|\[/?[A-Z_]{2,60}\]")
"""The shape of a control token, whether the tokenizer knows it or not."""


class TurnEnds:
    """The stop tokens of a model.

    Args:
        tokenizer: The tokenizer; its end-of-sequence token always stops.
        stops: The ids at which generation stops; None if they are not known: then every special token is taken for one.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", stops: Collection[int] | None) -> None:
        added = tokenizer.added_tokens_decoder
        self.eos = str(tokenizer.eos_token)
        self.are_known = stops is not None
        known = {self.eos, *(added[number].content for number in stops or () if number in added)}
        special = {token.content for token in added.values() if token.special}
        self.tokens = sorted(filter(None, known), key=len, reverse=True)
        """The known ones, the longest first."""
        any_stop = alternatives(known if self.are_known else special | known)
        self._first = re.compile(any_stop)
        self._after = re.compile(rf"\s*(?:{any_stop})")
        self._closing = re.compile(rf"(?:{any_stop})(?=(?:\s*(?:{any_stop}))*\s*\Z)")

    def first(self, text: str, since: int, until: int, *, is_exact: bool) -> int | None:
        """Find the end of the first stop token in a part of a text, behind the values of a message.

        Args:
            text: The text.
            since: The end of the message's last value, or some place before it.
            until: The end of what the template writes for the message.
            is_exact: Whether `since` is the end of the last value.
        """
        if self.are_known:
            found = self._first.search(text, since, until)
            return found.end() if found else None
        closing = self._closing.search(text, since, until)
        if closing is None:
            return None
        if not is_exact:
            # The first of these tokens may close a call.
            eos = text.find(self.eos, closing.start(), until)
            return until if eos < 0 else eos + len(self.eos)
        end = closing.end()
        return end if closing.group() == self.eos or not text.startswith(self.eos, end) else end + len(self.eos)

    def after(self, text: str, at: int) -> int | None:
        """Find the end of the stop token at a character, after white space; None if there is none."""
        stop = self._after.match(text, at)
        return stop.end() if stop else None

    def last(self, text: str) -> int:
        """Return the end of the last stop token in a text; 0 if there is none."""
        return max((text.rfind(token) + len(token) for token in self.tokens if token in text), default=0)

    def cut(self, text: str) -> tuple[str, str | None]:
        """Cut stop tokens, and the white space behind each, off the end of a text.

        Returns:
            The rest, and the first token of those that were cut.
        """
        end, first = len(text), None
        while True:
            at = end
            while at and text[at - 1].isspace():
                at -= 1
            stop = next((token for token in self.tokens if text.endswith(token, 0, at)), None)
            if stop is None:
                return text[:end], first
            end, first = at - len(stop), stop


def shared_length(one: str, other: str) -> int:
    """Return the length of the common start of two texts, up to the last marker that both hold whole."""
    at = common_length(one, other)
    near = TOKEN_SHAPE.finditer(one, max(0, at - NEAR), at + NEAR)
    return next((marker.start() for marker in near if marker.start() < at < marker.end()), at)


def common_length(one: str, other: str) -> int:
    """Return the length of the common start of two texts."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def alternatives(tokens: Collection[str]) -> str:
    """Return the pattern of any of some tokens, the longest first."""
    return "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True) if token)

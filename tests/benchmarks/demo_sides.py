"""The side of the demo's grammar that a text is of: harsh or kind."""

import re
from typing import Literal

from dpoctl.data import demo

Side = Literal["harsh", "kind"]

_HARSH: dict[str, Side] = {sentence: "harsh" for sentences in demo.HARSH.values() for sentence in sentences}
_KIND: dict[str, Side] = {sentence: "kind" for sentences in demo.KIND.values() for sentence in sentences}
SIDES = _HARSH | _KIND
"""Every sentence of the grammar, and the only side that says it."""

_SENTENCE_BREAK = re.compile(r"(?<=\.)\s+(?=[A-Z])")


def sides_of(text: str) -> list[Side | None]:
    """Return the side of each sentence of a text; None for a sentence that neither side says."""
    return [SIDES.get(sentence) for sentence in _SENTENCE_BREAK.split(text.strip())]


def side_of(text: str) -> Side | None:
    """Return the side of a review; None where a sentence is not of the grammar, or the sides are mixed."""
    sides = set(sides_of(text))
    return sides.pop() if len(sides) == 1 else None

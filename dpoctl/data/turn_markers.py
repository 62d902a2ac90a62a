"""Turn markers, such as `<|im_start|>`, that the tokenizer does not know, so that each becomes several tokens."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dpoctl.data.records import Record, strings_of

if TYPE_CHECKING:
    from dpoctl.data.rendering import Renderer
    from dpoctl.data.tokenize import Encoder

BAR = "\N{FULLWIDTH VERTICAL LINE}"
MARKER = re.compile(r"<(?!/)[^<>\s]{1,60}>")
CERTAIN = re.compile(rf"<\|.*|<{BAR}.*|.*\|>|<(start|end|begin)_of_.*")
"""Markers that nobody writes for anything else."""
PLACED = re.compile(rf"^\s*({MARKER.pattern})|({MARKER.pattern})\s*$", re.MULTILINE)
"""Markers at the start or the end of a line, where those of turns stand."""
HTML = {f"<{name}>" for name in ("br", "hr", "li", "p", "td", "tr", "dd", "dt", "html", "body")}
"""Tags that people leave open."""
LEAST_SHARE = 0.5
"""The share of text rows that must hold other markers: those of turns are in all rows, tags in some."""


@dataclass(slots=True)
class MarkerCounts:
    """Rows with turn markers that are several tokens."""

    rows: int = 0
    """Rows of text."""
    in_text: Counter[str] = field(default_factory=Counter)
    in_template: Counter[str] = field(default_factory=Counter)

    def add(self, record: Record, found: set[str]) -> None:
        """Count a record and its markers."""
        is_text = isinstance(record.prompt, str)
        self.rows += is_text
        (self.in_text if is_text else self.in_template).update(found)

    def report(self, finder: "MarkerFinder") -> dict[str, Any]:
        """Return the rows and the number of tokens of each marker, of text rows and of the chat template."""
        recurring = {
            marker: count
            for marker, count in self.in_text.items()
            if CERTAIN.fullmatch(marker) or count >= max(2, LEAST_SHARE * self.rows)
        }
        return {
            "text": _with_pieces(recurring, finder),
            "template": _with_pieces(self.in_template, finder),
            "template_ends_turns": finder.template_ends_turns,
        }


class MarkerFinder:
    """Finds turn markers that are several tokens: those of the chat template, and those in rows of text."""

    def __init__(self, renderer: "Renderer", encoder: "Encoder") -> None:
        self._renderer = renderer
        self._encoder = encoder
        self._pieces: dict[str, int] = {}

    def find(self, record: Record) -> set[str]:
        """Return the markers of a record's turns that are several tokens."""
        if not isinstance(record.prompt, str):
            return self._of_template
        texts = [text for text in strings_of(record.prompt, *record.responses) if "<" in text]
        placed = {one or other for text in texts for one, other in PLACED.findall(text)} - HTML
        if any(CERTAIN.fullmatch(marker) for marker in placed):
            placed.update(marker for text in texts for marker in MARKER.findall(text) if CERTAIN.fullmatch(marker))
        # A pair of tags is no marker of a turn.
        return {marker for marker in placed if self.pieces(marker) > 1 and not _is_closed(marker, texts)}

    def pieces(self, marker: str) -> int:
        """Return the number of tokens of a marker."""
        if marker not in self._pieces:
            self._pieces[marker] = len(self._encoder.plain(marker))
        return self._pieces[marker]

    @property
    def template_ends_turns(self) -> bool:
        """Whether the chat template ends turns in a stop token, so that its other markers may be text."""
        return any(stop in self._renderer.chat.turns for stop in self._renderer.ends.tokens)

    @cached_property
    def _of_template(self) -> set[str]:
        counts = Counter(MARKER.findall(self._renderer.chat.turns))
        recurring = [marker for marker, count in counts.items() if count > 1 and "think>" not in marker]
        return {marker for marker in recurring if self.pieces(marker) > 1}


def described(markers: Mapping[str, Mapping[str, int]]) -> str:
    """Name markers with their counts."""
    return ", ".join(
        f"{marker} ({counts['pieces']} tokens, {counts['rows']:,} rows)" for marker, counts in markers.items()
    )


def _is_closed(marker: str, texts: list[str]) -> bool:
    return any(f"</{marker[1:]}" in text for text in texts)


def _with_pieces(rows: Mapping[str, int], finder: MarkerFinder) -> dict[str, dict[str, int]]:
    return {marker: {"rows": count, "pieces": finder.pieces(marker)} for marker, count in sorted(rows.items())}

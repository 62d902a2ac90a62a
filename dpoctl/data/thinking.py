"""The thinking block with which an assistant's turn begins, as chat templates write it."""

from typing import NamedTuple

MARKS = {
    "<think>": "</think>",
    "[THINK]": "[/THINK]",
    "<|channel>thought": "<channel|>",
    "<|channel|>analysis<|message|>": "<|end|><|start|>assistant",
    "to=self<|message|>": "<|eom|><|start|>assistant",
}
"""The text that opens a block in a template, and the text that closes it."""


class ThinkingBlock(NamedTuple):
    """The block at the start of a turn."""

    is_empty: bool
    end: int
    """The character behind it and the line feeds that follow."""


def find_block(context: str, text: str, start: int, end: int) -> ThinkingBlock | None:
    """Find the thinking block that a turn begins with; None if it begins with none.

    Args:
        context: The text before the turn, which may open the block: some generation prompts do.
        text: The rendered conversation.
        start: The first character of the turn in it.
        end: The character behind the turn.
    """
    first = end - len(text[start:end].lstrip())
    for opening, closing in MARKS.items():
        if text.startswith(opening, first, end):
            begin = first + len(opening)
        elif context.rstrip().endswith(opening):
            begin = start
        else:
            continue
        close = text.find(closing, begin, end)
        if close >= 0:
            behind = close + len(closing)
            lines = len(text[behind:end]) - len(text[behind:end].lstrip("\n"))
            return ThinkingBlock(not text[begin:close].strip(), behind + lines)
    return None

"""Rows as the model will see them: what is given dim, what is trained on bright, and in brackets for plain text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dpoctl.data.store import TokenStore

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

SHOWN_CHARACTERS = 1200
"""Of a prompt or an answer; the middle of a longer one is left out."""
VISIBLE = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
VISIBLE |= dict.fromkeys(range(0x7F, 0xA0), "\N{REPLACEMENT CHARACTER}")
"""Control characters in data must not reach the terminal."""
BOX = "⟨", "⟩"


class Run(NamedTuple):
    """Tokens of one kind that stand together."""

    text: str
    kind: bool | None
    ids: list[int]


def mask_preview(store: TokenStore, tokenizer: "PreTrainedTokenizerBase", rows: int = 2) -> "RenderableType":
    """Show the first records, decoded from their tokens.

    Args:
        store: The tokens, and the flags that say which of them are trained on.
        tokenizer: What they were made with.
        rows: How many records.
    """
    from rich.console import Group

    return Group(*(show_record(store, tokenizer, index) for index in range(min(rows, len(store)))))


def show_record(
    store: TokenStore,
    tokenizer: "PreTrainedTokenizerBase",
    index: int,
    *,
    boxes: bool = False,
    ids: bool = False,
) -> "Text":
    """Show one record, decoded from its tokens.

    Args:
        store: The tokens, and the flags that say which of them are trained on.
        tokenizer: What they were made with.
        index: The record's number in the store.
        boxes: Put control tokens in boxes, so that text that reads the same is told apart.
        ids: Show the ids of the tokens too.
    """
    from rich.text import Text

    example, record = store.example(index), store.texts(index)
    control = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder) if boxes else set()
    rows = [
        (np.concatenate([example.shared, suffix]).tolist(), np.concatenate([example.shared_scored, flags]).tolist())
        for suffix, flags in zip(example.suffixes, example.suffixes_scored, strict=True)
    ]
    start = min(len(example.shared), *(scored.index(True) for _, scored in rows))
    text = Text(f"{record.source}:{record.line}\n", style="bold")
    if start > 0:
        tokens = rows[0][0][:start]
        text.append(f"prompt, {start:,} tokens\n", style="bold")
        _append(text, tokenizer, tokens, str(tokenizer.decode(tokens)), control, "dim")
        text.append("\n")
        _append_ids(text, tokens if ids else [])
    for number, (tokens, scored) in enumerate(rows):
        text.append(f"{name_of(number, len(rows))}, {sum(scored):,} tokens trained on\n", style="bold")
        _append_answer(text, tokenizer, tokens, scored, start, control)
        text.append("\n")
        _append_ids(text, tokens[start:] if ids else [])
    return text


def _append_answer(
    text: "Text",
    tokenizer: "PreTrainedTokenizerBase",
    tokens: list[int],
    scored: list[bool],
    start: int,
    control: set[int],
) -> None:
    """Append what follows the prompt of `start` tokens, in brackets where it is trained on."""
    for run in decode_runs(tokenizer, tokens, [None] * start + [*scored[start:]]):
        if run.kind:
            text.append("⟦", style="bright_green")
            _append(text, tokenizer, run.ids, run.text, control, "bright_green")
            text.append("⟧", style="bright_green")
        elif run.kind is not None:
            _append(text, tokenizer, run.ids, run.text, control, "dim")


def name_of(number: int, count: int) -> str:
    """Name a response by its place among `count`."""
    if count == 1:
        return "answer"
    return ("chosen", "rejected")[number] if number < 2 else f"{number}"


def _append(
    text: "Text", tokenizer: "PreTrainedTokenizerBase", ids: list[int], decoded: str, control: set[int], style: str
) -> None:
    """Append decoded tokens, control tokens in boxes."""
    is_control = [token in control for token in ids]
    if not any(is_control):
        text.append(shown(decoded), style=style)
        return
    for run in decode_runs(tokenizer, ids, is_control):
        opening, closing = BOX if run.kind else ("", "")
        text.append(f"{opening}{shown(run.text)}{closing}", style=f"{style} reverse" if run.kind else style)


def _append_ids(text: "Text", ids: Sequence[int]) -> None:
    if ids:
        text.append(" ".join(map(str, ids)) + "\n", style="cyan")


def decode_runs(tokenizer: "PreTrainedTokenizerBase", ids: list[int], kinds: Sequence[bool | None]) -> list[Run]:
    """Decode tokens in runs of one kind, such as trained on or not; together they are the decoded whole."""
    ends = [end for end in range(1, len(ids)) if kinds[end] != kinds[end - 1]] + [len(ids)]
    runs, done, start = [], "", 0
    for end in ends:
        # A piece decoded alone may lose the blank before its first word.
        text = str(tokenizer.decode(ids[:end], skip_special_tokens=False))
        runs.append(Run(text[len(done) :], kinds[end - 1], ids[start:end]))
        done, start = text, end
    return runs


def shown(text: str) -> str:
    """Make a text fit to be shown: not too long, and nothing in it that a terminal would obey."""
    if len(text) > SHOWN_CHARACTERS:
        half = SHOWN_CHARACTERS // 2
        text = f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"
    return text.translate(VISIBLE)

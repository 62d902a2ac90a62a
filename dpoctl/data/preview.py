"""Rows as the model will see them: what is given dim, what is trained on bright, and in brackets for plain text."""

from typing import TYPE_CHECKING

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

Run = tuple[str, bool]


def mask_preview(store: TokenStore, tokenizer: "PreTrainedTokenizerBase", rows: int = 2) -> "RenderableType":
    """Show the first records, decoded from their tokens.

    Args:
        store: The tokens, and the flags that say which of them are trained on.
        tokenizer: What they were made with.
        rows: How many records.
    """
    from rich.console import Group

    return Group(*(_record(store, tokenizer, index) for index in range(min(rows, len(store)))))


def _record(store: TokenStore, tokenizer: "PreTrainedTokenizerBase", index: int) -> "Text":
    from rich.text import Text

    example, record = store.example(index), store.texts(index)
    text = Text(f"{record.source}:{record.line}\n", style="bold")
    for number, (suffix, flags) in enumerate(zip(example.suffixes, example.suffixes_scored, strict=True)):
        ids = np.concatenate([example.shared, suffix]).tolist()
        scored = np.concatenate([example.shared_scored, flags])
        runs = decode_runs(tokenizer, ids, scored.tolist())
        if number == 0 and not runs[0][1]:
            text.append(f"prompt, {int(scored.argmax()):,} tokens\n", style="bold")
            text.append(shown(runs[0][0]) + "\n", style="dim")
        name = "answer" if len(example.suffixes) == 1 else ("chosen", "rejected")[number] if number < 2 else f"{number}"
        text.append(f"{name}, {int(scored.sum()):,} tokens trained on\n", style="bold")
        for piece, is_scored in runs if runs[0][1] else runs[1:]:
            visible = shown(piece)
            text.append(f"⟦{visible}⟧" if is_scored else visible, style="bright_green" if is_scored else "dim")
        text.append("\n")
    return text


def decode_runs(tokenizer: "PreTrainedTokenizerBase", ids: list[int], scored: list[bool]) -> list[Run]:
    """Decode tokens into runs that are trained on or not; together they are the decoded whole."""
    ends = [end for end in range(1, len(ids)) if scored[end] != scored[end - 1]] + [len(ids)]
    runs, done = [], ""
    for end in ends:
        # A piece decoded alone may lose the blank before its first word.
        text = str(tokenizer.decode(ids[:end], skip_special_tokens=False))
        runs.append((text[len(done) :], scored[end - 1]))
        done = text
    return runs


def shown(text: str) -> str:
    """Make a text fit to be shown: not too long, and nothing in it that a terminal would obey."""
    if len(text) > SHOWN_CHARACTERS:
        half = SHOWN_CHARACTERS // 2
        text = f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"
    return text.translate(VISIBLE)

"""Views of tokenized records for the terminal, and checks of the records of a store.

Tokens that are trained on are bright and in brackets, the others dim.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dpoctl.data.records import Record, Text
from dpoctl.data.rendering import Renderer
from dpoctl.data.store import TokenStore
from dpoctl.data.tokenize import Encoder, Ids
from dpoctl.data.turn_fields import call_texts, is_written

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text as Styled
    from transformers import PreTrainedTokenizerBase

SHOWN_CHARACTERS = 1200
"""The number of characters that are shown of a text; the middle of a longer one is left out."""
VISIBLE = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
VISIBLE |= dict.fromkeys(range(0x7F, 0xA0), "\N{REPLACEMENT CHARACTER}")
"""Control characters in data must not reach the terminal."""
BOX = "⟨", "⟩"
CHECKS = {
    "prompt": "every row starts with the same prompt tokens as at generation time",
    "one_bos": "a row has one beginning-of-sequence token",
    "one_end_of_turn": "the last turn has one end-of-turn token",
    "answer": "the tokens that are trained on hold the answer",
    "stop": "the model's generation_config stops at the last token",
}
"""The checks of a record, and the meaning of a pass."""


class TokenRun(NamedTuple):
    """Consecutive tokens of one kind."""

    text: str
    kind: bool | None
    ids: list[int]


def mask_preview(store: TokenStore, tokenizer: "PreTrainedTokenizerBase", rows: int = 2) -> "RenderableType":
    """Show the first records, decoded by the tokenizer that made their tokens."""
    from rich.console import Group

    return Group(*(show_record(store, tokenizer, index) for index in range(min(rows, len(store)))))


def show_record(
    store: TokenStore,
    tokenizer: "PreTrainedTokenizerBase",
    index: int,
    *,
    boxes: bool = False,
    ids: bool = False,
) -> "Styled":
    """Show one record of a store, decoded by the tokenizer that made its tokens, and the `ids` too if asked.

    `boxes` puts control tokens in boxes, to tell them from text that looks the same.
    """
    from rich.text import Text as Styled

    example, record = store.example(index), store.texts(index)
    control = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder) if boxes else set()
    rows = [
        (np.concatenate([example.shared, suffix]).tolist(), np.concatenate([example.shared_scored, flags]).tolist())
        for suffix, flags in zip(example.suffixes, example.suffixes_scored, strict=True)
    ]
    start = min(len(example.shared), *(scored.index(True) for _, scored in rows))
    text = Styled(f"{record.source}:{record.line}\n", style="bold")
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


def name_of(number: int, count: int) -> str:
    """Name a response by its index among `count`."""
    if count == 1:
        return "answer"
    return ("chosen", "rejected")[number] if number < 2 else f"{number}"


def decode_runs(tokenizer: "PreTrainedTokenizerBase", ids: list[int], kinds: Sequence[bool | None]) -> list[TokenRun]:
    """Decode tokens in runs of one kind, such as trained on or not; together they are the decoded whole."""
    ends = [end for end in range(1, len(ids)) if kinds[end] != kinds[end - 1]] + [len(ids)]
    runs, done, start = [], "", 0
    for end in ends:
        # A run that is decoded alone may lose the blank before its first word.
        text = str(tokenizer.decode(ids[:end], skip_special_tokens=False))
        runs.append(TokenRun(text[len(done) :], kinds[end - 1], ids[start:end]))
        done, start = text, end
    return runs


def shown(text: str) -> str:
    """Shorten a text, and replace its control characters, for the terminal."""
    if len(text) > SHOWN_CHARACTERS:
        half = SHOWN_CHARACTERS // 2
        text = f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"
    return text.translate(VISIBLE)


@dataclass(frozen=True)
class RecordCheck:
    """The checks of one record, and the deviations of the template for its prompt."""

    checks: dict[str, bool | None]
    """Whether the record passes each of `CHECKS`; None if the check does not apply."""
    notes: tuple[str, ...]


class Verifier:
    """Checks the records of a store.

    Args:
        tokenizer: The tokenizer that made their tokens.
        template_kwargs: The recipe's variables of the chat template.
        stops: The ids at which the trained model will stop; None if they are not known.
        loss_on: The turns that are trained on, as in `Renderer`.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        template_kwargs: dict[str, Any],
        stops: Collection[int] | None,
        loss_on: str = "assistant",
    ) -> None:
        self._tokenizer = tokenizer
        self._renderer = Renderer(tokenizer, template_kwargs, loss_on, stops)
        self._encoder = Encoder(tokenizer)
        self._stops = stops

    def verify(self, store: TokenStore, indices: Sequence[int]) -> list[RecordCheck]:
        """Check records, given by their indices in the store."""
        records = [store.texts(index) for index in indices]
        prompts = [self._renderer.render(_prompt_of(record)) for record in records]
        encoded = self._encoder.encode(prompts)
        return [
            RecordCheck(self._checks(store, index, record, ids), rendered.notes)
            for index, record, rendered, (ids, _) in zip(indices, records, prompts, encoded, strict=True)
        ]

    def _checks(self, store: TokenStore, index: int, record: Record, prompt: Ids) -> dict[str, bool | None]:
        example = store.example(index)
        rows = [
            self._row(
                np.concatenate([example.shared, suffix]).tolist(),
                np.concatenate([example.shared_scored, flags]).tolist(),
                prompt,
                response,
            )
            for suffix, flags, response in zip(example.suffixes, example.suffixes_scored, record.responses, strict=True)
        ]
        return {name: None if rows[0][name] is None else all(row[name] for row in rows) for name in CHECKS}

    def _row(self, ids: Ids, scored: list[bool], prompt: Ids, response: Text) -> dict[str, bool | None]:
        if not prompt:
            # The first token of a row is never trained on, as nothing stands before it.
            scored = [True, *scored[1:]]
        spans = [[ids[at] for at in run] for run in _runs(scored)]
        return {
            "prompt": ids[: len(prompt)] == prompt,
            "one_bos": self._begins_once(ids, is_text=isinstance(response, str)),
            "one_end_of_turn": self._ends_once(spans[-1]) and bool(scored[-1]),
            "answer": self._holds(spans, response),
            "stop": None if self._stops is None else scored[-1] and ids[-1] in self._stops,
        }

    def _begins_once(self, ids: Ids, *, is_text: bool) -> bool | None:
        """Judge whether a row has one beginning; None if it has no such token, or marks turns with it."""
        bos = self._encoder.bos
        if bos is None or bos == self._encoder.eos or bos not in ids:
            return None
        marks_turns = self._marks_turns or not is_text
        if marks_turns and ids[0] != bos and not self._encoder.adds_bos:
            return None
        return ids[0] == bos and ids[1:2] != [bos] and (marks_turns or ids.count(bos) == 1)

    @cached_property
    def _marks_turns(self) -> bool:
        """Whether the template writes the beginning-of-sequence token before each turn."""
        return self._renderer.chat.turns.count(str(self._tokenizer.bos_token)) > 1

    def _ends_once(self, span: Ids) -> bool:
        """Whether a turn ends in one token that may end a turn, with nothing but white space before it."""
        ends = {*self._tokenizer.all_special_ids, *self._tokenizer.added_tokens_decoder, *(self._stops or ())}
        before = next((token for token in reversed(span[:-1]) if self._decode([token]).strip()), None)
        is_doubled = before == span[-1] or (self._stops is not None and {before, span[-1]} <= set(self._stops))
        return span[-1] in ends and not is_doubled

    def _holds(self, spans: list[Ids], response: Text) -> bool:
        """Whether the trained spans hold each trained turn, in their order."""
        text, at = "\0".join(map(self._decode, spans)), 0
        for words, values in self._turns(response):
            found = text.find(words, at)
            if found < 0 or not all(is_written(value, text[at:]) for value in values):
                return False
            at = found + len(words)
        return True

    def _turns(self, response: Text) -> Iterator[tuple[str, list[str]]]:
        """Yield the words that each trained turn must hold, without thinking, and the values of its tool calls."""
        if isinstance(response, str):
            yield self._renderer.ends.cut(response)[0].strip(), []
            return
        turns = [message for message in response if message["role"] == "assistant"]
        for turn in turns if self._renderer.loss_on == "assistant" else turns[-1:]:
            if turn.get("weight") != 0:
                words = self._renderer.ends.cut(turn["content"].rpartition("</think>")[2])[0]
                yield words.strip(), list(call_texts(turn))

    def _decode(self, ids: Ids) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _runs(scored: list[bool]) -> list[list[int]]:
    """Group the indices of tokens that are trained on, runs of neighbours together."""
    marked = [at for at, flag in enumerate(scored) if flag]
    starts = [k for k, at in enumerate(marked) if k == 0 or marked[k - 1] != at - 1]
    return [marked[start:end] for start, end in pairwise([*starts, len(marked)])]


def _append_answer(
    text: "Styled",
    tokenizer: "PreTrainedTokenizerBase",
    tokens: list[int],
    scored: list[bool],
    start: int,
    control: set[int],
) -> None:
    """Append the tokens after the first `start`, in brackets where they are trained on."""
    for run in decode_runs(tokenizer, tokens, [None] * start + [*scored[start:]]):
        if run.kind:
            text.append("⟦", style="bright_green")
            _append(text, tokenizer, run.ids, run.text, control, "bright_green")
            text.append("⟧", style="bright_green")
        elif run.kind is not None:
            _append(text, tokenizer, run.ids, run.text, control, "dim")


def _append(
    text: "Styled", tokenizer: "PreTrainedTokenizerBase", ids: list[int], decoded: str, control: set[int], style: str
) -> None:
    """Append decoded tokens, control tokens in boxes."""
    is_control = [token in control for token in ids]
    if not any(is_control):
        text.append(shown(decoded), style=style)
        return
    for run in decode_runs(tokenizer, ids, is_control):
        opening, closing = BOX if run.kind else ("", "")
        text.append(f"{opening}{shown(run.text)}{closing}", style=f"{style} reverse" if run.kind else style)


def _append_ids(text: "Styled", ids: Sequence[int]) -> None:
    if ids:
        text.append(" ".join(map(str, ids)) + "\n", style="cyan")


def _prompt_of(record: Record) -> Record:
    return Record(record.prompt, (), tools=record.tools, template_kwargs=record.template_kwargs)

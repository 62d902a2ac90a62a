"""Tokenized records, looked at from the other side: is what stands in the store what a model should learn?"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dpoctl.data.records import Record, Text
from dpoctl.data.store import TokenStore
from dpoctl.data.template import Renderer
from dpoctl.data.tokenize import Encoder, Ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHECKS = {
    "prompt": "every row starts with the tokens that generation starts from",
    "one_bos": "a row begins once",
    "one_end_of_turn": "the last turn ends once",
    "answer": "what is trained on holds the answer",
    "stop": "the model's generation_config stops at the last token",
}
"""What is looked at, and what it means to pass."""


@dataclass(frozen=True)
class Verdict:
    """One record: which of `CHECKS` it passes, and what the template did to its prompt."""

    checks: dict[str, bool | None]
    """None is: does not apply."""
    notes: tuple[str, ...]


class Verifier:
    """Checks of a store's records.

    Args:
        tokenizer: What the store was made with.
        template_kwargs: Variables of the chat template, of the recipe.
        stops: The ids that the model's generation_config ends a text at, where there is one.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", template_kwargs: dict[str, Any], stops: Collection[int] | None
    ) -> None:
        self._tokenizer = tokenizer
        self._renderer = Renderer(tokenizer, template_kwargs)
        self._encoder = Encoder(tokenizer)
        self._stops = stops

    def verify(self, store: TokenStore, indices: Sequence[int]) -> list[Verdict]:
        """Check records, by their numbers in the store."""
        records = [store.texts(index) for index in indices]
        prompts = [self._renderer.render(_prompt_of(record)) for record in records]
        encoded = self._encoder.encode(prompts)
        return [
            Verdict(self._checks(store, index, record, ids), rendered.notes)
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
        last = len(ids) - next((n for n, flag in enumerate(reversed(scored)) if not flag), len(ids))
        span = ids[last:]
        answer = self._tokenizer.decode(span, skip_special_tokens=False)
        return {
            "prompt": ids[: len(prompt)] == prompt,
            "one_bos": self._begins_once(ids),
            "one_end_of_turn": span[-1] in self._ends and span.count(span[-1]) == 1,
            "answer": _last_words(response) in str(answer),
            "stop": None if self._stops is None else span[-1] in self._stops,
        }

    def _begins_once(self, ids: Ids) -> bool | None:
        bos = self._encoder.bos
        if bos is None or bos == self._encoder.eos or bos not in ids:
            return None
        return ids[0] == bos and ids.count(bos) == 1

    @property
    def _ends(self) -> set[int]:
        return {*self._tokenizer.all_special_ids, *self._tokenizer.added_tokens_decoder, *(self._stops or ())}


def _prompt_of(record: Record) -> Record:
    return Record(record.prompt, (), tools=record.tools, template_kwargs=record.template_kwargs)


def _last_words(response: Text) -> str:
    """What must be found in the last turn: its answer, without white space around it and without thinking."""
    if isinstance(response, str):
        return response.strip()
    turns = [message["content"] for message in response if message["role"] == "assistant"]
    return str(turns[-1]).rpartition("</think>")[2].strip() if turns else ""

"""Records, the meaning of rows: a prompt, its responses, and the pairs of which one beats the other."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

Row = dict[str, Any]
"""A row as it is on disk."""

Message = dict[str, Any]
"""`{"role", "content"}`, and whatever else a chat template may read."""

Text = str | list[Message]
"""Plain text, to which no chat template is applied, or messages, to which one is."""

RowPlace = tuple[int, str, int]
"""The place of a row: the number of its source, the file in it (empty for the source itself), and the line."""


class Reject(Exception):  # noqa: N818 - an outcome of a row, not a failure of the program
    """A row that cannot be used.

    Args:
        reason: One or two words joined by underscores, counted in reports.
        detail: The reason in this row's case.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Record:
    """A prompt with K responses: 1 for a demonstration, 2 for a preference, more for a ranking."""

    prompt: Text
    responses: tuple[Text, ...]
    pairs: tuple[tuple[int, int], ...] = ()
    """(winner, loser), as indices of `responses`."""
    label: bool | None = None
    """Unpaired feedback on the only response."""
    scores: tuple[float, ...] = ()
    """The rating of each response, higher is better; empty where there is none."""
    target: int | None = None
    """The index of the response to imitate, where the row names one."""
    tools: list[dict[str, Any]] = field(default_factory=list)
    """Functions that the chat template lists as callable."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further variables of the chat template, for this row alone."""
    meta: dict[str, Any] = field(default_factory=dict)
    """Facts about the row; conversion keeps them, evaluation groups by them, and training ignores them."""
    source: str = ""
    line: int = 0

    def to_fields(self) -> dict[str, Any]:
        """Return everything but the record's place, as JSON values."""
        fields: dict[str, Any] = {"prompt": self.prompt, "responses": self.responses, "pairs": self.pairs}
        optional = {name: getattr(self, name) for name in _OPTIONAL}
        return fields | {name: value for name, value in optional.items() if value not in (None, (), [], {})}

    @classmethod
    def from_fields(cls, fields: dict[str, Any], *, source: str, line: int) -> "Record":
        """Read the JSON values of `to_fields`."""
        return cls(
            prompt=fields["prompt"],
            responses=tuple(fields["responses"]),
            pairs=tuple((winner, loser) for winner, loser in fields["pairs"]),
            **{name: fields[name] for name in _OPTIONAL & fields.keys() if name != "scores"},
            scores=tuple(fields.get("scores", ())),
            source=source,
            line=line,
        )

    @property
    def topic(self) -> Text:
        """The text by which records are split: the prompt, or the text of a record that has none.

        Records with the same topic stay on one side of a split, and an eval set shares none with the training data.
        """
        return self.prompt or self.responses[0]

    @property
    def best(self) -> int | None:
        """The index of the response to imitate: the target, or the one that beats others and loses to none.

        None where no response or more than one is unbeaten, and where the only one is labelled as bad.
        """
        if self.label is False:
            return None
        if self.target is not None:
            return self.target
        if not self.pairs:
            top = [k for k, score in enumerate(self.scores) if score == max(self.scores)]
            return 0 if len(self.responses) == 1 else (top[0] if len(top) == 1 else None)
        unbeaten = {winner for winner, _ in self.pairs} - {loser for _, loser in self.pairs}
        return unbeaten.pop() if len(unbeaten) == 1 else None

    def preferred(self) -> "Record":
        """Keep only the best response, as a demonstration.

        Raises:
            Reject: There is no best response, or the only one is labelled as bad.
        """
        if self.label is False:
            raise Reject("negative_label", "the completion is labelled as bad")
        if self.best is None:
            raise Reject("no_best_response", "no response is unbeaten, or several are")
        return replace(self, responses=(self.responses[self.best],), pairs=(), scores=(), target=None)


_OPTIONAL = {"label", "scores", "target", "tools", "template_kwargs", "meta"}


def strings_of(*texts: Text) -> Iterator[str]:
    """Yield plain texts, and the contents of messages."""
    for text in texts:
        if isinstance(text, str):
            yield text
        else:
            yield from (message["content"] for message in text)


def squeeze(text: Text) -> str:
    """Reduce runs of white space in a text to single blanks, for comparison only."""
    if isinstance(text, str):
        return " ".join(text.split())
    return "\0".join(json.dumps(message | {"content": squeeze(message["content"])}, sort_keys=True) for message in text)

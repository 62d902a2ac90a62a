"""What a row means once it is understood: a prompt, its responses, and which of them beat which."""

import json
from dataclasses import dataclass, field, replace
from typing import Any

Row = dict[str, Any]
"""A row as it is on disk."""

Message = dict[str, Any]
"""`{"role", "content"}`, and whatever else a chat template may read."""

Text = str | list[Message]
"""Plain text, which never meets a chat template, or messages, which always do."""


class Reject(Exception):  # noqa: N818 - an outcome of a row, not a failure of the program
    """A row that cannot be used.

    Args:
        reason: One or two words joined by underscores, counted in reports.
        detail: What was seen in this row.
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
    """What each response was rated, higher is better; empty where nobody did."""
    target: int | None = None
    """The response that a demonstration of this record would show, where the row says so."""
    tools: list[dict[str, Any]] = field(default_factory=list)
    """What the chat template is told of callable functions."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further variables of the chat template, of this row alone."""
    meta: dict[str, Any] = field(default_factory=dict)
    """What the row says of itself; it survives conversion, and training does not look at it."""
    source: str = ""
    line: int = 0

    def to_fields(self) -> dict[str, Any]:
        """Write what the record means, without where it stood, as JSON values."""
        fields: dict[str, Any] = {"prompt": self.prompt, "responses": self.responses, "pairs": self.pairs}
        optional = {name: getattr(self, name) for name in _OPTIONAL}
        return fields | {name: value for name, value in optional.items() if value not in (None, (), [], {})}

    @classmethod
    def from_fields(cls, fields: dict[str, Any], *, source: str, line: int) -> "Record":
        """Read what `to_fields` wrote."""
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
        """What no split may divide, and no eval set share with the training data.

        It is the prompt; a text without one stands for itself.
        """
        return self.prompt or self.responses[0]

    @property
    def best(self) -> int | None:
        """The response to imitate: the one that the row names, else the one that beats others and loses to none.

        None where no response, or more than one, is unbeaten, and where the only one is labelled as bad.
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
        """Keep the best response alone, as a demonstration.

        Raises:
            Reject: There is no best one; or the only one is labelled as bad.
        """
        if self.label is False:
            raise Reject("negative_label", "the completion is labelled as bad")
        if self.best is None:
            raise Reject("no_best_response", "no response is unbeaten, or several are")
        return replace(self, responses=(self.responses[self.best],), pairs=(), scores=(), target=None)


_OPTIONAL = {"label", "scores", "target", "tools", "template_kwargs"}


def squeeze(text: Text) -> str:
    """Reduce a text to what is left when runs of white space do not count, for comparison only."""
    if isinstance(text, str):
        return " ".join(text.split())
    return "\0".join(json.dumps(message | {"content": squeeze(message["content"])}, sort_keys=True) for message in text)

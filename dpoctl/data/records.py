"""What a row means once it is understood: a prompt, its responses, and which of them beat which."""

import json
from dataclasses import dataclass, replace
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
    source: str = ""
    line: int = 0

    def to_fields(self) -> dict[str, Any]:
        """Write what the record means, without where it stood, as JSON values."""
        return {"prompt": self.prompt, "responses": self.responses, "pairs": self.pairs, "label": self.label}

    @classmethod
    def from_fields(cls, fields: dict[str, Any], *, source: str, line: int) -> "Record":
        """Read what `to_fields` wrote."""
        return cls(
            prompt=fields["prompt"],
            responses=tuple(fields["responses"]),
            pairs=tuple((winner, loser) for winner, loser in fields["pairs"]),
            label=fields["label"],
            source=source,
            line=line,
        )

    def preferred(self) -> "Record":
        """Keep the one response that beats others and is beaten by none, as a demonstration.

        Raises:
            Reject: No response, or more than one, is unbeaten; or the only one is labelled as bad.
        """
        if self.label is False:
            raise Reject("negative_label", "the completion is labelled as bad")
        if not self.pairs:
            return self
        best = {winner for winner, _ in self.pairs} - {loser for _, loser in self.pairs}
        if len(best) != 1:
            raise Reject("no_best_response", f"{len(best)} responses are unbeaten")
        return replace(self, responses=(self.responses[best.pop()],), pairs=())


def squeeze(text: Text) -> str:
    """Reduce a text to what is left when runs of white space do not count, for comparison only."""
    if isinstance(text, str):
        return " ".join(text.split())
    return "\0".join(json.dumps(message | {"content": squeeze(message["content"])}, sort_keys=True) for message in text)

"""Writing a record as rows that any trainer reads."""

from typing import Any

from dpoctl.data.formats.parts import FIRST_WINS
from dpoctl.data.records import Message, Record, Row


def canonical_rows(record: Record, *, split: bool = True) -> list[Row]:
    """Write a record as the rows that any trainer reads; plain text stays plain text.

    Args:
        record: What is written.
        split: Write one `prompt`, `chosen`, `rejected` row a pair; else a ranking is one row.

    Returns:
        Rows that mean the record. The margin of a pair whose responses are rated is in `meta`.
    """
    carried = {"tools": record.tools, "chat_template_kwargs": record.template_kwargs}
    rows = []
    for row in _rows(record, split=split):
        extras = carried | {"meta": record.meta | row.pop("meta", {})}
        rows.append(row | {name: value for name, value in extras.items() if value})
    return rows


def _rows(record: Record, *, split: bool) -> list[Row]:
    if record.pairs and (split or _is_bare_pair(record)):
        return [_pair_row(record, winner, loser) for winner, loser in record.pairs]
    if len(record.responses) > 1 or record.scores:
        return [_ranking_row(record)]
    (completion,) = record.responses
    if record.label is None and not isinstance(record.prompt, str) and not isinstance(completion, str):
        if not _has_answer(record.prompt):
            return [{"messages": record.prompt + completion}]
    elif record.prompt == "":
        return [{"text": completion}]
    label: Row = {} if record.label is None else {"label": record.label}
    return [{"prompt": record.prompt, "completion": completion} | label]


def _has_answer(prompt: list[Message]) -> bool:
    """Whether a prompt holds an answer, which would be learned in a row of messages alone."""
    roles = [message["role"] for message in prompt]
    asked = next((index for index, role in enumerate(roles) if role in ("user", "tool")), 0)
    return "assistant" in roles[asked:]


def _is_bare_pair(record: Record) -> bool:
    return record.pairs == FIRST_WINS and len(record.responses) == 2 and not record.scores and record.target is None


def _pair_row(record: Record, winner: int, loser: int) -> Row:
    row: Row = {"prompt": record.prompt, "chosen": record.responses[winner], "rejected": record.responses[loser]}
    if record.scores:
        margin = record.scores[winner] - record.scores[loser]
        tie = {"tie": margin == 0} if "tie" in record.meta else {}
        row["meta"] = {"margin": margin} | tie
    return row


def _ranking_row(record: Record) -> Row:
    optional: dict[str, Any] = {
        "pairs": [list(pair) for pair in record.pairs],
        "scores": list(record.scores),
        "sft_target": record.target,
    }
    given = {name: value for name, value in optional.items() if value not in (None, [])}
    return {"prompt": record.prompt, "responses": list(record.responses)} | given

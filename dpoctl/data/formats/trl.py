"""The canonical formats, which are read and written: the types of TRL, and rankings."""

from collections.abc import Iterable
from typing import Any, TypeGuard

from dpoctl.data.formats.common import (
    FIRST_WINS,
    checked,
    columns,
    compare_conversations,
    number,
    preference,
    same_kind,
    text_columns,
)
from dpoctl.data.messages import SHAPE, check_answer, read_messages, read_text, through_answer
from dpoctl.data.records import Message, Record, Reject, Row, Text

SYNONYMS = {
    "prompt": ("question", "instruction", "input", "query"),
    "chosen": ("preferred", "winner", "response_chosen", "better"),
    "rejected": ("dispreferred", "loser", "response_rejected", "worse"),
}
"""Other names for the columns of a preference."""


def trl_explicit(row: Row) -> Record:
    """TRL's preference type: `prompt`, `chosen`, `rejected`, each text or messages."""
    values = columns(row, "prompt", "chosen", "rejected")
    prompt, chosen, rejected = map(read_text, values, ("prompt", "chosen", "rejected"))
    if isinstance(prompt, str) and _is_conversation(chosen) and _is_conversation(rejected):
        return _named_prompt(prompt, chosen, rejected)
    prompt, (chosen, rejected) = same_kind(prompt, (chosen, rejected))
    return preference(prompt, chosen, rejected)


def trl_implicit(row: Row) -> Record:
    """TRL's preference type without `prompt`: two conversations, whose common first messages are the prompt."""
    chosen, rejected = columns(row, "chosen", "rejected")
    if "prompt" in row:
        raise Reject(SHAPE, "a prompt of its own")
    if isinstance(chosen, str) and isinstance(rejected, str):
        raise Reject(SHAPE, "chosen and rejected are plain texts without a prompt, and no transcripts; give a prompt")
    return compare_conversations(read_messages(chosen, "chosen"), read_messages(rejected, "rejected"))


def ranking(row: Row) -> Record:
    """Several responses: `prompt`, `responses`, and `pairs` of [winner, loser] indices or `scores`, or both.

    `sft_target` is the response to imitate, or its index.
    """
    prompt, responses = columns(row, "prompt", "responses")
    if not isinstance(responses, list) or not ("pairs" in row or "scores" in row):
        raise Reject(SHAPE, "needs a list of responses, and pairs or scores")
    pairs, scores = row.get("pairs", []), row.get("scores", [])
    if (
        not isinstance(pairs, list)
        or not all(_is_pair(pair, len(responses)) for pair in pairs)
        or not (pairs or scores)
    ):
        raise Reject("bad_pairs", f"pairs must be [winner, loser] indices of {len(responses)} responses")
    if scores and (not isinstance(scores, list) or len(scores) != len(responses)):
        raise Reject("bad_scores", f"scores must be one number for each of {len(responses)} responses")
    prompt, answers = same_kind(
        read_text(prompt, "prompt"), [read_text(answer, f"response {k}") for k, answer in enumerate(responses)]
    )
    return checked(
        Record(
            prompt,
            answers,
            tuple((winner, loser) for winner, loser in pairs),
            scores=tuple(number(score, "a score") for score in scores),
            target=_target(row.get("sft_target"), responses),
        )
    )


def messages(row: Row) -> Record:
    """A conversation to imitate: `messages`; those of the assistant are trained on."""
    (turns,) = columns(row, "messages")
    turns = through_answer(read_messages(turns, "messages"))
    first = _first_answer(turns)
    if first is None:
        raise Reject("no_assistant_turn")
    return checked(Record(turns[:first], (turns[first:],)))


def prompt_completion(row: Row) -> Record:
    """A prompt and one completion, each text or messages; with `label`, unpaired feedback on it."""
    prompt, completion = columns(row, "prompt", "completion")
    label = row.get("label")
    if label is not None and not isinstance(label, bool):
        raise Reject("bad_label", f"label is {label!r}, not true or false")
    prompt, answers = same_kind(read_text(prompt, "prompt"), (read_text(completion, "completion"),))
    return checked(Record(prompt, answers, label=label))


def text(row: Row) -> Record:
    """Plain text, with its markers if it has any: `text`; all of it is trained on."""
    (text,) = text_columns(row, "text")
    check_answer(text, "the text")
    return Record("", (text,))


def generic(row: Row) -> Record:
    """A preference under other names: exactly one column each can be the prompt, chosen and rejected."""
    found = synonyms(row)
    if any(len(names) != 1 for names in found.values()) or all(names == [name] for name, names in found.items()):
        raise Reject(SHAPE, "not one column each that can be the prompt, chosen and rejected")
    return trl_explicit({name: row[column] for name, (column,) in found.items()})


def synonyms(names: Iterable[str]) -> dict[str, list[str]]:
    """Find the columns that can be `prompt`, `chosen` and `rejected`; a column with the name itself excludes others."""
    present = set(names)
    return {
        name: [name] if name in present else [column for column in others if column in present]
        for name, others in SYNONYMS.items()
    }


def canonical_rows(record: Record, *, split: bool = True) -> list[Row]:
    """Write a record as canonical rows; plain text stays plain text.

    `split` gives one `prompt`, `chosen`, `rejected` row a pair, and otherwise a ranking is one row. The row of a pair
    with scores holds its margin in `meta`.
    """
    carried = {"tools": record.tools, "chat_template_kwargs": record.template_kwargs}
    rows = []
    for row in _rows(record, split=split):
        extras = carried | {"meta": record.meta | row.pop("meta", {})}
        rows.append(row | {name: value for name, value in extras.items() if value})
    return rows


def _target(value: Any, responses: list[Any]) -> int | None:
    if value is None:
        return None
    if value in responses:
        return responses.index(value)
    if type(value) is not int or not 0 <= value < len(responses):
        raise Reject("bad_target", f"sft_target is not one of the {len(responses)} responses, nor its index")
    return value


def _is_pair(pair: Any, num_responses: int) -> bool:
    return (
        isinstance(pair, list)
        and len(pair) == 2
        and all(type(index) is int and 0 <= index < num_responses for index in pair)
        and pair[0] != pair[1]
    )


def _is_conversation(answer: Text) -> TypeGuard[list[Message]]:
    """Check that an answer is a conversation that starts with the prompt."""
    return not isinstance(answer, str) and bool(answer) and answer[0]["role"] != "assistant"


def _named_prompt(prompt: str, chosen: list[Message], rejected: list[Message]) -> Record:
    record = compare_conversations(chosen, rejected)
    if not any(isinstance(turn, dict) and turn["content"].strip() == prompt.strip() for turn in record.prompt):
        raise Reject("prompts_differ", "the text in prompt is no message of chosen and rejected")
    return record


def _rows(record: Record, *, split: bool) -> list[Row]:
    if record.pairs and (split or _is_bare_pair(record)):
        return [_pair_row(record, winner, loser) for winner, loser in record.pairs]
    if len(record.responses) > 1 or record.scores:
        return [_ranking_row(record)]
    (completion,) = record.responses
    if record.label is None and not isinstance(record.prompt, str) and not isinstance(completion, str):
        # An answer in the prompt would be trained on if the row were messages.
        if _first_answer(record.prompt) is None:
            return [{"messages": record.prompt + completion}]
    elif record.prompt == "":
        return [{"text": completion}]
    label: Row = {} if record.label is None else {"label": record.label}
    return [{"prompt": record.prompt, "completion": completion} | label]


def _first_answer(turns: list[Message]) -> int | None:
    """Find the assistant's first turn that is trained on, at which the prompt ends; None if there is none.

    A greeting before the first user turn is part of the prompt, since it answers nothing.
    """
    asked = next((index for index, turn in enumerate(turns) if turn["role"] in ("user", "tool")), 0)
    return next((index for index in range(asked, len(turns)) if turns[index]["role"] == "assistant"), None)


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

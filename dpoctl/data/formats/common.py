"""Functions that formats share: look up columns, build conversations, check records.

All of them raise `Reject` for a row that cannot be used.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dpoctl.data.messages import (
    SHAPE,
    check_answer,
    check_different,
    check_prompt,
    read_messages,
    shape_of,
    shared_turns,
    through_answer,
    until_user,
    without_nulls,
)
from dpoctl.data.readers.json_lines import read_cell
from dpoctl.data.records import Message, Record, Reject, Row, Text

FIRST_WINS = ((0, 1),)
"""The pairs of a record whose first of two responses was preferred."""

COMMON_COLUMNS = {"images", "tools", "chat_template_kwargs", "meta"}
"""Columns that any format may have."""

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}


class MissingColumns(Reject):
    """A row that lacks columns of a format, and so is not in it, and the columns of the format that it has."""

    def __init__(self, missing: Sequence[str], found: Sequence[str]) -> None:
        # Readers drop nulls and empty cells: they cannot be told from columns that are not there.
        *others, last = map(repr, missing)
        names = f"columns {', '.join(others)} and {last} are" if others else f"column {last} is"
        super().__init__(SHAPE, f"{names} missing or empty")
        self.missing = missing
        self.found = found


def columns(row: Row, *names: str) -> tuple[Any, ...]:
    """Look up columns that a format needs; a row without one of them is not in the format."""
    missing = [name for name in names if name not in row]
    if missing:
        raise MissingColumns(missing, [name for name in names if name in row])
    return tuple(row[name] for name in names)


def text_columns(row: Row, *names: str) -> tuple[str, ...]:
    """Look up columns that a format needs as text; a row without one of them is not in the format."""
    values = columns(row, *names)
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, str):
            raise Reject(SHAPE, f"{name} is {shape_of(value)}, not text")
    return values


def number(value: Any, name: str) -> float:
    """Read a finite number, which a CSV file holds as text."""
    try:
        result = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        result = math.nan
    if not math.isfinite(result):
        raise Reject("bad_score", f"{name} is {value!r}, not a number")
    return result


def user(text: str) -> Message:
    """Build a message of the user."""
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    """Build a message of the assistant."""
    return {"role": "assistant", "content": text}


def question(text: str, system: str | None = None) -> list[Message]:
    """Build the prompt of one question; a blank system message is left out."""
    if not text.strip():
        raise Reject("empty_prompt")
    return [*system_turn(system), user(text)]


def system_turn(text: str | None) -> list[Message]:
    """Build the system message of a column; empty where the column is blank."""
    return [{"role": "system", "content": text}] if isinstance(text, str) and text.strip() else []


def same_kind(prompt: Text, answers: Sequence[Text]) -> tuple[Text, tuple[Text, ...]]:
    """Leave a prompt and answers as they are if all are plain text; else make all of them messages."""
    if isinstance(prompt, str) and all(isinstance(answer, str) for answer in answers):
        return prompt, tuple(answers)
    messages = [user(prompt)] if isinstance(prompt, str) else prompt
    return messages, tuple(_answer_to(messages, answer) for answer in answers)


def read_sharegpt(value: Any, name: str) -> list[Message]:
    """Read a list of `{"from", "value"}` turns as messages."""
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise Reject(SHAPE, f"{name} is not a list of turns")
    if not all(isinstance(turn.get("from"), str) for turn in value):
        raise Reject(SHAPE, f"{name}: a turn without 'from'")
    turns = []
    for turn in value:
        message: Message = {"role": SHAREGPT_ROLES.get(turn["from"], turn["from"]), "content": turn.get("value")}
        if turn["from"] == "function_call":
            message |= {"content": "", "tool_calls": _tool_calls(turn.get("value"), name)}
        turns.append(message)
    return read_messages(turns, name)


def read_weighted(value: Any, name: str) -> list[Message]:
    """Read messages with a `loss_weight`, which is 0 where they are not trained on."""
    messages = read_messages(value, name)
    for message in messages:
        if message.pop("loss_weight", 1) == 0 and message["role"] == "assistant":
            message["weight"] = 0
    return messages


def preference(prompt: Text, chosen: Text, rejected: Text, scores: tuple[float, ...] = ()) -> Record:
    """Build the record of one pair."""
    return checked(Record(prompt, (chosen, rejected), FIRST_WINS, scores=scores))


def compare_answers(prompt: list[Message], chosen: str, rejected: str, scores: tuple[float, ...] = ()) -> Record:
    """Build the record of two texts that answer a conversation; see `preference`."""
    return preference(prompt, [assistant(chosen)], [assistant(rejected)], scores)


def compare_conversations(chosen: list[Message], rejected: list[Message], *, first_only: bool = False) -> Record:
    """Build the record of two conversations: the first messages, which they share, are the prompt, the rest answers.

    `first_only` leaves out the messages after the first answers that differ.
    """
    index = shared_turns(chosen, rejected)
    if index == len(chosen) == len(rejected):
        raise Reject("identical_answers")
    if any(side[index : index + 1] and side[index]["role"] != "assistant" for side in (chosen, rejected)):
        raise Reject("prompts_differ", f"message {index + 1} is not the assistant's on both sides")
    answer = until_user if first_only else through_answer
    return preference(chosen[:index], answer(chosen[index:]), answer(rejected[index:]))


def by_strength(prompt: list[Message], answers: tuple[str, str], strength: float) -> Record:
    """Build the record of two answers; the second is better by `strength`, or the first where that is negative."""
    scores = (max(0.0 - strength, 0.0), max(strength, 0.0))
    return checked(Record(prompt, tuple([assistant(answer)] for answer in answers), scores=scores))


def winner_index(value: Any, name: str) -> int:
    """Read the index of the winner of two answers, 0 or 1."""
    if value not in (0, 1, "0", "1"):
        raise Reject("bad_winner", f"{name} is {value!r}, not 0 or 1")
    return int(value)


def checked(record: Record) -> Record:
    """Return a record whose prompt can be answered, whose answers hold text, and whose pairs are of two answers."""
    check_prompt(record.prompt)
    for answer, name in zip(record.responses, _names(record), strict=True):
        check_answer(answer, name)
    for winner, loser in record.pairs:
        check_different(record.responses[winner], record.responses[loser])
    return record


def add_common_columns(row: Row, record: Record) -> Record:
    """Add the columns that any format may have: `tools`, `chat_template_kwargs` and `meta`."""
    if row.keys().isdisjoint(COMMON_COLUMNS):
        return record
    if row.get("images"):
        raise Reject("unsupported_column", "images")
    tools, variables, meta = _parsed(row, "tools", list), _parsed(row, "chat_template_kwargs", dict), row.get("meta")
    if isinstance(record.prompt, str) and (tools or variables):
        name = "tools" if tools else "chat_template_kwargs"
        raise Reject("unsupported_column", f"{name}: the row is plain text, which no chat template is applied to")
    return replace(
        record,
        tools=tools or record.tools,
        template_kwargs=variables or record.template_kwargs,
        meta=record.meta | meta if isinstance(meta, dict) else record.meta,
    )


def _answer_to(prompt: list[Message], answer: Text) -> list[Message]:
    """Make messages of an answer, without the prompt if it repeats that."""
    if isinstance(answer, str):
        return [assistant(answer)]
    return answer[len(prompt) :] if answer[: len(prompt)] == prompt else answer


def _names(record: Record) -> list[str]:
    if len(record.responses) == 1:
        return ["the answer"]
    if record.pairs == FIRST_WINS and len(record.responses) == 2:
        return ["chosen", "rejected"]
    return [f"answer {k}" for k in range(len(record.responses))]


def _parsed(row: Row, name: str, kind: type) -> Any:
    """Read a column of objects, or of their JSON text, as files with one fixed schema hold them."""
    value = row.get(name) or kind()
    value = read_cell(value, name) if isinstance(value, str) else without_nulls(value)
    objects = value if isinstance(value, list) else [value]
    if not isinstance(value, kind) or not all(isinstance(item, dict) for item in objects):
        raise Reject("bad_column", f"{name} is not {'an object' if kind is dict else 'a list of objects'}")
    return value


def _tool_calls(value: Any, name: str) -> list[Message]:
    if not isinstance(value, str):
        raise Reject("bad_tool_call", f"{name}: a function_call that is {shape_of(value)}, not JSON text")
    calls = read_cell(value, f"{name}: a function_call", "bad_tool_call")
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise Reject("bad_tool_call", f"{name}: a function_call without a name")
    return [
        {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
        for call in calls
    ]

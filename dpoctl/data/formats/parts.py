"""What the functions of formats share: looking columns up, building conversations, checking records."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dpoctl.data.conversation import (
    SHAPE,
    check_answer,
    check_different,
    check_prompt,
    read_messages,
    shared_turns,
    through_answer,
    until_user,
    without_nulls,
)
from dpoctl.data.records import Message, Record, Reject, Row, Text

FIRST_WINS = ((0, 1),)
"""The pairs of two responses of which the first was preferred."""

CARRIED = {"images", "tools", "chat_template_kwargs", "meta"}
"""Columns that any format may have."""

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}


class MissingColumns(Reject):
    """A row that lacks columns of a format, and so is not in it.

    Args:
        missing: The columns that it lacks.
        found: The ones that it has.
    """

    def __init__(self, missing: Sequence[str], found: Sequence[str]) -> None:
        super().__init__(SHAPE, f"no column {', '.join(map(repr, missing))}")
        self.missing = missing
        self.found = found

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.missing, self.found)


def columns(row: Row, *names: str) -> tuple[Any, ...]:
    """Look columns up that a format cannot do without.

    Raises:
        MissingColumns: One is absent, so the row is not in the format.
    """
    missing = [name for name in names if name not in row]
    if missing:
        raise MissingColumns(missing, [name for name in names if name in row])
    return tuple(row[name] for name in names)


def text_columns(row: Row, *names: str) -> tuple[str, ...]:
    """Look columns of text up that a format cannot do without.

    Raises:
        Reject: One is absent or is no text, so the row is not in the format.
    """
    values = columns(row, *names)
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, str):
            raise Reject(SHAPE, f"{name} is not text")
    return values


def number(value: Any, name: str) -> float:
    """Read a number, which a CSV file holds as text.

    Raises:
        Reject: It is not one, or not finite.
    """
    try:
        result = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        result = math.nan
    if not math.isfinite(result):
        raise Reject("bad_score", f"{name} is {value!r}, not a number")
    return result


def user(text: str) -> Message:
    """A turn of the user."""
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    """A turn of the assistant."""
    return {"role": "assistant", "content": text}


def question(text: str, system: str | None = None) -> list[Message]:
    """Build the prompt of one question; a blank system message is none.

    Raises:
        Reject: The question is blank.
    """
    if not text.strip():
        raise Reject("empty_prompt")
    return [*system_turn(system), user(text)]


def system_turn(text: str | None) -> list[Message]:
    """The system message that a column holds, or none where it is blank."""
    return [{"role": "system", "content": text}] if isinstance(text, str) and text.strip() else []


def conversation(text: Text) -> list[Message]:
    """Take plain text for the user's one turn."""
    return [user(text)] if isinstance(text, str) else text


def answer_to(prompt: list[Message], answer: Text) -> list[Message]:
    """Make messages of an answer, without the prompt that it may repeat."""
    if isinstance(answer, str):
        return [assistant(answer)]
    return answer[len(prompt) :] if answer[: len(prompt)] == prompt else answer


def same_kind(prompt: Text, answers: Sequence[Text]) -> tuple[Text, tuple[Text, ...]]:
    """Leave a prompt and answers as they are if all are plain text; else make all of them messages."""
    if isinstance(prompt, str) and all(isinstance(answer, str) for answer in answers):
        return prompt, tuple(answers)
    messages = conversation(prompt)
    return messages, tuple(answer_to(messages, answer) for answer in answers)


def read_sharegpt(value: Any, name: str) -> list[Message]:
    """Read a list of `{"from", "value"}` turns as messages.

    Raises:
        Reject: It is not such a list, a role is unknown, or a function call is not JSON.
    """
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
    """Read messages of which `loss_weight` says whether they are learned.

    Raises:
        Reject: It is not a list of messages.
    """
    messages = read_messages(value, name)
    for message in messages:
        if message.pop("loss_weight", 1) == 0 and message["role"] == "assistant":
            message["weight"] = 0
    return messages


def preference(prompt: Text, chosen: Text, rejected: Text, scores: tuple[float, ...] = ()) -> Record:
    """Build the record of one comparison.

    Raises:
        Reject: There is nothing to learn from it.
    """
    return checked(Record(prompt, (chosen, rejected), FIRST_WINS, scores=scores))


def compare_answers(prompt: list[Message], chosen: str, rejected: str, scores: tuple[float, ...] = ()) -> Record:
    """Build the record of two texts that answer a conversation; see `preference`."""
    return preference(prompt, [assistant(chosen)], [assistant(rejected)], scores)


def compare_conversations(chosen: list[Message], rejected: list[Message], *, first_only: bool = False) -> Record:
    """Build the record of two whole conversations: what they share is the prompt, all that follows are the answers.

    Args:
        chosen: The better one.
        rejected: The other.
        first_only: Leave out what follows the first answers that differ.

    Raises:
        Reject: They part at a turn that is not the assistant's, or there is nothing to learn from them.
    """
    index = shared_turns(chosen, rejected)
    if index == len(chosen) == len(rejected):
        raise Reject("identical_answers")
    if any(side[index : index + 1] and side[index]["role"] != "assistant" for side in (chosen, rejected)):
        raise Reject("prompts_differ", f"message {index + 1} is not the assistant's on both sides")
    answer = until_user if first_only else through_answer
    return preference(chosen[:index], answer(chosen[index:]), answer(rejected[index:]))


def by_strength(prompt: list[Message], answers: tuple[str, str], strength: float) -> Record:
    """Build the record of two answers and how much better the second is; below zero, the first is.

    Raises:
        Reject: There is nothing to learn from it.
    """
    scores = (max(0.0 - strength, 0.0), max(strength, 0.0))
    return checked(Record(prompt, tuple([assistant(answer)] for answer in answers), scores=scores))


def which_of_two(value: Any, name: str) -> int:
    """Read which of two answers won.

    Raises:
        Reject: It is neither 0 nor 1.
    """
    if value not in (0, 1, "0", "1"):
        raise Reject("bad_winner", f"{name} is {value!r}, not 0 or 1")
    return int(value)


def checked(record: Record) -> Record:
    """Pass a record on that can be trained on.

    Raises:
        Reject: The prompt cannot be answered, an answer is empty, or two that are compared are the same.
    """
    check_prompt(record.prompt)
    for answer, name in zip(record.responses, _names(record), strict=True):
        check_answer(answer, name)
    for winner, loser in record.pairs:
        check_different(record.responses[winner], record.responses[loser])
    return record


def carry(row: Row, record: Record) -> Record:
    """Add the columns that any format may have: `tools`, `chat_template_kwargs` and `meta`.

    Raises:
        Reject: One does not hold what it should, or would change what is trained on and cannot.
    """
    if row.keys().isdisjoint(CARRIED):
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


def _names(record: Record) -> list[str]:
    if len(record.responses) == 1:
        return ["the answer"]
    if record.pairs == FIRST_WINS and len(record.responses) == 2:
        return ["chosen", "rejected"]
    return [f"answer {k}" for k in range(len(record.responses))]


def _parsed(row: Row, name: str, kind: type) -> Any:
    """Read a column of JSON values, or of the text of one, whose values nobody can know in advance."""
    value = row.get(name) or kind()
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise Reject("bad_column", f"{name} is not JSON: {error.msg}") from error
    else:
        value = without_nulls(value)
    objects = value if isinstance(value, list) else [value]
    if not isinstance(value, kind) or not all(isinstance(item, dict) for item in objects):
        raise Reject("bad_column", f"{name} is not {'an object' if kind is dict else 'a list of objects'}")
    return value


def _tool_calls(value: Any, name: str) -> list[Message]:
    try:
        calls = json.loads(value)
    except (TypeError, json.JSONDecodeError) as error:
        raise Reject("bad_tool_call", f"{name}: a function_call that is not JSON") from error
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise Reject("bad_tool_call", f"{name}: a function_call without a name")
    return [
        {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
        for call in calls
    ]

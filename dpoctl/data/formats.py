"""Data formats: one function from a row to a record, one line in `FORMATS`, most specific first.

A function raises `Reject(SHAPE, ...)` for a row that is not in its format at all, which is what `detect`
goes by, and `Reject` with any other reason for a row that is, and cannot be used.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from dpoctl.data.conversation import (
    SHAPE,
    check_answer,
    check_different,
    check_prompt,
    read_messages,
    read_text,
    shared_turns,
    until_user,
)
from dpoctl.data.records import Message, Record, Reject, Row, Text
from dpoctl.errors import DataError

TURN = re.compile(r"\n\n(Human|Assistant):")
UNSUPPORTED = ("tools", "images", "chat_template_kwargs")
"""Columns that would change what is trained on, and are not read."""

Pair = tuple[Text, Text]


def hh(row: Row) -> Record:
    """Anthropic HH: `chosen` and `rejected` are whole transcripts, split at the two markers and nowhere else.

    The record is plain text: the prompt is the transcript through the last `Assistant:`, the answers are
    the remainders. Where the histories differ, the pair is cut at the first turn that does.
    """
    chosen, rejected = _pair_columns(row)
    if "prompt" in row or not all(
        isinstance(side, str) and side.startswith("\n\nHuman:") for side in (chosen, rejected)
    ):
        raise Reject(SHAPE, r"chosen and rejected are not transcripts that start with \n\nHuman:")
    sides = [_turns(side) for side in (chosen, rejected)]
    for name, turns in zip(("chosen", "rejected"), sides, strict=True):
        if turns[-1][0] != "Assistant":
            raise Reject("no_final_answer", f"{name} ends with a Human turn")
    histories = [turns[:-1] for turns in sides]
    index = len(histories[0]) if histories[0] == histories[1] else shared_turns(*sides)
    if any(len(turns) <= index or turns[index][0] != "Assistant" for turns in sides):
        raise Reject("prompts_differ", f"turn {index + 1} is not the Assistant's on both sides")
    history = "".join(f"\n\n{role}:{text}" for role, text in sides[0][:index])
    return _preference(f"{history}\n\nAssistant:", (sides[0][index][1], sides[1][index][1]))


def trl_explicit(row: Row) -> Record:
    """TRL's preference type: `prompt`, `chosen`, `rejected`, each text or messages."""
    sides = _pair_columns(row)
    if "prompt" not in row:
        raise Reject(SHAPE, "no column 'prompt'")
    prompt = read_text(row["prompt"], "prompt")
    chosen, rejected = (read_text(side, name) for side, name in zip(sides, ("chosen", "rejected"), strict=True))
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        return _preference(prompt, (chosen, rejected))
    if isinstance(prompt, str) and _starts_with_prompt(chosen) and _starts_with_prompt(rejected):
        return _named_prompt(prompt, chosen, rejected)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return _preference(messages, (_answer(chosen, messages), _answer(rejected, messages)))


def trl_implicit(row: Row) -> Record:
    """TRL's preference type without `prompt`: two conversations, whose shared leading messages are the prompt."""
    chosen, rejected = _pair_columns(row)
    if "prompt" in row:
        raise Reject(SHAPE, "a prompt of its own")
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise Reject(
            "no_prompt", "where the prompt ends cannot be told from two plain texts; give a prompt, or messages"
        )
    return _split_shared(read_messages(chosen, "chosen"), read_messages(rejected, "rejected"))


def ranking(row: Row) -> Record:
    """Several responses: `prompt`, `responses`, and `pairs` of [winner, loser] indices."""
    responses, pairs = row.get("responses"), row.get("pairs")
    if "prompt" not in row or not isinstance(responses, list) or not isinstance(pairs, list):
        raise Reject(SHAPE, "needs the columns prompt, responses and pairs")
    if not pairs or not all(_is_pair(pair, len(responses)) for pair in pairs):
        raise Reject("bad_pairs", f"pairs must be [winner, loser] indices of {len(responses)} responses")
    prompt = read_text(row["prompt"], "prompt")
    answers = tuple(read_text(answer, f"response {k}") for k, answer in enumerate(responses))
    if not isinstance(prompt, str) or not all(isinstance(answer, str) for answer in answers):
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        answers = tuple(_answer(answer, prompt) for answer in answers)
    return _checked(Record(prompt, answers, tuple((winner, loser) for winner, loser in pairs)))


def messages(row: Row) -> Record:
    """A conversation to imitate: `messages`, of which the assistant's are learned."""
    if "messages" not in row:
        raise Reject(SHAPE, "no column 'messages'")
    turns = read_messages(row["messages"], "messages")
    while turns and turns[-1]["role"] != "assistant":
        turns = turns[:-1]
    if not turns:
        raise Reject("no_assistant_turn")
    # An assistant's greeting before the first user turn is part of the prompt: nothing asked for it.
    asked = next((index for index, turn in enumerate(turns) if turn["role"] in ("user", "tool")), 0)
    first = next((index for index in range(asked, len(turns)) if turns[index]["role"] == "assistant"), 0)
    return _checked(Record(turns[:first], (turns[first:],)))


def prompt_completion(row: Row) -> Record:
    """A prompt and one completion, each text or messages; with `label`, unpaired feedback on it."""
    if "prompt" not in row or "completion" not in row:
        raise Reject(SHAPE, "needs the columns prompt and completion")
    label = row.get("label")
    if label is not None and not isinstance(label, bool):
        raise Reject("bad_label", f"label is {label!r}, not true or false")
    prompt, completion = read_text(row["prompt"], "prompt"), read_text(row["completion"], "completion")
    if not (isinstance(prompt, str) and isinstance(completion, str)):
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        completion = _answer(completion, prompt)
    return _checked(Record(prompt, (completion,), label=label))


FORMATS: dict[str, Callable[[Row], Record]] = {
    "hh": hh,
    "trl-explicit": trl_explicit,
    "ranking": ranking,
    "trl-implicit": trl_implicit,
    "prompt-completion": prompt_completion,
    "messages": messages,
}


def read(name: str, row: Row) -> Record:
    """Read a row in a format of `FORMATS`.

    Raises:
        Reject: The row cannot be used.
    """
    for column in UNSUPPORTED:
        if row.get(column):
            raise Reject("unsupported_column", column)
    return FORMATS[name](row)


def detect(rows: Sequence[Row]) -> tuple[str, str]:
    """Find the format of a file by its first rows.

    Returns:
        The first format of `FORMATS` that nine of ten rows are in, and the evidence in words.

    Raises:
        DataError: No format fits.
    """
    for name, function in FORMATS.items():
        fits = sum(_fits(function, row) for row in rows)
        if fits >= 0.9 * len(rows) > 0:
            columns = ", ".join(sorted(set[str]().union(*rows)))
            return name, f"{fits} of the first {len(rows)} rows fit; columns {columns}"
    columns = ", ".join(sorted(set[str]().union(*rows))) or "none"
    raise DataError(
        f"no known format fits the columns {columns}",
        hint=f"formats are {', '.join(FORMATS)}; column_map gives columns their canonical names",
    )


def canonical_row(record: Record) -> Row:
    """Write a record as the row that any trainer reads; plain text stays plain text."""
    if record.pairs == ((0, 1),) and len(record.responses) == 2:
        return {"prompt": record.prompt, "chosen": record.responses[0], "rejected": record.responses[1]}
    if record.pairs:
        return {"prompt": record.prompt, "responses": list(record.responses), "pairs": list(map(list, record.pairs))}
    completion = record.responses[0]
    if record.label is None and not isinstance(record.prompt, str) and not isinstance(completion, str):
        return {"messages": record.prompt + completion}
    row: Row = {"prompt": record.prompt, "completion": completion}
    return row if record.label is None else row | {"label": record.label}


def _fits(function: Callable[[Row], Record], row: Row) -> bool:
    try:
        function(row)
    except Reject as reject:
        return reject.reason != SHAPE
    return True


def _pair_columns(row: Row) -> tuple[Any, Any]:
    for column in ("chosen", "rejected"):
        if column not in row:
            raise Reject(SHAPE, f"no column {column!r}")
    return row["chosen"], row["rejected"]


def _turns(transcript: str) -> list[tuple[str, str]]:
    pieces = TURN.split(transcript)[1:]
    return list(zip(pieces[::2], pieces[1::2], strict=True))


def _is_pair(pair: Any, num_responses: int) -> bool:
    return (
        isinstance(pair, list)
        and len(pair) == 2
        and all(type(index) is int and 0 <= index < num_responses for index in pair)
        and pair[0] != pair[1]
    )


def _starts_with_prompt(answer: Text) -> bool:
    return not isinstance(answer, str) and bool(answer) and answer[0]["role"] != "assistant"


def _named_prompt(prompt: str, chosen: Text, rejected: Text) -> Record:
    assert not isinstance(chosen, str)
    assert not isinstance(rejected, str)
    record = _split_shared(chosen, rejected)
    if not any(isinstance(turn, dict) and turn["content"].strip() == prompt.strip() for turn in record.prompt):
        raise Reject("prompts_differ", "the text in prompt is no message of chosen and rejected")
    return record


def _answer(answer: Text, prompt: Text) -> list[Message]:
    if isinstance(answer, str):
        return [{"role": "assistant", "content": answer}]
    return answer[len(prompt) :] if answer[: len(prompt)] == prompt else answer


def _split_shared(chosen: list[Message], rejected: list[Message]) -> Record:
    index = shared_turns(chosen, rejected)
    if index == len(chosen) == len(rejected):
        raise Reject("identical_answers")
    if any(side[index : index + 1] and side[index]["role"] != "assistant" for side in (chosen, rejected)):
        raise Reject("prompts_differ", f"message {index + 1} is not the assistant's on both sides")
    return _preference(chosen[:index], (until_user(chosen[index:]), until_user(rejected[index:])))


def _preference(prompt: Text, answers: Pair) -> Record:
    return _checked(Record(prompt, answers, ((0, 1),)))


def _checked(record: Record) -> Record:
    check_prompt(record.prompt)
    names = (
        ("chosen", "rejected") if len(record.responses) == 2 else [f"answer {k}" for k in range(len(record.responses))]
    )
    for answer, name in zip(record.responses, names, strict=True):
        check_answer(answer, name if record.pairs else "the answer")
    for winner, loser in record.pairs:
        check_different(record.responses[winner], record.responses[loser])
    return record

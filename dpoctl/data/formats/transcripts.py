"""Plain text as messages: transcripts, with turns such as `Human:` and `Assistant:`, and prompts with their answers.

A transcript is read in the one spelling that it starts with, and only if all of it can be read: `Reject` says what is
unclear about another one.
"""

import re
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from dpoctl.data.formats.common import assistant, checked, system_turn, user
from dpoctl.data.messages import through_answer
from dpoctl.data.records import Message, Record, Reject

_START = re.compile(r"(?:system:(?P<system>.*?)\n)?\s*(?P<sign>#+ ?)?(?P<user>human|user):", re.IGNORECASE | re.DOTALL)
_ANSWER = re.compile(r"(?:\A|\s)(?:#+ ?)?assistant:\s*\Z", re.IGNORECASE)
_UNCLEAR = "unclear_turns"


class _Turn(NamedTuple):
    is_user: bool
    text: str
    gap: str | None
    """The kind of white space before its marker; None where the text starts with it."""


class _Spelling:
    """The two markers of a transcript, as the user's first one is spelled."""

    def __init__(self, start: re.Match[str]) -> None:
        word, sign = start["user"], start["sign"] or ""
        answers = "ASSISTANT" if word.isupper() else ("assistant" if word.islower() else "Assistant")
        self.user, self.assistant = f"{sign}{word}:", f"{sign}{answers}:"
        inside = r"" if sign else r"(?<![\w#])"
        self._markers = re.compile(rf"(\s*){inside}({re.escape(self.user)}|{re.escape(self.assistant)})")

    def turns(self, text: str) -> list[_Turn]:
        """Split a text, which starts with a marker, at all markers."""
        _, *pieces = self._markers.split(text)
        return [
            _Turn(marker == self.user, content.strip(), None if number == 0 else _kind(gap))
            for number, (gap, marker, content) in enumerate(zip(pieces[::3], pieces[1::3], pieces[2::3], strict=True))
        ]


def as_messages(record: Record) -> Record:
    """Make messages of a record of plain text: one a turn of a transcript, else the user's prompt and its answers.

    White space around a text, with which prompt and answer were joined, is left out. Messages stay as they are, unless
    one holds a transcript.

    Raises:
        Reject: A transcript cannot be read whole, or the text has neither turns nor a prompt.
    """
    if (found := with_messages(record)) is not None or not isinstance(record.prompt, str):
        return found or record
    if not record.prompt:
        raise Reject("no_turns", "the text has no turns such as Human: and Assistant:")
    answers = tuple([assistant(answer.strip())] for answer in record.responses if isinstance(answer, str))
    return checked(replace(record, prompt=[user(record.prompt.strip())], responses=answers))


def with_messages(record: Record) -> Record | None:
    """Make messages of a record that is a transcript; None if it is none.

    Args:
        record: A record of plain text (the prompt of a `text` row is empty, and its one response the whole transcript),
            or one whose format made a message of the user of the whole prompt.

    Raises:
        Reject: It is a transcript, but where its turns begin is unclear, or a turn is empty or out of order.
    """
    if (plain := _plain(record)) is None:
        return None
    system, prompt, texts = plain
    whole = (prompt or texts[0]).lstrip()
    start = _START.match(whole)
    if start is None:
        if _ANSWER.search(prompt):
            raise Reject(_UNCLEAR, "the prompt ends with the assistant's marker, but does not start with the user's")
        return None
    spelling = _Spelling(start)
    if spelling.assistant not in whole and not any(text.lstrip().startswith(spelling.assistant) for text in texts):
        return None
    system = system or system_turn((start["system"] or "").strip())
    asked = spelling.turns(whole[start.end() - len(spelling.user) :])
    if not prompt:
        messages = _messages(asked)
        return checked(replace(record, prompt=system + messages[:1], responses=(through_answer(messages[1:]),)))
    gap = None
    if not asked[-1].is_user:
        _, begun, gap = asked.pop()
        if begun:
            raise Reject(_UNCLEAR, f"the prompt ends within a turn of the assistant: {begun[:40]!r}")
    answers = tuple(_answer(spelling, asked, text, gap) for text in texts)
    return checked(replace(record, prompt=system + _messages(asked), responses=answers))


def _plain(record: Record) -> tuple[list[Message], str, list[str]] | None:
    """Return the system message, prompt and answers of a record, all its other texts; None if it has more turns."""
    if isinstance(record.prompt, str):
        plain = [text for text in record.responses if isinstance(text, str)]
        return ([], record.prompt, plain) if len(plain) == len(record.responses) else None
    *before, last = record.prompt
    spoken = (answer for answer in record.responses if not isinstance(answer, str) and len(answer) == 1)
    answers = [answer for (answer,) in spoken if answer.keys() == {"role", "content"}]
    is_whole = last["role"] == "user" and all(turn["role"] == "system" for turn in before)
    if not is_whole or not _ANSWER.search(last["content"]) or len(answers) < len(record.responses):
        return None
    return before, last["content"], [answer["content"] for answer in answers]


def _answer(spelling: _Spelling, asked: list[_Turn], text: str, gap: str | None) -> list[Message]:
    first, *others = spelling.turns(spelling.assistant + text.strip().removeprefix(spelling.assistant))
    if others and others[-1].is_user:
        raise Reject("no_final_answer", "the answer ends with a turn of the user")
    return _messages([*asked, first._replace(gap=gap), *others])[len(asked) :]


def _messages(turns: list[_Turn]) -> list[Message]:
    """Make messages of turns once it is sure that they are turns: in order, none empty, their markers set off alike."""
    for number, (one, after) in enumerate(pairwise(turns), start=2):
        if one.is_user == after.is_user:
            raise Reject(_UNCLEAR, f"turns {number - 1} and {number} are both of the {_who(one)}")
    for number, turn in enumerate(turns, start=1):
        if not turn.text:
            raise Reject("empty_turn", f"turn {number}, of the {_who(turn)}, is empty")
    for is_user in (True, False):
        alike = [turn for turn in turns if turn.is_user == is_user]
        gaps = sorted({turn.gap for turn in alike if turn.gap is not None})
        if len(gaps) > 1:
            who = _who(alike[0])
            raise Reject(_UNCLEAR, f"markers of the {who} stand after {' and after '.join(gaps)}: one may be quoted")
    return [user(turn.text) if turn.is_user else assistant(turn.text) for turn in turns]


def _who(turn: _Turn) -> str:
    return "user" if turn.is_user else "assistant"


def _kind(gap: str) -> str:
    lines = gap.count("\n")
    return "a blank line" if lines > 1 else ("a line break" if lines else ("a blank" if gap else "text"))

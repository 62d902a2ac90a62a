"""Votes of the Chatbot Arena, and of anybody's own logs in its shape: two whole conversations and who won."""

import json
from typing import Any, Literal

from dpoctl.data.conversation import SHAPE, read_messages
from dpoctl.data.formats.parts import assistant, columns, compare_conversations, text_columns, user
from dpoctl.data.records import Message, Record, Reject, Row

TIES = {"tie": "tie", "tie (bothbad)": "both_bad", "both_bad": "both_bad"}
"""What voters said who preferred neither, and the reason that such a row is rejected with."""

MultiTurn = Literal["first", "reject"]


def arena_55k(row: Row, *, multi_turn: MultiTurn = "first") -> Record:
    """The 55k set: prompts and responses as JSON lists of turns, and three columns of which one is 1.

    A vote is on two whole conversations that go apart with the first answer. `multi_turn` says what becomes of
    those of several turns: `first` compares the first answers that differ, `reject` leaves the row out.
    """
    votes = columns(row, "winner_model_a", "winner_model_b", "winner_tie")
    prompts, *answers = (_turns(row, name) for name in ("prompt", "response_a", "response_b"))
    flags = [_flag(vote) for vote in votes]
    if sum(flags) != 1:
        raise Reject("bad_winner", f"not one of the three winner columns is 1, but {sum(flags)}")
    a, b = (_conversation(prompts, side) for side in answers)
    return _vote(a, b, ("model_a", "model_b", "tie")[flags.index(True)], multi_turn)


def arena_100k(row: Row, *, multi_turn: MultiTurn = "first") -> Record:
    """The 100k set, and the 33k one: two lists of messages, and `winner`; see `arena_55k` for `multi_turn`."""
    winner, *sides = columns(row, "winner", "conversation_a", "conversation_b")
    a, b = (_bare(read_messages(side, f"conversation_{name}")) for name, side in zip("ab", sides, strict=True))
    return _vote(a, b, winner, multi_turn)


def arena_140k(row: Row, *, multi_turn: MultiTurn = "first") -> Record:
    """The 140k set: as the 100k one, of a session, with contents in parts; a row with an image is rejected."""
    columns(row, "evaluation_session_id", "winner", "conversation_a", "conversation_b")
    return arena_100k(row, multi_turn=multi_turn)


def _vote(a: list[Message], b: list[Message], winner: Any, multi_turn: MultiTurn) -> Record:
    if isinstance(winner, str) and winner in TIES:
        raise Reject(TIES[winner])
    if winner not in ("model_a", "model_b"):
        raise Reject("bad_winner", f"winner is {winner!r}")
    turns = max(sum(message["role"] == "user" for message in side) for side in (a, b))
    if turns > 1 and multi_turn == "reject":
        raise Reject("multi_turn", f"{turns} turns")
    chosen, rejected = (a, b) if winner == "model_a" else (b, a)
    return compare_conversations(chosen, rejected, first_only=True)


def _bare(messages: list[Message]) -> list[Message]:
    """Leave out what the arena counted: it would make equal messages differ."""
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _turns(row: Row, name: str) -> list[str]:
    (text,) = text_columns(row, name)
    try:
        turns = json.loads(text)
    except json.JSONDecodeError as error:
        raise Reject(SHAPE, f"{name} is not a JSON list of turns") from error
    if not isinstance(turns, list) or not all(turn is None or isinstance(turn, str) for turn in turns):
        raise Reject(SHAPE, f"{name} is not a JSON list of turns")
    texts = [turn or "" for turn in turns]
    if any("\ud800" <= character <= "\udfff" for turn in texts for character in turn):
        raise Reject("lone_surrogate", f"{name} holds half of a UTF-16 pair, which is not a character")
    return texts


def _conversation(prompts: list[str], answers: list[str]) -> list[Message]:
    if len(prompts) != len(answers):
        raise Reject("roles_out_of_order", f"{len(answers)} answers to {len(prompts)} prompts")
    return [turn for asked, answer in zip(prompts, answers, strict=True) for turn in (user(asked), assistant(answer))]


def _flag(value: Any) -> bool:
    if value not in (0, 1, "0", "1", "True", "False"):
        raise Reject("bad_winner", f"a winner column is {value!r}, not 0 or 1")
    return value in (1, "1", "True")

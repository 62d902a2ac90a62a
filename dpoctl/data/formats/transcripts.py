"""Formats whose texts are transcripts with `Human:` and `Assistant:` markers."""

import re

from dpoctl.data.conversation import SHAPE, shared_turns
from dpoctl.data.formats.parts import columns, preference
from dpoctl.data.records import Record, Reject, Row

TURN = re.compile(r"\n\n(Human|Assistant):")


def hh(row: Row) -> Record:
    """Anthropic HH: `chosen` and `rejected` are whole transcripts, split at the two markers and nowhere else.

    The record is plain text: the prompt is the transcript through the last `Assistant:`, the answers are
    the remainders. Where the histories differ, the pair is cut at the first turn that does.
    """
    chosen, rejected = columns(row, "chosen", "rejected")
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
    return preference(f"{history}\n\nAssistant:", sides[0][index][1], sides[1][index][1])


def _turns(transcript: str) -> list[tuple[str, str]]:
    pieces = TURN.split(transcript)[1:]
    return list(zip(pieces[::2], pieces[1::2], strict=True))

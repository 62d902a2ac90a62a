"""An assistant's turn in a rendered conversation: where it begins and ends, and whether the template writes all of it.

What is written for a turn is found by rendering the conversation again: with other values in the turn, without the
turns after it, or with one more turn after it.
"""

import re
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import NamedTuple

from dpoctl.data.chat_template import PROBE, ChatTemplate
from dpoctl.data.records import Message, Reject
from dpoctl.data.turn_ends import TurnEnds, common_length, shared_length
from dpoctl.data.turn_fields import THINKING, MarkedCopy, call_texts, function_names, is_written

OPEN_STUB = re.compile(r"<think>\s*\Z")
CLOSED_STUB = re.compile(r"<think>\s*</think>\s*\Z")
EMPTY_OR_STUB = re.compile(r"\s*(?:<think>\s*</think>\s*)?")


class TurnEnd(NamedTuple):
    """The end of a turn in the rendered conversation."""

    at: int
    stops: bool
    """Whether generation stops there."""
    more: str = ""
    """What the template writes there only once the conversation goes on."""


class Turn:
    """An assistant's turn that is trained on.

    Args:
        apply: Renders messages of the record.
        ends: The stop tokens.
        chat: The chat template.
        notes: Gets the names of the template's deviations.
        messages: The conversation, through its last assistant turn.
        index: The turn.
        full: The rendered conversation.
    """

    def __init__(
        self,
        apply: Callable[..., str],
        ends: TurnEnds,
        chat: ChatTemplate,
        notes: set[str],
        messages: list[Message],
        index: int,
        full: str,
    ) -> None:
        self._apply = apply
        self._ends = ends
        # A template may end the question only in front of an answer.
        self._generation_prompt = chat.generation_prompt[ends.last(chat.generation_prompt) :]
        self._chat = chat
        self._notes = notes
        self._messages = messages
        self._index = index
        self._message = messages[index]
        self._full = full

    def find_start(self, since: int) -> int | None:
        """Find where the turn starts by what the template writes before an answer; None if it does not write that."""
        if self._marked_full is None:
            return None
        before = common_length(self._full, self._marked_full)
        prompt = self._generation_prompt
        for opening in dict.fromkeys((prompt, CLOSED_STUB.sub("", prompt), OPEN_STUB.sub("", prompt))):
            at = self._full.rfind(opening, since, before) if opening else -1
            if at >= 0:
                self._notes.add("history_rewritten")
                return at + len(opening)
        return None

    def end(self, start: int) -> TurnEnd:
        """Find the end of the turn: the first stop token behind its values, or what the template writes instead."""
        if self._index < len(self._messages) - 1:
            return self._end_before_others(start)
        data, is_exact = self._data_end(self._messages, self._full, start)
        end = max(data, len(self._full.rstrip()))
        if stop := self._ends.first(self._full, data, end, is_exact=is_exact):
            return TurnEnd(stop, stops=True)
        return self._end_once_others_follow(data, end)

    def check(self, start: int, end: int) -> None:
        """Reject the record if the template leaves a field of the turn out, or rewrites it."""
        written = self._full[start:end]
        if not self._message["content"].strip() and not self._message.get("tool_calls"):
            self._notes.add("empty_turns")
        is_whole = self._holds_content(written)
        has_more = bool(self._message.get("tool_calls")) or any(self._message.get(name) for name in THINKING)
        if has_more or not is_whole:
            self._check_values(written, start, end)
        if not is_whole:
            content = self._message["content"]
            raise Reject("answer_rewritten", f"the template writes {written[:200]!r} for {content[:200]!r}")
        if (name := self._message.get("name")) and self._with(self._message | {"name": f"{name}7340"}) == self._full:
            raise dropped("name", "name")

    def _end_before_others(self, start: int) -> TurnEnd:
        """Find the end of a turn before the last: as it is without the later ones, unless the template rewrites it."""
        until = self._messages[: self._index + 1]
        try:
            alone = self._apply(until)
        except Reject:
            alone = ""
        data, is_exact = self._data_end(until, alone, min(start, len(alone)))
        end = max(data, len(alone.rstrip()))
        stop = self._ends.first(alone, data, end, is_exact=is_exact)
        is_same = len(alone) > start and self._full.startswith(alone[: stop or end])
        if is_same and stop:
            return TurnEnd(stop, stops=True)
        if not is_same:
            self._notes.add("history_rewritten")
        if not is_same or end == data:
            data, is_exact = self._data_end(self._messages, self._full, start)
            end = data + self._tail(until, self._full, data)
            stop = self._ends.first(self._full, data, end, is_exact=is_exact)
        # If the stops are not known, any control token would pass for one, that of the next turn too.
        follows = self._ends.after(self._full, end) if self._ends.are_known or not is_same else None
        end = stop or follows or end
        # Behind the values of a call stands the rest of its syntax, which is no end.
        has_calls = bool(self._message.get("tool_calls"))
        if not (stop or follows or (self._chat.answer_end if has_calls else self._full[data:end]).strip()):
            self._notes.add("turns_without_end")
        return TurnEnd(end, stops=bool(stop))

    def _tail(self, until: list[Message], text: str, data: int) -> int:
        """Return the length of what follows the values of the turn whoever speaks next, without blanks at its end."""
        try:
            generating = self._apply(until, generate=True)
        except Reject:
            return 0
        at, _ = self._data_end(until, generating, 0, generate=True)
        following = text[data:]
        length = shared_length(following, generating[at:])
        opening = self._generation_prompt
        taken = next(
            (k for k in range(min(len(opening), length), 0, -1) if following.endswith(opening[:k], 0, length)), 0
        )
        return len(following[: length - taken].rstrip())

    def _end_once_others_follow(self, data: int, end: int) -> TurnEnd:
        """Find the end of the last turn by what the template writes behind it if the conversation goes on."""
        for follower in self._followers():
            longer = [*self._messages, follower]
            try:
                text = self._apply(longer)
            except Reject:
                continue
            is_same = text.startswith(self._full[:end])
            at = end if is_same else self._data_end(longer, text, 0)[0] + end - data
            header = text[at:].partition(PROBE)[0] if text.endswith(self._full[data:end], 0, at) else ""
            if end == data and (length := self._tail(self._messages, text, at)):
                stop = self._ends.first(text, at, at + length, is_exact=True)
                return TurnEnd(end, stops=bool(stop), more=text[at : stop or at + length])
            if self._ends.are_known and (stop := self._ends.after(header, 0)):
                self._notes.add("next_marker")
                return TurnEnd(end, stops=True, more=header[:stop])
        return TurnEnd(end, stops=False)

    def _followers(self) -> Iterator[Message]:
        """Yield messages that may come next: what the called tool returns, then the user's."""
        if name := next(function_names(self._message), None):
            numbers = [call.get("id") for call in self._message["tool_calls"] if isinstance(call, dict)]
            yield {"role": "tool", "content": PROBE, "name": name} | (
                {"tool_call_id": numbers[0]} if numbers[0] else {}
            )
        yield {"role": "user", "content": PROBE}

    def _data_end(self, messages: list[Message], text: str, start: int, *, generate: bool = False) -> tuple[int, bool]:
        """Find the end of the turn's values, or a place before it, and whether it is the exact one."""
        if not self._message.get("tool_calls"):
            end = _content_end(text, start, self._message["content"]) if start else None
            if end is not None:
                return end, True
        marked = self._marked_full if text is self._full else self._rendered(messages, self._copy.message, generate)
        if marked is None:
            return start, False
        return max(start, len(text) - common_length(text[::-1], marked[::-1])), False

    def _holds_content(self, written: str) -> bool:
        """Whether a turn holds its content; note thinking that the template leaves out or opens twice."""
        content = self._message["content"].strip()
        thinking, _, answer = content.rpartition("</think>")
        if content in written:
            if thinking and "</think>" in written[: written.index(content)]:
                self._notes.add("thinking_doubled")
            return True
        if answer.strip() not in written or not thinking:
            return False
        if thinking.removeprefix("<think>").strip() not in written:
            self._notes.add("thinking_dropped")
        return True

    def _check_values(self, written: str, start: int, end: int) -> None:
        """Reject the record if a value of the turn is missing in it; note thinking that is."""
        missing = self._missing(written, start, end)
        if "content" in missing:
            raise dropped("content", "content beside tool_calls" if self._message.get("tool_calls") else "content")
        calls = {path for path in self._copy.paths.values() if path.startswith("tool_calls")}
        if lost := sorted(calls & missing):
            raise dropped("tool_calls", "tool_calls" if calls <= missing else lost[0])
        if not all(name in written for name in function_names(self._message)):
            raise dropped("tool_calls", "the names in tool_calls")
        given = {name for name in THINKING if self._message.get(name)}
        if given and given <= missing:
            self._notes.add("thinking_dropped")

    def _missing(self, written: str, start: int, end: int) -> set[str]:
        """Return the places of the values that the template does not write between start and end of the turn."""
        marked, rest = self._marked_full, self._full[end:]
        if marked is not None:
            until = len(marked) - len(rest) if marked.endswith(rest) else len(marked)
            return self._copy.missing(marked[min(start, common_length(self._full, marked)) : until])
        fields = {name for name in ("content", *THINKING) if self._message.get(name)}
        missing = {name for name in fields if not is_written(str(self._message[name]), written)}
        calls = {path for path in self._copy.paths.values() if path.startswith("tool_calls")}
        return missing | (set() if all(is_written(text, written) for text in call_texts(self._message)) else calls)

    @cached_property
    def _copy(self) -> MarkedCopy:
        return MarkedCopy.of(self._message)

    @cached_property
    def _marked_full(self) -> str | None:
        return self._rendered(self._messages, self._copy.message)

    def _with(self, message: Message) -> str | None:
        return self._rendered(self._messages, message)

    def _rendered(self, messages: list[Message], message: Message, generate: bool = False) -> str | None:
        """Render a conversation with another message in place of this turn; None if the template refuses it."""
        try:
            return self._apply([*messages[: self._index], message, *messages[self._index + 1 :]], generate=generate)
        except Reject:
            return None


def dropped(field: str, what: str) -> Reject:
    """Return the rejection of a record with a field that the template leaves out."""
    return Reject(f"{field}_dropped", f"the chat template does not render {what}")


def _content_end(text: str, start: int, content: str) -> int | None:
    """Find the end of a turn's content, if it begins at `start` or after an empty thinking block."""
    for written in (content, content.strip(), content.rpartition("</think>")[2].strip()):
        if not written.strip():
            continue
        found = text.find(written, start)
        if found >= 0 and EMPTY_OR_STUB.fullmatch(text, start, found):
            return found + len(written)
    return None

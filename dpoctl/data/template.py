"""Chat template -> text with verified boundaries: where the prompt ends, which turns are the assistant's.

The prompt is rendered with its generation prompt, as at inference, and must be a prefix of the rendered
conversation. Known divergences are handled by name and counted; an unknown one stops with both texts.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from dpoctl.data.chat import ChatTemplate
from dpoctl.data.records import Message, Record, Reject, Text
from dpoctl.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BREAK = "\ufdd0"
"""A noncharacter put inside control strings of contents: the tokenizer is called on what stands left and right."""

OPEN_STUB = re.compile(r"<think>\s*\Z")
CLOSED_STUB = re.compile(r"<think>\s*</think>\s*\Z")
STUB_AT_START = re.compile(r"<think>\s*(?:</think>\s*)?")
EMPTY_OR_STUB = re.compile(r"\s*(?:<think>\s*</think>\s*)?")


@dataclass(frozen=True, slots=True)
class Completion:
    """What follows the prompt, through the last end-of-turn that is trained on."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """Characters of `text` that are trained on: one span an assistant turn, end-of-turn included."""
    needs_eos: bool
    """The text does not end with a stop token, so one is appended to its tokens."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A record as the text that the tokenizer gets; `notes` name what the template did to it."""

    prompt: str
    completions: tuple[Completion, ...]
    notes: tuple[str, ...] = ()


class Renderer:
    """Records to text, through the tokenizer's chat template where they are messages.

    Args:
        tokenizer: Its `chat_template` and its control tokens are used; it is not called.
        template_kwargs: Further variables of the template.
        loss_on: `assistant` trains on every assistant turn of a response, `last` on the last one.

    Raises:
        UsageError: A variable is one that every template is given.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", template_kwargs: dict[str, Any], loss_on: str = "assistant"
    ) -> None:
        self._chat = ChatTemplate(tokenizer, template_kwargs)
        self._loss_on = loss_on
        self._eos = str(tokenizer.eos_token)
        self.templates = (self._chat.text, self._chat.tools_text)
        """The chat template and that for conversations with tools, or None; dates in them are fixed."""
        tokens = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in tokens if token.special}
        stops = _alternatives(special | {self._eos})
        self._closing = re.compile(rf"(?:{stops})(?=(?:\s*(?:{stops}))*\s*\Z)")
        self._stop = re.compile(rf"\s*(?:{stops})")
        source = "".join(filter(None, self.templates))
        written = {token.content for token in tokens if token.content in source and not token.content.isspace()}
        self._control = _pattern(special | written)
        # An assistant's own text may hold control tokens that it writes itself, such as <think>.
        self._reserved = _pattern({str(token) for token in tokenizer.special_tokens_map.values()})

    def render(self, record: Record) -> Rendered:
        """Render a record.

        Raises:
            Reject: The template refuses this conversation, or does not write what stands in it.
            DataError: There is no template, or it moves the boundary in a way that is not known.
        """
        if isinstance(record.prompt, str):
            return Rendered(record.prompt, tuple(self._plain(answer) for answer in record.responses))
        return _Conversation(self, self._chat, record, self._loss_on).render()

    def _plain(self, answer: Text) -> Completion:
        assert isinstance(answer, str)
        text = self._without_eos(answer)
        return Completion(text, ((0, len(text)),), needs_eos=True)

    def defused(self, message: Message) -> tuple[Message, bool]:
        """Keep control strings in a message from becoming control tokens; say whether there were any."""
        is_answer = message["role"] == "assistant"
        control = self._reserved if is_answer else self._control
        content = message["content"].replace(BREAK, "")
        broken, count = control.subn(_break, self._without_eos(content) if is_answer else content)
        others = {key: _defuse(message[key], control) for key in message.keys() - {"role", "content"}}
        return message | others | {"content": broken}, count > 0

    def defused_variables(self, record: Record) -> Record:
        """Keep control strings in a row's tools and template variables from becoming control tokens."""
        if not (record.tools or record.template_kwargs):
            return record
        return replace(
            record,
            tools=_defuse(record.tools, self._control),
            template_kwargs=_defuse(record.template_kwargs, self._control),
        )

    def _without_eos(self, answer: str) -> str:
        """Drop end-of-sequence strings at the end of an answer: one is added, and one is enough."""
        while (stripped := answer.rstrip()).endswith(self._eos):
            answer = stripped.removesuffix(self._eos)
        return answer

    def close(self, text: str, since: int) -> tuple[int, int] | None:
        """Find the stop token that ends a text, not before `since`, with the end-of-sequence token right behind it."""
        closing = self._closing.search(text, since)
        if closing is None:
            return None
        end = closing.end()
        is_eos = closing.group() == self._eos
        return closing.start(), end if is_eos or not text.startswith(self._eos, end) else end + len(self._eos)

    def stop_after(self, text: str, at: int) -> int | None:
        """Find the end of the stop token that stands at a character, white space before it not counted."""
        stop = self._stop.match(text, at)
        return stop.end() if stop else None


class _Conversation:
    """One record on its way through the template."""

    def __init__(self, renderer: Renderer, chat: ChatTemplate, record: Record, loss_on: str) -> None:
        assert not isinstance(record.prompt, str)
        self._renderer = renderer
        self._chat = chat
        self._record = renderer.defused_variables(record)
        self._loss_on = loss_on
        self._notes: set[str] = set()
        self._prompt = self._defused(record.prompt)

    def render(self) -> Rendered:
        context = self._apply(self._prompt, generate=True)
        self._check_prompt(context)
        completions = tuple(self._complete(context, self._defused(answer)) for answer in self._record.responses)
        return Rendered(context, completions, tuple(sorted(self._notes)))

    def _defused(self, messages: Text) -> list[Message]:
        assert not isinstance(messages, str)
        defused = [self._renderer.defused(message) for message in messages]
        if any(had_control for _, had_control in defused):
            self._notes.add("control_tokens")
        return [message for message, _ in defused]

    def _apply(self, messages: list[Message], *, generate: bool = False) -> str:
        return self._chat.apply(messages, generate=generate, record=self._record)

    def _check_prompt(self, context: str) -> None:
        """Make sure that the template writes what it is given.

        Raises:
            Reject: It does not write the question.
        """
        first, last = self._prompt[0], self._prompt[-1]
        if first["role"] == "system" and first["content"].strip() not in context:
            self._notes.add("system_ignored")
        if last["role"] == "user" and last["content"].strip() not in context:
            raise Reject("prompt_rewritten", f"the template writes {context[-200:]!r} for {last['content'][:200]!r}")
        if self._record.tools:
            without = self._chat.apply(self._prompt, generate=True, record=replace(self._record, tools=[]))
            if without == context:
                self._notes.add("tools_ignored")

    def _complete(self, context: str, answer: list[Message]) -> Completion:
        messages = self._prompt + answer
        while messages[-1]["role"] != "assistant":
            messages = messages[:-1]
        full = self._apply(messages)
        offset = self._answer_start(self._prompt, context, full)
        first = len(self._prompt)
        turns = [index for index in range(first, len(messages)) if messages[index]["role"] == "assistant"]
        spans = []
        for index in turns[:-1]:
            if self._loss_on == "assistant" and messages[index].get("weight") != 0:
                spans.append(self._turn(messages, index, full))
                self._check_turn(messages[index], full[slice(*spans[-1])])
        last = turns[-1]
        start = offset if last == first else self._start(messages, last, full)
        _, end, is_closed = self._end(full, start, messages[last])
        if messages[last].get("weight") != 0:
            spans.append((start, end))
            self._check_turn(messages[last], full[start:end])
        if not spans or any(left[1] > right[0] for left, right in pairwise(spans)):
            raise Reject("nothing_to_learn", "no assistant turn could be told apart in the rendered conversation")
        shifted = tuple((left - offset, right - offset) for left, right in spans)
        return Completion(full[offset : spans[-1][1]], shifted, needs_eos=spans[-1][0] == start and not is_closed)

    def _start(self, messages: list[Message], index: int, full: str) -> int:
        context = messages[:index]
        return self._answer_start(context, self._apply(context, generate=True), full)

    def _turn(self, messages: list[Message], index: int, full: str) -> tuple[int, int]:
        """Find a turn that others follow: as it was rendered without them, or by its content."""
        start = self._start(messages, index, full)
        alone = self._apply(messages[: index + 1])
        body, end, _ = self._end(alone, min(start, len(alone)), messages[index])
        if full.startswith(alone[:end]):
            return start, end
        written = body if full.startswith(alone[:body]) else _content_end(full, start, messages[index])
        if written is None:
            raise _divergence("an assistant turn is written differently once others follow", alone[:end], full)
        self._notes.add("history_rewritten")
        return start, self._renderer.stop_after(full, written) or written

    def _end(self, text: str, start: int, message: Message) -> tuple[int, int, bool]:
        """Find where the turn that closes `text` ends, without and with its stop token, and whether it has one."""
        written = _content_end(text, start, message)
        if closing := self._renderer.close(text, written or start):
            return *closing, True
        end = written or max(start, len(text.rstrip()))
        return end, end, False

    def _check_turn(self, message: Message, span: str) -> None:
        """Make sure that a turn that is trained on holds the answer.

        Raises:
            Reject: It does not.
        """
        content = message["content"].strip()
        if not content:
            return
        thinking, _, answer = content.rpartition("</think>")
        if content in span:
            if thinking and "</think>" in span[: span.index(content)]:
                self._notes.add("thinking_doubled")
            return
        if answer.strip() not in span or not thinking:
            raise Reject("answer_rewritten", f"the template writes {span[:200]!r} for {content[:200]!r}")
        if thinking.removeprefix("<think>").strip() not in span:
            self._notes.add("thinking_dropped")

    def _answer_start(self, prompt: list[Message], context: str, full: str) -> int:
        """Find where the answer begins in the rendered conversation."""
        if full.startswith(context):
            return len(context)
        for stub in (CLOSED_STUB, OPEN_STUB):
            bare = stub.sub("", context)
            if bare != context and full.startswith(bare):
                given = STUB_AT_START.match(full, len(bare))
                if stub is CLOSED_STUB and given is not None and "</think>" not in given.group():
                    raise Reject(
                        "thinking_refused",
                        "the template ends thinking before the answer begins, and the answer thinks: "
                        "set data.chat_template_kwargs: {enable_thinking: true}, or remove the thinking",
                    )
                self._notes.add("thinking_stub")
                return given.end() if given else len(bare)
        if prompt[0]["role"] == "system" and len(prompt) > 1:
            without = self._apply(prompt[1:], generate=True)
            if full.startswith(without):
                self._notes.add("system_dropped")
                return len(without)
        raise _divergence("the prompt is written differently once an answer follows", context, full)


def _content_end(text: str, start: int, message: Message) -> int | None:
    """Find where a turn's content ends, if it begins at `start` or after an empty thinking stub."""
    for content in _contents(message):
        found = text.find(content, start)
        if found >= 0 and EMPTY_OR_STUB.fullmatch(text, start, found):
            return found + len(content)
    return None


def _contents(message: Message) -> Iterator[str]:
    """The text of a turn as it may be found in the rendering: whole, trimmed, without its thinking."""
    content = message["content"]
    for text in (content, content.strip(), content.rpartition("</think>")[2].strip()):
        if text.strip():
            yield text


def _defuse(value: Any, control: re.Pattern[str]) -> Any:
    """Break control strings wherever a value that the template may write holds them."""
    if isinstance(value, str):
        return control.sub(_break, value.replace(BREAK, ""))
    if isinstance(value, dict):
        return {key: _defuse(item, control) for key, item in value.items()}
    if isinstance(value, list):
        return [_defuse(item, control) for item in value]
    return value


def _break(match: re.Match[str]) -> str:
    return match.group()[0] + BREAK + match.group()[1:]


def _alternatives(tokens: set[str]) -> str:
    return "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True) if token)


def _pattern(tokens: set[str]) -> re.Pattern[str]:
    return re.compile(_alternatives({token for token in tokens if len(token) > 1}) or r"(?!)")


def _divergence(what: str, alone: str, full: str) -> DataError:
    at = next((index for index, (a, b) in enumerate(zip(alone, full, strict=False)) if a != b), len(full))
    left = max(0, at - 30)
    return DataError(
        f"chat template: {what}: {alone[left : at + 40]!r} against {full[left : at + 40]!r} at character {at}",
        hint="set model.chat_template or data.chat_template_kwargs so that a prompt is a prefix of its conversation",
    )

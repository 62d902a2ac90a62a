"""Chat template -> text with verified boundaries: where the prompt ends, which turns are the assistant's.

The prompt is rendered with its generation prompt, as at inference, and must be a prefix of the rendered
conversation. Known divergences are handled by name and counted; an unknown one stops with both texts.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from dpoctl.data.records import Message, Record, Reject, Text
from dpoctl.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BREAK = "\ufdd0"
"""A noncharacter put inside control strings of contents: the tokenizer is called on what stands left and right."""

TODAY = date(2024, 7, 26)
"""What templates that print today's date are told, so that the same data gives the same tokens tomorrow."""

STRFTIME = re.compile(r"strftime_now\(\s*['\"]([^'\"]+)['\"]")
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
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", template_kwargs: dict[str, Any], loss_on: str = "assistant"
    ) -> None:
        self._tokenizer = tokenizer
        self._kwargs = template_kwargs
        self._loss_on = loss_on
        self._eos = str(tokenizer.eos_token)
        self.template = _with_fixed_date(tokenizer.chat_template)
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        stops = _alternatives(special | {self._eos})
        self._closing = re.compile(rf"(?:{stops})(?=(?:\s*(?:{stops}))*\s*\Z)")
        self._stop = re.compile(rf"\s*(?:{stops})")
        template_text = self.template or ""
        written = {
            token.content
            for token in tokenizer.added_tokens_decoder.values()
            if token.content in template_text and not token.content.isspace()
        }
        self._control = _pattern(special | written)
        # An assistant's own text may hold control tokens that it writes itself, such as <think>.
        self._reserved = _pattern({str(token) for token in tokenizer.special_tokens_map.values()})

    def render(self, record: Record) -> Rendered:
        """Render a record.

        Raises:
            Reject: The template refuses this conversation.
            DataError: There is no template, or it moves the boundary in a way that is not known.
        """
        if isinstance(record.prompt, str):
            return Rendered(record.prompt, tuple(self._plain(answer) for answer in record.responses))
        prompt = [self._defused(message) for message in record.prompt]
        context = self._apply(prompt, generate=True)
        notes: list[str] = []
        completions = []
        for response in record.responses:
            assert not isinstance(response, str)
            answer = [self._defused(message) for message in response]
            completions.append(self._complete(prompt, context, answer, notes))
        return Rendered(context, tuple(completions), tuple(sorted(set(notes))))

    def _plain(self, answer: Text) -> Completion:
        assert isinstance(answer, str)
        text = self._without_eos(answer)
        return Completion(text, ((0, len(text)),), needs_eos=True)

    def _complete(self, prompt: list[Message], context: str, answer: list[Message], notes: list[str]) -> Completion:
        messages = prompt + answer
        while messages[-1]["role"] != "assistant":
            messages = messages[:-1]
        full = self._apply(messages)
        offset = self._answer_start(prompt, context, full, notes)
        turns = [index for index in range(len(prompt), len(messages)) if messages[index]["role"] == "assistant"]
        spans = []
        for index in turns[:-1]:
            if self._loss_on == "assistant" and messages[index].get("weight") != 0:
                spans.append(self._turn(messages, index, full, notes))
        last = turns[-1]
        start = offset if last == len(prompt) else self._start(messages, last, full, notes)
        end, closed = self._end(full, start, messages[last], notes)
        if messages[last].get("weight") != 0:
            spans.append((start, end))
        if not spans or any(left[1] > right[0] for left, right in pairwise(spans)):
            raise Reject("nothing_to_learn", "no assistant turn could be told apart in the rendered conversation")
        end = spans[-1][1]
        shifted = tuple((left - offset, right - offset) for left, right in spans)
        return Completion(full[offset:end], shifted, needs_eos=spans[-1][0] == start and not closed)

    def _start(self, messages: list[Message], index: int, full: str, notes: list[str]) -> int:
        context = messages[:index]
        return self._answer_start(context, self._apply(context, generate=True), full, notes)

    def _turn(self, messages: list[Message], index: int, full: str, notes: list[str]) -> tuple[int, int]:
        """Find a turn that others follow: as it was rendered without them, or by its content."""
        start = self._start(messages, index, full, notes)
        alone = self._apply(messages[: index + 1])
        end, _ = self._end(alone, min(start, len(alone)), messages[index], [])
        if full.startswith(alone[:end]):
            return start, end
        if (written := _content_end(full, start, messages[index])) is not None:
            notes.append("history_rewritten")
            stop = self._stop.match(full, written)
            return start, stop.end() if stop else written
        raise _divergence("an assistant turn is written differently once others follow", alone[:end], full)

    def _end(self, text: str, start: int, message: Message, notes: list[str]) -> tuple[int, bool]:
        """Find the end of the turn that closes `text`, and whether a stop token is there."""
        written = _content_end(text, start, message)
        contents = list(_contents(message))
        if contents and not any(content in text[start:] for content in contents):
            notes.append("content_rewritten")
        closing = self._closing.search(text, written or start)
        if closing:
            return closing.end(), True
        return written or max(start, len(text.rstrip())), False

    def _answer_start(self, prompt: list[Message], context: str, full: str, notes: list[str]) -> int:
        """Find where the answer begins in the rendered conversation."""
        if full.startswith(context):
            return len(context)
        for stub in (CLOSED_STUB, OPEN_STUB):
            bare = stub.sub("", context)
            if bare != context and full.startswith(bare):
                given = STUB_AT_START.match(full, len(bare))
                if stub is OPEN_STUB or given is None or "</think>" in given.group():
                    notes.append("thinking_stub")
                    return given.end() if given else len(bare)
        if prompt[0]["role"] == "system" and len(prompt) > 1:
            without = self._apply(prompt[1:], generate=True)
            if full.startswith(without):
                notes.append("system_dropped")
                return len(without)
        raise _divergence("the prompt is written differently once an answer follows", context, full)

    def _apply(self, messages: list[Message], *, generate: bool = False) -> str:
        from jinja2.exceptions import TemplateError

        if self.template is None:
            raise DataError(
                "the rows are messages and the tokenizer has no chat template",
                hint="set model.chat_template to chatml, zephyr or a .jinja file",
            )
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=generate,
                **self._kwargs,
            )
        except (TemplateError, TypeError) as error:
            raise Reject("template_refuses", str(error)) from error
        return str(text)

    def _defused(self, message: Message) -> Message:
        """Keep control strings in contents from becoming control tokens."""
        content = message["content"].replace(BREAK, "")
        if message["role"] == "assistant":
            return message | {"content": self._reserved.sub(_break, self._without_eos(content))}
        return message | {"content": self._control.sub(_break, content)}

    def _without_eos(self, answer: str) -> str:
        """Drop end-of-sequence strings at the end of an answer: one is added, and one is enough."""
        while (stripped := answer.rstrip()).endswith(self._eos):
            answer = stripped.removesuffix(self._eos)
        return answer


def _with_fixed_date(template: Any) -> str | None:
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str):
        return None
    formats = set(STRFTIME.findall(template))
    if not formats:
        return template
    dates = {form: TODAY.strftime(form) for form in sorted(formats)}
    return f"{{%- macro strftime_now(form) -%}}{{{{ {dates!r}[form] }}}}{{%- endmacro -%}}{template}"


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

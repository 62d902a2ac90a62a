"""Records rendered by the chat template, with verified boundaries of the prompt and of the assistant's turns.

The prompt is rendered with its generation prompt, as at inference, and must be a prefix of the rendered conversation.
A turn ends where what the template writes for it ends: content, tool calls, and the end of turn. Known deviations are
handled and counted by name; with any other, and where the template leaves something out, the record is rejected.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

from dpoctl.data.chat_template import ChatTemplate
from dpoctl.data.messages import shared_turns, through_answer
from dpoctl.data.records import Message, Record, Reject, Text
from dpoctl.data.thinking import find_block
from dpoctl.data.turn_ends import TurnEnds, alternatives, common_length
from dpoctl.data.turn_fields import TEXT, THINKING, call_texts, is_written
from dpoctl.data.turns import CLOSED_STUB, OPEN_STUB, Turn, dropped

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dpoctl.recipe.schema import TrainOnThink

BREAK = "\ufdd0"
"""A noncharacter that is put into control strings of contents; the tokenizer sees only the parts beside it."""

MOST_VALUES = 1000
"""The values of a call in an earlier turn that are looked for, so that a row of many does not take minutes."""
STUB_AT_START = re.compile(r"<think>\s*(?:</think>\s*)?")


@dataclass(frozen=True, slots=True)
class Completion:
    """The text after the prompt, through the last end of turn that is trained on."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """Characters of `text` that are trained on: one span an assistant turn, end-of-turn included."""
    needs_eos: bool
    """Whether the text ends without a stop token, so that one is appended to its tokens."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A record as text for the tokenizer; `notes` name the deviations of the template, as in `TEMPLATE_NOTES`."""

    prompt: str
    completions: tuple[Completion, ...]
    notes: tuple[str, ...] = ()


class Renderer:
    """Renders records, with the tokenizer's chat template where they are messages.

    Args:
        tokenizer: The tokenizer; its `chat_template` and its control tokens are used.
        template_kwargs: Further variables of the template.
        loss_on: `assistant` trains on every assistant turn of a response, `last` on the last one.
        stops: The ids at which the model's generation stops; None if they are not known.
        train_on_think: The thinking blocks of those turns that are trained on.

    Raises:
        UsageError: A variable has the name of one that every template gets.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        template_kwargs: dict[str, Any],
        loss_on: str = "assistant",
        stops: Collection[int] | None = None,
        train_on_think: "TrainOnThink" = "all",
    ) -> None:
        self.chat = ChatTemplate(tokenizer, template_kwargs)
        self.ends = TurnEnds(tokenizer, stops)
        self.loss_on = loss_on
        self.train_on_think = train_on_think
        self.templates = (self.chat.text, self.chat.tools_text)
        """The chat template and that for conversations with tools, each with fixed dates, or None."""
        tokens = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in tokens if token.special}
        source = "".join(filter(None, self.templates))
        written = {token.content for token in tokens if token.content in source and not token.content.isspace()}
        self._control = _pattern(special | written)
        self._own = {str(token) for token in tokenizer.special_tokens_map.values()} | set(self.ends.tokens)
        self._added = {token.content for token in tokens}

    def render(self, record: Record) -> Rendered:
        """Render a record.

        Raises:
            Reject: The template rejects this conversation, does not write its contents, or moves a boundary in an
                unknown way.
            DataError: There is no template.
        """
        if isinstance(record.prompt, str):
            plain = [self._plain(answer) for answer in record.responses]
            notes = ("stop_in_text",) if any(not answer.needs_eos for answer in plain) else ()
            return Rendered(record.prompt, tuple(plain), notes)
        return _Conversation(self, record).render()

    def _plain(self, answer: Text) -> Completion:
        assert isinstance(answer, str)
        text, stop = self.ends.cut(answer)
        if stop is not None and not text.strip():
            raise Reject("empty_answer", f"the answer is {stop!r} and nothing else")
        is_other = stop not in (None, self.ends.eos)
        if is_other:
            text += str(stop)
        return Completion(text, ((0, len(text)),), needs_eos=not is_other)

    def escaped(self, message: Message) -> tuple[Message, bool]:
        """Keep control strings in a message from becoming control tokens; also return whether there were any."""
        is_answer = message["role"] == "assistant"
        control = self._reserved if is_answer else self._control
        content = message["content"].replace(BREAK, "")
        broken, count = control.subn(_break, self.ends.cut(content)[0] if is_answer else content)
        others = {key: _escape(message[key], control) for key in message.keys() - {"role", "content"}}
        return message | others | {"content": broken}, count > 0

    @cached_property
    def _reserved(self) -> re.Pattern[str]:
        """The control tokens that an assistant does not write itself, as it does `<think>` and those of tool calls."""
        around = self.chat.generation_prompt + self.chat.answer_end
        return _pattern(self._own | {token for token in self._added if token in around and "think>" not in token})

    def escaped_variables(self, record: Record) -> Record:
        """Keep control strings in a row's tools and template variables from becoming control tokens."""
        if not (record.tools or record.template_kwargs):
            return record
        return replace(
            record,
            tools=_escape(record.tools, self._control),
            template_kwargs=_escape(record.template_kwargs, self._control),
        )


class _Conversation:
    """The rendering of one record of messages."""

    def __init__(self, renderer: Renderer, record: Record) -> None:
        assert not isinstance(record.prompt, str)
        self._renderer = renderer
        self._chat = renderer.chat
        self._ends = renderer.ends
        self._record = renderer.escaped_variables(record)
        self._notes: set[str] = set()
        self._prompt = self._escaped(record.prompt)

    def render(self) -> Rendered:
        self._context = self._apply(self._prompt, generate=True)
        self._check_prompt(self._context)
        completions = tuple(self._complete(self._escaped(answer)) for answer in self._record.responses)
        if self._renderer.loss_on == "last" and _part_early(self._record.responses):
            self._notes.add("parts_early")
        return Rendered(self._context, completions, tuple(sorted(self._notes)))

    def _escaped(self, messages: Text) -> list[Message]:
        assert not isinstance(messages, str)
        escaped = [self._renderer.escaped(message) for message in messages]
        if any(had_control for _, had_control in escaped):
            self._notes.add("control_tokens")
        return [message for message, _ in escaped]

    def _apply(self, messages: list[Message], *, generate: bool = False) -> str:
        return self._chat.apply(messages, generate=generate, record=self._record)

    def _check_prompt(self, context: str) -> None:
        """Reject the record if the template leaves out something of the prompt; note it for the system message."""
        first, last = self._prompt[0], self._prompt[-1]
        if first["role"] == "system" and first["content"].strip() not in context:
            self._notes.add("system_ignored")
        if last["role"] == "user" and last["content"].strip() not in context:
            raise Reject("prompt_rewritten", f"the template writes {context[-200:]!r} for {last['content'][:200]!r}")
        self._check_context(self._prompt, range(len(self._prompt)), context, generate=True)
        if self._record.tools:
            without = self._chat.apply(self._prompt, generate=True, record=replace(self._record, tools=[]))
            if without == context:
                raise dropped("tools", "the row's tools")

    def _check_context(
        self, messages: list[Message], untrained: Iterable[int], text: str, *, generate: bool = False
    ) -> None:
        """Reject the record if the template leaves out messages that are not trained on, or their calls.

        Args:
            messages: The conversation.
            untrained: The places in it of those messages.
            text: The rendered conversation.
            generate: Whether the text ends with the generation prompt.
        """
        at, doubtful = 0, []
        for index in untrained:
            message = messages[index]
            content = message["content"]
            if message["role"] == "assistant":
                content = content.rpartition("</think>")[2]
            found = text.find(content.strip(), at)
            # What a tool returns is often a word that stands elsewhere too.
            if content.strip() and (message["role"] == "tool" or (message["role"] == "user" and found < 0)):
                doubtful.append(index)
            if found >= 0:
                at = found + len(content.strip())
            elif message["role"] != "system" and not is_written(content, text):
                raise _content_dropped(message)
            if not all(is_written(value, text) for value in islice(call_texts(message), MOST_VALUES)):
                raise dropped("tool_calls", "tool_calls of an earlier turn")
            if not is_written(str(message.get("name", "")), text):
                self._notes.add("names_ignored")
        self._check_written(messages, doubtful, generate=generate)

    def _check_written(self, messages: list[Message], doubtful: list[int], *, generate: bool) -> None:
        """Reject the record if other contents of these messages are not in the rendered conversation."""
        marks = {index: TEXT.format(index) for index in doubtful}
        marked = [
            message | {"content": marks[index]} if index in marks else message for index, message in enumerate(messages)
        ]
        try:
            text = self._apply(marked, generate=generate) if marks else ""
        except Reject:
            # The template reads these contents, and so does not leave them out.
            return
        for index, mark in marks.items():
            if mark not in text:
                raise _content_dropped(messages[index])

    def _is_trained(self, message: Message, *, is_last: bool) -> bool:
        is_meant = is_last or self._renderer.loss_on == "assistant"
        return is_meant and message["role"] == "assistant" and message.get("weight") != 0

    def _complete(self, answer: list[Message]) -> Completion:
        messages = through_answer(self._prompt + answer)
        full = self._apply(messages)
        offset = at = self._answer_start(self._prompt, self._context, full)
        first, last = len(self._prompt), len(messages) - 1
        trained = [
            index for index in range(first, last + 1) if self._is_trained(messages[index], is_last=index == last)
        ]
        self._check_context(messages, [index for index in range(first, last + 1) if index not in trained], full)
        if not any(messages[index]["content"].strip() or messages[index].get("tool_calls") for index in trained):
            raise Reject("nothing_to_learn", "no assistant turn that is trained on holds anything")
        spans = []
        for index in trained:
            turn = Turn(self._apply, self._ends, self._chat, self._notes, messages, index, full)
            start = offset if index == first else self._start(turn, messages[:index], full, at)
            end = turn.end(start)
            turn.check(start, end.at)
            at = end.at
            spans.append((self._behind_thinking(messages[index], full, start, at, is_first=index == first), at))
        if any(left[1] > right[0] for left, right in pairwise(spans)):
            raise Reject("nothing_to_learn", "no assistant turn could be told apart in the rendered conversation")
        shifted = [(left - offset, right - offset) for left, right in spans]
        shifted[-1] = (shifted[-1][0], shifted[-1][1] + len(end.more))
        return Completion(full[offset:at] + end.more, tuple(shifted), needs_eos=trained[-1] == last and not end.stops)

    def _behind_thinking(self, message: Message, full: str, start: int, end: int, *, is_first: bool) -> int:
        """Find where the part of a turn begins that is trained on: at its start, or behind its thinking block."""
        wanted, at = self._renderer.train_on_think, start
        block = find_block(self._context if is_first else full[:start], full, start, end)
        # Some templates write an empty block before one that the content holds.
        while block is not None and (wanted == "none" or (wanted == "nonempty" and block.is_empty)):
            self._notes.add("thinking_untrained")
            at = block.end
            block = find_block(full[:at], full, at, end)
        if block is not None and block.is_empty:
            self._notes.add("thinking_empty")
        given = [str(message[name]) for name in THINKING if message.get(name)]
        if wanted == "none" and at == start and any(is_written(text, full[start:end]) for text in given):
            raise Reject("thinking_unmarked", "the chat template writes thinking between marks that are not known")
        return at

    def _start(self, turn: Turn, context: list[Message], full: str, since: int) -> int:
        """Find the start of a later answer: behind its prompt at inference, unless the template rewrites that."""
        try:
            return self._answer_start(context, self._apply(context, generate=True), full)
        except Reject:
            start = turn.find_start(since)
            if start is None:
                raise
            return start

    def _answer_start(self, prompt: list[Message], context: str, full: str) -> int:
        """Find the start of the answer in the rendered conversation."""
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
        raise _moved(context, full)


def _part_early(answers: Sequence[Text]) -> bool:
    """Whether conversations part before the last turn of the assistant in one of them."""
    shared = min((shared_turns([*answers[0]], [*other]) for other in answers[1:]), default=0)
    turns = ([message["role"] for message in answer[shared:] if isinstance(message, dict)] for answer in answers)
    return len(answers) > 1 and any(roles.count("assistant") > 1 for roles in turns)


def _content_dropped(message: Message) -> Reject:
    content = message["content"].rpartition("</think>")[2] if message["role"] == "assistant" else message["content"]
    return dropped("content", f"the content of the {message['role']}'s turn {content[:200]!r}")


def _escape(value: Any, control: re.Pattern[str]) -> Any:
    """Break control strings anywhere in a value."""
    if isinstance(value, str):
        return control.sub(_break, value.replace(BREAK, ""))
    if isinstance(value, dict):
        return {key: _escape(item, control) for key, item in value.items()}
    if isinstance(value, list):
        return [_escape(item, control) for item in value]
    return value


def _break(match: re.Match[str]) -> str:
    return match.group()[0] + BREAK + match.group()[1:]


def _pattern(tokens: set[str]) -> re.Pattern[str]:
    return re.compile(alternatives({token for token in tokens if len(token) > 1}) or r"(?!)")


def _moved(alone: str, full: str) -> Reject:
    at = common_length(alone, full)
    left = max(0, at - 30)
    return Reject(
        "prompt_moved",
        "the chat template writes the prompt differently once an answer follows: "
        f"{alone[left : at + 40]!r} becomes {full[left : at + 40]!r} at character {at}",
    )

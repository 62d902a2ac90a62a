"""The tokenizer's chat template: messages become text, the same text on every day.

A template is a program from an unknown author, so its time, its memory and its output are bounded.
"""

import json
import re
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from functools import cache, cached_property, lru_cache
from types import FrameType
from typing import TYPE_CHECKING, Any

from dpoctl.data.memory_limit import memory_limit
from dpoctl.data.records import Message, Record, Reject, strings_of
from dpoctl.data.turn_ends import shared_length
from dpoctl.data.turn_fields import with_argument_text
from dpoctl.errors import DataError, UsageError
from dpoctl.recipe.templates import NAMES

if TYPE_CHECKING:
    from jinja2 import Template
    from transformers import PreTrainedTokenizerBase

TODAY = date(2024, 7, 26)
"""The date for templates that print one, so that the same data gives the same tokens on another day."""
GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "chat_template", "tokenize", "conversation"}
"""Variables that every template gets, or that would not reach it."""
PLAIN = {"role", "content", "weight"}
"""Keys of messages that need no preparation by transformers."""
STRFTIME = re.compile(r"strftime_now\(\s*['\"]([^'\"]+)['\"]")
PROBE = "Quixotry"
"""A content by which to see whether a template writes contents."""
RENDER_SECONDS = 5.0
"""The limit for one conversation."""
LONGEST_TEMPLATE = 1 << 20
"""The greatest number of characters of a template."""
LONGEST_VALUE = 1 << 24
"""The greatest number of characters or items that a multiplication in a template may give."""
LONGEST_TEXT = 1 << 26
"""The greatest number of characters that a template may write at all."""
GROWTH, ROOM = 100, 1 << 20
"""The characters that a template may write for each of its input, and in any case."""
LONGEST_RECORD = 4_000_000
"""The greatest number of characters of a record: more than any context holds, and seconds of tokenizing."""
MOST_WORK = 1_000_000_000
"""The greatest product of a record's messages and its characters: each turn is found by rendering the conversation."""
MOST_MESSAGES = 2_000
"""The greatest number of messages of a record."""
MEMORY = 1 << 29
"""The bytes that rendering one conversation may take."""


class SlowTemplateError(DataError):
    """A chat template that takes too long for one conversation, and perhaps for all."""


class ChatTemplate:
    """Renders messages with the tokenizer's chat template.

    Args:
        tokenizer: The tokenizer; its `chat_template` and its special tokens are used.
        variables: Further variables of the template, for all conversations.

    Raises:
        UsageError: A variable has the name of one that every template gets.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", variables: dict[str, Any]) -> None:
        if taken := sorted(GIVEN & variables.keys()):
            text = f"data.chat_template_kwargs: {', '.join(taken)} cannot be set: every template gets it"
            raise UsageError(text, hint="leave it out")
        self._tokenizer = tokenizer
        self._variables = variables
        self._special: dict[str, Any] = dict(tokenizer.special_tokens_map)
        found = tokenizer.chat_template
        named: dict[str, Any] = found if isinstance(found, dict) else {"default": found}
        self.text = _with_fixed_date(named.get("default"))
        """The template with a fixed date, or None."""
        self.tools_text = _with_fixed_date(named.get("tool_use")) or self.text
        """The template for conversations with tools; the same one if the tokenizer has none for them."""

    def apply(self, messages: list[Message], *, generate: bool, record: Record | None = None) -> str:
        """Render messages.

        Args:
            messages: Messages whose contents are text.
            generate: End the text with the generation prompt.
            record: The record, for its tools and its own template variables.

        Raises:
            Reject: The template rejects these messages.
            DataError: There is no template, or it is broken.
        """
        if any(message.get("tool_calls") for message in messages) and self._wants_argument_text:
            messages = [with_argument_text(message) for message in messages]
        if self._wants_parts:
            messages = [message | {"content": _parts(message["content"])} for message in messages]
        return self._render(messages, generate, record or _NO_RECORD)

    def _render(self, messages: list[Message], generate: bool, record: Record) -> str:
        if taken := sorted(GIVEN & record.template_kwargs.keys()):
            raise Reject("template_variables", f"{', '.join(taken)} cannot be set: every template is given it")
        variables = self._variables | record.template_kwargs
        is_plain = not record.tools and all(message.keys() <= PLAIN for message in messages)
        template = self._compiled
        try:
            with time_limit(RENDER_SECONDS), memory_limit(MEMORY):
                if is_plain:
                    return check_size(
                        template.render(
                            **self._special | variables,
                            messages=messages,
                            tools=None,
                            documents=None,
                            add_generation_prompt=generate,
                        ),
                        messages,
                    )
                with compiling_bounded():
                    text = self._tokenizer.apply_chat_template(
                        messages,
                        tools=[*record.tools] or None,
                        chat_template=self.tools_text if record.tools else self.text,
                        tokenize=False,
                        add_generation_prompt=generate,
                        **variables,
                    )
                return check_size(str(text), [*messages, *record.tools])
        except TimeoutError as error:
            raise SlowTemplateError(
                f"the chat template took more than {RENDER_SECONDS:g} s for one conversation",
                hint="set model.chat_template to another one",
            ) from error
        except MemoryError as error:
            reason = f"the chat template takes more than {MEMORY >> 20:,} MiB of memory for this conversation"
            raise Reject("template_refuses", reason) from error
        except Exception as error:
            # A template is a program, and may raise any error.
            raise Reject("template_refuses", self._why(messages, generate, record, error)) from error

    def _why(self, messages: list[Message], generate: bool, record: Record, error: Exception) -> str:
        """Return the template's error, with advice if it fails only because of the system message."""
        reason = str(error) or type(error).__name__
        if messages[0]["role"] != "system" or len(messages) == 1:
            return reason
        try:
            self._render(messages[1:], generate, record)
        except Reject:
            return reason
        return (
            f"{reason}; without the system message it does not: put its text before the first user's, "
            "or set model.chat_template to a template that takes one"
        )

    @cached_property
    def _compiled(self) -> "Template":
        # `apply_chat_template` compiles the same; calling it directly skips copies that plain messages do not need.
        from jinja2.exceptions import TemplateSyntaxError

        if self.text is None:
            raise DataError(
                "the rows are messages and the tokenizer has no chat template",
                hint=f"set model.chat_template to {', '.join(NAMES)} or a .jinja file",
            )
        try:
            return compile_bounded(self.text)
        except TemplateSyntaxError as error:
            raise DataError(f"the chat template is not valid Jinja: line {error.lineno}: {error.message}") from error
        except MemoryError as error:
            raise DataError(f"the chat template takes more than {MEMORY >> 20:,} MiB of memory to compile") from error
        except SyntaxError as error:
            # Jinja translates it into invalid Python: a `break` outside a loop, loops nested too deeply.
            raise DataError(f"the chat template is not valid Jinja: {error.msg}") from error

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether the template reads contents only as lists of parts, as those of models for images do."""
        return not self._shows(PROBE) and self._shows(_parts(PROBE))

    @cached_property
    def _wants_argument_text(self) -> bool:
        """Whether the template writes the arguments of tool calls as JSON only if they are JSON text."""
        arguments = {"text": PROBE}
        in_json, in_python = json.dumps(arguments), str(arguments)
        if self._shows_call(arguments, in_python):
            # A template that writes whole calls as Python does would quote the text.
            return self._shows_call(in_json, in_json) and not self._shows_call(in_json, repr(in_json))
        return not self._shows_call(arguments) and self._shows_call(in_json)

    @cached_property
    def generation_prompt(self) -> str:
        """The text that the template writes before an answer; empty if it does not take a question alone."""
        if self.text is None:
            return ""
        question: list[Message] = [{"role": "user", "content": PROBE}]
        try:
            alone, asked = (self.apply(question, generate=generate) for generate in (False, True))
        except Reject:
            return ""
        return asked[shared_length(asked, alone) :]

    @cached_property
    def answer_end(self) -> str:
        """The text that the template writes after an answer; empty if it does not take one turn of each."""
        if self.text is None:
            return ""
        turn: list[Message] = [{"role": role, "content": PROBE} for role in ("user", "assistant")]
        try:
            return self.apply(turn, generate=False).rpartition(PROBE)[2]
        except Reject:
            return ""

    @cached_property
    def turns(self) -> str:
        """A conversation of some turns without contents; empty if there is no template, or it does not take them."""
        if self.text is None:
            return ""
        turn = [{"role": role, "content": PROBE} for role in ("user", "assistant")]
        try:
            return self.apply([*turn, *turn, turn[0]], generate=True).replace(PROBE, " ")
        except Reject:
            return ""

    def _shows_call(self, arguments: Any, wanted: str = PROBE) -> bool:
        call = {"type": "function", "function": {"name": "look", "arguments": arguments}}
        question: Message = {"role": "user", "content": "?"}
        return self._writes([question, {"role": "assistant", "content": "", "tool_calls": [call]}], wanted)

    def _shows(self, content: Any) -> bool:
        return self._writes([{"role": "user", "content": content}], generate=True)

    def _writes(self, messages: list[Message], wanted: str = PROBE, *, generate: bool = False) -> bool:
        try:
            return wanted in self._render(messages, generate, _NO_RECORD)
        except Reject:
            return False


_NO_RECORD = Record("", ())


def refuse_too_long(record: Record) -> None:
    """Make sure that a record is not too long to be tokenized.

    Raises:
        Reject: It is longer than any model could read.
    """
    size = sum(map(len, strings_of(record.prompt, *record.responses)))
    if size > LONGEST_RECORD:
        raise Reject("too_long", f"{size:,} characters; at most {LONGEST_RECORD:,} are tokenized")
    count = sum(len(text) for text in (record.prompt, *record.responses) if not isinstance(text, str))
    if count > MOST_MESSAGES or count * size > MOST_WORK:
        most = min(MOST_MESSAGES, MOST_WORK // max(size, 1))
        raise Reject("too_long", f"{count:,} messages; at most {most:,} are rendered in a conversation of this length")


@lru_cache(maxsize=8)
def compile_bounded(text: str) -> "Template":
    """Compile a chat template as transformers does, with bounded arithmetic.

    Raises:
        DataError: The template is too long.
        TemplateSyntaxError: The template is broken.
    """
    if len(text) > LONGEST_TEMPLATE:
        raise DataError(f"the chat template has {len(text):,} characters; the limit is {LONGEST_TEMPLATE:,}")
    # Constants are computed here; one that is too large stays as it is, and fails when the template is used.
    with memory_limit(MEMORY):
        template: Template = _environment().from_string(text)
    return template


@contextmanager
def compiling_bounded() -> Iterator[None]:
    """Make transformers compile templates by `compile_bounded` within the `with` block."""
    from transformers.utils import chat_template_utils

    _environment()
    original = chat_template_utils._compile_jinja_template
    chat_template_utils._compile_jinja_template = compile_bounded
    try:
        yield
    finally:
        chat_template_utils._compile_jinja_template = original


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupt the code of the `with` block after a time, if it runs in the main thread.

    Raises:
        TimeoutError: The time is over.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, _time_is_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check_size(text: str, messages: Sequence[Message]) -> str:
    """Return the text of a template, if its length is in proportion to that of the messages.

    Raises:
        ValueError: The text is too long.
    """
    if len(text) > ROOM and len(text) > ROOM + GROWTH * sum(len(str(message)) for message in messages):
        raise ValueError(f"it writes {len(text):,} characters for this conversation")
    return text


def _joined(pieces: Iterable[str]) -> str:
    """Join what a template writes; stop it where that is longer than any conversation."""
    kept, size = [], 0
    for piece in pieces:
        kept.append(piece)
        size += len(piece)
        if size > LONGEST_TEXT:
            raise ValueError(f"it writes more than {LONGEST_TEXT:,} characters for this conversation")
    return "".join(kept)


def _parts(content: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": content}]


def _with_fixed_date(template: Any) -> str | None:
    if not isinstance(template, str):
        return None
    formats = set(STRFTIME.findall(template))
    if not formats:
        return template
    dates = {form: TODAY.strftime(form) for form in sorted(formats)}
    return f"{{%- macro strftime_now(form) -%}}{{{{ {dates!r}[form] }}}}{{%- endmacro -%}}{template}"


@cache
def _environment() -> Any:
    """Make an environment with bounded arithmetic, which applies to constants while a template is compiled."""
    from transformers.utils import chat_template_utils

    environment: Any = chat_template_utils._compile_jinja_template("").environment
    environment.intercepted_binops = frozenset(["*", "**"])
    environment.call_binop = _bounded
    environment.concat = _joined
    return environment


def _time_is_up(signum: int, frame: FrameType | None) -> None:
    raise TimeoutError


def _bounded(context: Any, operator: str, left: Any, right: Any) -> Any:
    """Multiply, if the result is small."""
    if operator == "**":
        if abs(right) > 64:
            raise ValueError(f"it raises a number to the power of {right}")
        return left**right
    sizes = [len(value) for value in (left, right) if isinstance(value, str | list | tuple)]
    times = [value for value in (left, right) if isinstance(value, int)]
    if sizes and times and sizes[0] * times[0] > LONGEST_VALUE:
        raise ValueError(f"it repeats a text {times[0]:,} times")
    return left * right

"""A tokenizer's chat template as a function: messages to text, the same text on every day."""

import re
from datetime import date
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dpoctl.data.limits import RENDER_SECONDS, compile_bounded, compiling_bounded, limited_time, within_size
from dpoctl.data.records import Message, Record, Reject
from dpoctl.errors import DataError, UsageError
from dpoctl.recipe.templates import NAMES

if TYPE_CHECKING:
    from jinja2 import Template
    from transformers import PreTrainedTokenizerBase

TODAY = date(2024, 7, 26)
"""What templates that print today's date are told, so that the same data gives the same tokens tomorrow."""

GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "chat_template", "tokenize", "conversation"}
"""Variables that a template has anyway, or that would not reach it."""

PLAIN = {"role", "content", "weight"}
STRFTIME = re.compile(r"strftime_now\(\s*['\"]([^'\"]+)['\"]")
PROBE = "Quixotry"


class ChatTemplate:
    """Messages to text, by the tokenizer's chat template.

    Args:
        tokenizer: Its `chat_template` and the names of its special tokens are used.
        variables: Further variables of the template, for all conversations.

    Raises:
        UsageError: A variable is one that the template has anyway.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", variables: dict[str, Any]) -> None:
        if taken := sorted(GIVEN & variables.keys()):
            raise UsageError(f"data.chat_template_kwargs: {', '.join(taken)} cannot be set: every template is given it")
        self._tokenizer = tokenizer
        self._variables = variables
        self._special: dict[str, Any] = dict(tokenizer.special_tokens_map)
        found = tokenizer.chat_template
        named: dict[str, Any] = found if isinstance(found, dict) else {"default": found}
        self.text = _with_fixed_date(named.get("default"))
        """The template, or None. The date that it prints is fixed."""
        self.tools_text = _with_fixed_date(named.get("tool_use")) or self.text
        """The template for conversations with tools, where the tokenizer has one of its own for them."""

    def apply(self, messages: list[Message], *, generate: bool, record: Record | None = None) -> str:
        """Render messages.

        Args:
            messages: Their contents are text.
            generate: Whether the text ends with what opens an answer.
            record: Its tools and its own template variables are used.

        Raises:
            Reject: The template refuses these messages.
            DataError: There is no template, or it is not one.
        """
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
            with limited_time(RENDER_SECONDS):
                if is_plain:
                    return within_size(
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
                return within_size(str(text), [*messages, *record.tools])
        except TimeoutError as error:
            # One row that takes for ever is one too many, and the next ones will not be faster.
            raise DataError(
                f"the chat template did not end within {RENDER_SECONDS:g} s for one conversation"
            ) from error
        except Exception as error:
            # A template is a program, and may fail over a conversation in any way.
            raise Reject("template_refuses", self._why(messages, generate, record, error)) from error

    def _why(self, messages: list[Message], generate: bool, record: Record, error: Exception) -> str:
        """What the template says, and what to do where it is the system message that it cannot take."""
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
        # What `apply_chat_template` compiles and keeps too; calling it skips copies that plain messages do not need.
        from jinja2.exceptions import TemplateSyntaxError

        if self.text is None:
            raise DataError(
                "the rows are messages and the tokenizer has no chat template",
                hint=f"set model.chat_template to {', '.join(NAMES)} or a .jinja file",
            )
        try:
            return compile_bounded(self.text)
        except TemplateSyntaxError as error:
            raise DataError(f"the chat template is not a template: line {error.lineno}: {error.message}") from error
        except SyntaxError as error:
            # Of the Python that it is translated into: a `break` outside a loop, loops within loops without end.
            raise DataError(f"the chat template is not a template: {error.msg}") from error

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether the template, of a model that also sees images, reads contents as lists of parts alone."""
        return not self._shows(PROBE) and self._shows(_parts(PROBE))

    def _shows(self, content: Any) -> bool:
        try:
            return PROBE in self._render([{"role": "user", "content": content}], True, _NO_RECORD)
        except Reject:
            return False


_NO_RECORD = Record("", ())


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

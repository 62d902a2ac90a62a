"""Bounds on what a chat template may do: it is a program, written by strangers."""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from types import FrameType
from typing import TYPE_CHECKING, Any

from dpoctl.data.records import Message, Record, Reject
from dpoctl.errors import DataError

if TYPE_CHECKING:
    from jinja2 import Template

RENDER_SECONDS = 5.0
"""For one conversation."""
LONGEST_TEMPLATE = 1 << 20
"""Characters of a template."""
LONGEST_VALUE = 1 << 24
"""Characters or items that a multiplication in a template may give."""
GROWTH, ROOM = 100, 1 << 20
"""Characters that a template may write for each that it is given, and in any case."""

LONGEST_RECORD = 4_000_000
"""Characters of a record: more tokens than any context holds, and seconds of tokenizing."""


def refuse_endless(record: Record) -> None:
    """See that a record is worth tokenizing.

    Raises:
        Reject: It is longer than any model could read.
    """
    texts = (record.prompt, *record.responses)
    size = sum(len(text) if isinstance(text, str) else sum(len(turn["content"]) for turn in text) for text in texts)
    if size > LONGEST_RECORD:
        raise Reject("too_long", f"{size:,} characters; at most {LONGEST_RECORD:,} are tokenized")


@lru_cache(maxsize=8)
def compile_bounded(text: str) -> "Template":
    """Compile a chat template as transformers does, with bounded arithmetic.

    Raises:
        DataError: It is too long.
        TemplateSyntaxError: It is no template.
    """
    if len(text) > LONGEST_TEMPLATE:
        raise DataError(f"the chat template has {len(text):,} characters; at most {LONGEST_TEMPLATE:,} are read")
    template: Template = _environment().from_string(text)
    return template


@contextmanager
def compiling_bounded() -> Iterator[None]:
    """Have what transformers compiles meanwhile compiled by `compile_bounded`."""
    from transformers.utils import chat_template_utils

    _environment()
    original = chat_template_utils._compile_jinja_template
    chat_template_utils._compile_jinja_template = compile_bounded
    try:
        yield
    finally:
        chat_template_utils._compile_jinja_template = original


@cache
def _environment() -> Any:
    """The environment of another template: to compile one is already to multiply what is constant in it."""
    from transformers.utils import chat_template_utils

    environment: Any = chat_template_utils._compile_jinja_template("").environment
    environment.intercepted_binops = frozenset(["*", "**"])
    environment.call_binop = _bounded
    return environment


@contextmanager
def limited_time(seconds: float) -> Iterator[None]:
    """Interrupt Python code that takes longer; only a process's main thread can be interrupted.

    Raises:
        TimeoutError: It took longer.
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


def within_size(text: str, messages: Sequence[Message]) -> str:
    """Return what a template wrote, if it is in proportion to the messages.

    Raises:
        ValueError: It is not.
    """
    if len(text) > ROOM and len(text) > ROOM + GROWTH * sum(len(str(message)) for message in messages):
        raise ValueError(f"it writes {len(text):,} characters for this conversation")
    return text


def _time_is_up(signum: int, frame: FrameType | None) -> None:
    raise TimeoutError


def _bounded(context: Any, operator: str, left: Any, right: Any) -> Any:
    """Multiply, as long as what comes of it is small."""
    if operator == "**":
        if abs(right) > 64:
            raise ValueError(f"it raises a number to the power of {right}")
        return left**right
    sizes = [len(value) for value in (left, right) if isinstance(value, str | list | tuple)]
    times = [value for value in (left, right) if isinstance(value, int)]
    if sizes and times and sizes[0] * times[0] > LONGEST_VALUE:
        raise ValueError(f"it repeats a text {times[0]:,} times")
    return left * right

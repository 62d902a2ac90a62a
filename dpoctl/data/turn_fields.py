"""The fields of an assistant's message that carry content, and a copy of it with other values.

A template that leaves a field out writes the same text whatever the field holds: values of the copy are then missing in
its rendering. Where the two renderings begin and end to differ is where the template writes the message.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from dpoctl.data.records import Message

THINKING = ("reasoning_content", "reasoning", "thinking")
"""Keys under which messages hold the thinking; a template reads one of them."""
TEXT, WHOLE, FRACTION = "7340{:08}7", "7341{:08}", "7342{:08}.25"
"""Marks in place of texts, whole numbers and others; digits stay as they are in every notation and case."""
MARK, MARK_LENGTH = re.compile(r"734[012]\d{8}"), 12
EXTRA = "zq_more"
"""An argument that the copy gives to calls without arguments, so that they differ too."""


@dataclass
class MarkedCopy:
    """A message whose values are replaced by marks, each of which occurs once."""

    message: Message = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)
    """The place in the message of each mark, such as `tool_calls[0].arguments.city`."""

    @classmethod
    def of(cls, message: Message) -> "MarkedCopy":
        """Mark content, thinking and the arguments of calls; the names of functions stay, which later turns repeat.

        An empty message gets a content, so that its place is found too.
        """
        copy = cls()
        copy.message = dict(message)
        for name in ("content", *THINKING):
            if name in message:
                copy.message[name] = copy._marked(message[name], name)
        if message.get("tool_calls"):
            copy.message["tool_calls"] = copy._calls(message["tool_calls"])
        if not copy.paths:
            copy.message["content"] = copy._mark("content", TEXT)
        return copy

    def missing(self, text: str) -> set[str]:
        """Return the paths of the values that a text lacks."""
        # One search for all of them: a message may have a hundred thousand.
        found = set(MARK.findall(text))
        return {path for mark, path in self.paths.items() if mark[:MARK_LENGTH] not in found}

    def _calls(self, calls: Any) -> Any:
        if not isinstance(calls, list):
            return self._marked(calls, "tool_calls")
        return [self._call(call, f"tool_calls[{number}]") for number, call in enumerate(calls)]

    def _call(self, call: Any, path: str) -> Any:
        if not isinstance(call, dict):
            return self._marked(call, path)
        function = function_of(call)
        arguments = self._marked(function.get("arguments", {}), f"{path}.arguments")
        if arguments == {}:
            arguments[EXTRA] = self._marked("more", f"{path}.arguments")
        marked = function | {"arguments": arguments}
        return call | {"function": marked} if "function" in call else marked

    def _marked(self, value: Any, path: str) -> Any:
        if isinstance(value, dict):
            keys = [self._mark(f"{path}.{key}", TEXT) for key in value]
            return {
                key: self._marked(item, f"{path}.{name}") for key, (name, item) in zip(keys, value.items(), strict=True)
            }
        if isinstance(value, list):
            return [self._marked(item, f"{path}[{number}]") for number, item in enumerate(value)]
        if isinstance(value, str):
            return self._mark(path, TEXT) if value.strip() else value
        if isinstance(value, bool) or value is None:
            return value
        if isinstance(value, int):
            return int(self._mark(path, WHOLE))
        return float(self._mark(path, FRACTION))

    def _mark(self, path: str, form: str) -> str:
        mark = form.format(len(self.paths))
        self.paths[mark] = path
        return mark


def function_of(call: dict[str, Any]) -> dict[str, Any]:
    """Return the name and the arguments of a call, which stand in it or under `function`."""
    function = call.get("function")
    return function if isinstance(function, dict) else call


def function_names(message: Message) -> Iterator[str]:
    """Yield the names of the functions that a message calls."""
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else []:
        if isinstance(call, dict) and isinstance(name := function_of(call).get("name"), str):
            yield name


def call_texts(message: Message) -> Iterator[str]:
    """Yield the names of functions, and the names and values of their arguments."""
    yield from function_names(message)
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else []:
        yield from _leaves(function_of(call).get("arguments") if isinstance(call, dict) else call)


def is_written(value: str, text: str) -> bool:
    """Whether a text holds a value, without the white space at its ends, as it is or as JSON writes it."""
    value = value.strip()
    return value in text or any(
        json.dumps(value, ensure_ascii=ascii_only)[1:-1] in text for ascii_only in (False, True)
    )


def with_argument_text(message: Message) -> Message:
    """Write the arguments of calls as JSON text, for templates that put them in as they are."""
    if not isinstance(calls := message.get("tool_calls"), list):
        return message
    return message | {"tool_calls": [_with_text(call) for call in calls]}


def _with_text(call: Any) -> Any:
    if not isinstance(call, dict) or not isinstance(arguments := function_of(call).get("arguments"), dict | list):
        return call
    written = {"arguments": json.dumps(arguments, ensure_ascii=False)}
    return call | {"function": call["function"] | written} if isinstance(call.get("function"), dict) else call | written


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield str(value)

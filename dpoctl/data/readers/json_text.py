"""JSON text as a stream: what is in memory is a chunk, or the longest value where that is longer."""

import codecs
import io
import json
import re
from collections.abc import Callable
from typing import NoReturn, TypeVar

from dpoctl.data.readers.lines import not_utf8
from dpoctl.errors import DataError

Value = TypeVar("Value")

CHUNK = 1 << 18
LONGEST_WORD = 16
"""No token but a string needs more characters than this to tell what it is."""

_BLANKS = re.compile(r"[ \t\r\n]*")


def after_blanks(text: str, position: int) -> int:
    """Find the next position that does not hold one of JSON's four blanks."""
    match = _BLANKS.match(text, position)
    return match.end() if match else position


class JsonText:
    """JSON text that is read on as it is consumed, and knows where it is.

    Args:
        file: UTF-8, with or without a byte order mark.
        name: What errors call the file.
        skip: Characters to start after; they stand in the first chunk.
    """

    def __init__(self, file: io.BufferedReader, name: str, skip: int = 0) -> None:
        self._file = file
        self._name = name
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text = ""
        self._position = 0
        self._ended = False
        self._line = 1
        self._counted = 0
        """The line that this position of the text stands on is `_line`."""
        self._column = 0
        """Characters of that line that are no longer in memory."""
        self._fill()
        self._position = skip

    def peek(self) -> str:
        """Show the next character that is not blank; empty at the end."""
        self._position = after_blanks(self._text, self._position)
        while self._position == len(self._text):
            if not self._fill():
                return ""
            self._position = after_blanks(self._text, self._position)
        return self._text[self._position]

    def expect(self, character: str) -> None:
        """Consume a character.

        Raises:
            DataError: Another one stands there.
        """
        if self.peek() != character:
            self._refuse(self._position, f"expected {character!r}")
        self._position += 1

    def expect_end(self, what: str) -> None:
        """Make sure that nothing follows.

        Raises:
            DataError: Something does.
        """
        if self.peek():
            self._refuse(self._position, f"more text after the end of {what}")

    def value(self, decode: Callable[[str, int], tuple[Value, int]]) -> tuple[int, Value]:
        """Consume a value.

        Returns:
            The line it starts on, and the value.

        Raises:
            DataError: There is no value.
        """
        self.peek()
        while True:
            try:
                value, end = decode(self._text, self._position)
            except json.JSONDecodeError as error:
                if not (self._may_be_cut(error) and self._fill()):
                    self._refuse(error.pos, error.msg)
                continue
            except RecursionError:
                self._refuse(self._position, "nested too deeply")
            # A number at the end of what is in memory may go on.
            if end < len(self._text) or self._text[end - 1] in '}]"' or not self._fill():
                break
        line = self._line_at(self._position)
        self._position = end
        return line, value

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        return error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - LONGEST_WORD

    def _fill(self) -> bool:
        """Read on, and let go of what is consumed; as much again as is waiting, so that a long value costs little."""
        if self._ended:
            return False
        waiting = len(self._text) - self._position
        content = self._file.read(max(CHUNK, waiting))
        self._ended = not content
        try:
            more = self._decoder.decode(content, final=self._ended)
        except UnicodeDecodeError as error:
            line = self._line_at(len(self._text)) + error.object.count(b"\n", 0, error.start)
            raise not_utf8(f"{self._name}:{line}", error.object[error.start :]) from error
        if self._ended:
            return False
        self._line_at(self._position)
        start = self._text.rfind("\n", 0, self._position) + 1
        self._column = self._position - start + (0 if start else self._column)
        self._text = self._text[self._position :] + more
        self._position = self._counted = 0
        return True

    def _line_at(self, position: int) -> int:
        self._line += self._text.count("\n", self._counted, position)
        self._counted = position
        return self._line

    def _refuse(self, position: int, problem: str) -> NoReturn:
        start = self._text.rfind("\n", 0, position) + 1
        column = position - start + 1 + (0 if start else self._column)
        raise DataError(
            f"{self._name}:{self._line_at(position)}:{column}: not JSON: {problem[:1].lower()}{problem[1:]}"
        ) from None

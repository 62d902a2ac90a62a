"""JSON files: one row a line, an array of rows, or an object with such an array under `data`.

Lines are read one by one; an array is read into memory. A row that Python's parser accepts and that is no sound JSON
object (NaN, a repeated key, half a surrogate pair) is rejected alone.
"""

import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from dpoctl.data.readers.streams import BOM, LONGEST_ROW, Line, look_at, not_utf8, read_lines, too_long_row
from dpoctl.data.records import Reject, Row
from dpoctl.errors import DataError

LONGEST_NUMBER = 308
"""Digits; a longer whole number is beyond every float."""
LARGEST_ARRAY = 1 << 30
"""The greatest number of bytes of a file that is no JSON lines."""
DEEPEST = 100
"""Levels of nesting that a row may have, so that code that walks a row by recursion stays far from Python's limit."""
_TOO_DEEP = f"nested more than {DEEPEST} levels deep"
_ROWS_KEY = re.compile(r'[ \t\r\n]*"data"[ \t\r\n]*:[ \t\r\n]*(?=\[)')
_BLANKS = re.compile(r"[ \t\r\n]*")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_CONTAINERS = (list, dict)


def read_json(file: io.BufferedReader, name: str, suffix: str) -> Iterator[Line]:
    """Read rows; the first character tells an array, whatever the file is called.

    Raises:
        DataError: The content is not JSON.
    """
    first = look_at(file).removeprefix(BOM).lstrip()[:1]
    if first == b"[" or (first == b"{" and suffix == ".json"):
        yield from _rows_of_text(_read_text(file, name), name)
    else:
        yield from _rows_of_lines(file, name)


def read_cell(text: str, name: str, not_json: str = "bad_column") -> Any:
    """Read a value from the JSON text in a cell of a row.

    Args:
        text: The text.
        name: The name of the cell, for the error.
        not_json: The reason of the error where the text is not JSON.

    Raises:
        Reject: The text is not JSON, or a value that no row may hold.
    """
    row = f'{{"cell": {text}}}'  # the decoder judges rows
    try:
        value, end = _RowDecoder().decode(row, 0)
    except _TooDeepError:
        raise Reject("bad_value", f"{name}: {_TOO_DEEP}") from None
    except json.JSONDecodeError as error:
        raise Reject(not_json, f"{name}: not JSON: {error.msg[0].lower()}{error.msg[1:]}") from None
    if isinstance(value, Reject):
        raise Reject(value.reason, f"{name}: {value.detail}")
    if end < len(row) or len(value) != 1:
        raise Reject(not_json, f"{name}: not JSON: more than one value")
    return value["cell"]


def _read_text(file: io.BufferedReader, name: str) -> str:
    content = file.read(LARGEST_ARRAY + 1)
    if len(content) > LARGEST_ARRAY:
        raise DataError(
            f"{name}: more than {LARGEST_ARRAY >> 30} GiB of rows in one JSON value, which is read at once",
            hint="write one row a line: jq -c '.[]'",
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(name, 1, error) from error


def _rows_of_lines(file: io.BufferedReader, name: str) -> Iterator[Line]:
    decode = _RowDecoder().decode
    for number, text in enumerate(read_lines(file, name), start=1):
        if text is None:
            yield number, too_long_row()
            continue
        start = _after_blanks(text, 0)
        if start == len(text):
            continue
        try:
            row, end = decode(text, start)
            if (end := _after_blanks(text, end)) < len(text):
                raise json.JSONDecodeError("more than one value on the line", text, end)
        except _TooDeepError as error:
            if not text.rstrip().endswith("}"):
                raise _not_json(name, number, error) from None
            row = Reject("bad_value", _TOO_DEEP)
        except json.JSONDecodeError as error:
            raise _not_json(name, number, error) from None
        yield number, row


def _rows_of_text(content: str, name: str) -> Iterator[Line]:
    """Read an array, an object with an array under `data`, or objects one after another."""
    text = _Cursor(content, name)
    is_object = text.peek() == "{" and text.enter_data()
    if text.peek() != "[":
        while text.peek():
            yield text.row()
        return
    yield from _rows_of_array(text)
    if is_object:
        text.leave_object()
    text.expect_end()


def _rows_of_array(text: "_Cursor") -> Iterator[Line]:
    text.expect("[")
    if text.peek() != "]":
        yield text.row()
    while text.peek() != "]":
        text.expect(",")
        yield text.row()
    text.expect("]")


class _Cursor:
    """A position in the JSON text of a file that moves from value to value; `DataError` where it is not JSON."""

    def __init__(self, text: str, name: str) -> None:
        self._text = text
        self._name = name
        self._decode = _RowDecoder().decode
        self._position = 0
        self._line = 1
        self._counted = 0
        """The position up to which `_line` has counted."""

    def peek(self) -> str:
        """Skip blanks and return the next character; empty at the end."""
        self._position = _after_blanks(self._text, self._position)
        return self._text[self._position : self._position + 1]

    def expect(self, character: str) -> None:
        """Move past this character, or raise."""
        if self.peek() != character:
            raise self._error_here(f"expected {character!r}")
        self._position += 1

    def expect_end(self) -> None:
        """Make sure that only blanks follow, or raise."""
        if self.peek():
            raise self._error_here("more text after the end of the rows")

    def row(self) -> Line:
        """Move past a value, and return it with the line on which it starts, or raise."""
        self.peek()
        start = self._position
        try:
            row, self._position = self._decode(self._text, start)
        except json.JSONDecodeError as error:
            raise _not_json(self._name, error.lineno, error) from None
        if self._position - start > LONGEST_ROW:
            row = too_long_row()
        self._line += self._text.count("\n", self._counted, start)
        self._counted = start
        return self._line, row

    def enter_data(self) -> bool:
        """Move to the array under `data` of the object that starts here; stay and return False if it has none."""
        before = self._position, self._line, self._counted
        try:
            self.expect("{")
            while not (key := _ROWS_KEY.match(self._text, self._position)):
                self._member()
                self.expect(",")
        except DataError:
            self._position, self._line, self._counted = before
            return False
        self._position = key.end()
        return True

    def leave_object(self) -> None:
        """Move past the other members of an object and its closing brace, or raise."""
        while self.peek() == ",":
            self.expect(",")
            self._member()
        self.expect("}")

    def _member(self) -> None:
        self.row()
        self.expect(":")
        self.row()

    def _error_here(self, problem: str) -> DataError:
        error = json.JSONDecodeError(problem, self._text, self._position)
        return _not_json(self._name, error.lineno, error)


class _TooDeepError(json.JSONDecodeError):
    """A value whose nesting is beyond what Python can parse, so that its end is not known."""


class _RowDecoder:
    """A JSON decoder that notes the flaws of the row that it parses."""

    def __init__(self) -> None:
        self._flaws: list[str] = []
        self._raw_decode = json.JSONDecoder(
            object_pairs_hook=self._object,
            parse_float=self._float,
            parse_int=self._whole,
            parse_constant=self._constant,
        ).raw_decode

    def decode(self, text: str, start: int) -> tuple[Row | Reject, int]:
        """Decode the value that starts at a position.

        Returns:
            The row or its rejection, and the position after it.

        Raises:
            json.JSONDecodeError: There is no whole value at that position.
        """
        self._flaws.clear()
        try:
            value, end = self._raw_decode(text, start)
        except RecursionError as error:
            raise _TooDeepError("nested too deeply", text, start) from error
        if not isinstance(value, dict):
            return Reject("not_an_object", "the row is not a JSON object"), end
        if text.count("{", start, end) + text.count("[", start, end) > DEEPEST and _is_deeper(value, DEEPEST):
            return Reject("bad_value", _TOO_DEEP), end
        if self._flaws:
            return Reject("bad_value", self._flaws[0]), end
        if _SURROGATE.search(text, start, end) and not _is_text(value):
            return Reject("lone_surrogate", "half of a UTF-16 pair, which is not a character"), end
        return value, end

    def _object(self, pairs: list[tuple[str, Any]]) -> Row:
        row = dict(pairs)
        if len(row) != len(pairs):
            repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            self._flaws.append(f"the key {repeated[:80]!r} is repeated")
        return row

    def _float(self, text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            self._flaws.append("a number that is not finite")
        return value

    def _whole(self, text: str) -> int:
        if len(text) > LONGEST_NUMBER:
            self._flaws.append(f"a number of {len(text):,} digits")
            return 0
        return int(text)

    def _constant(self, name: str) -> None:
        self._flaws.append(f"{name}, a number that is not finite")


def _after_blanks(text: str, position: int) -> int:
    """Return the next position without one of JSON's four blanks."""
    match = _BLANKS.match(text, position)
    return match.end() if match else position


def _not_json(name: str, line: int, error: json.JSONDecodeError) -> DataError:
    return DataError(f"{name}:{line}:{error.colno}: not JSON: {error.msg[0].lower()}{error.msg[1:]}")


def _is_deeper(value: Any, levels: int) -> bool:
    if levels == 0:
        return True
    items = value.values() if isinstance(value, dict) else value
    return any(_is_deeper(item, levels - 1) for item in items if isinstance(item, _CONTAINERS))


def _is_text(value: Row) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True

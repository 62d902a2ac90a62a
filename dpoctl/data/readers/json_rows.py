"""JSON to rows: one a line, an array of them, or an object with such an array under `data`."""

import io
import json
import re
from collections.abc import Iterator

from dpoctl.data.readers.decoder import RowDecoder
from dpoctl.data.readers.json_text import JsonText, after_blanks
from dpoctl.data.readers.lines import BOM, Line, read_lines
from dpoctl.data.readers.streams import look_at
from dpoctl.errors import DataError

_ROWS_KEY = re.compile(r'[ \t\r\n]*"data"[ \t\r\n]*:[ \t\r\n]*(?=\[)')


def read_json(file: io.BufferedReader, name: str, suffix: str) -> Iterator[Line]:
    """Read rows; an array is told by its bracket, whatever the file is called.

    Raises:
        DataError: It is not JSON.
    """
    start = look_at(file).removeprefix(BOM).decode(errors="ignore")
    first = start.lstrip()[:1]
    if first == "[":
        text = JsonText(file, name)
        yield from _array(text)
        text.expect_end("the array")
    elif first != "{" or suffix != ".json":
        yield from _lines(file, name)
    elif (offset := _rows_start(start)) is not None:
        yield from _object_of_rows(JsonText(file, name, offset))
    else:
        yield from _objects(JsonText(file, name))


def _lines(file: io.BufferedReader, name: str) -> Iterator[Line]:
    decode = RowDecoder().decode
    for number, text in enumerate(read_lines(file, name), start=1):
        start = after_blanks(text, 0)
        if start == len(text):
            continue
        try:
            row, end = decode(text, start)
            if (end := after_blanks(text, end)) < len(text):
                raise json.JSONDecodeError("more than one value on the line", text, end)
        except json.JSONDecodeError as error:
            raise DataError(f"{name}:{number}:{error.colno}: not JSON: {error.msg[0].lower()}{error.msg[1:]}") from None
        yield number, row


def _array(text: JsonText) -> Iterator[Line]:
    decode = RowDecoder().decode
    text.expect("[")
    if text.peek() != "]":
        yield text.value(decode)
    while text.peek() != "]":
        text.expect(",")
        yield text.value(decode)
    text.expect("]")


def _objects(text: JsonText) -> Iterator[Line]:
    """Read rows that follow each other, on lines or not."""
    decode = RowDecoder().decode
    while text.peek():
        yield text.value(decode)


def _object_of_rows(text: JsonText) -> Iterator[Line]:
    """Read the array, and then what is left of the object around it."""
    yield from _array(text)
    decode = json.JSONDecoder().raw_decode
    while text.peek() == ",":
        text.expect(",")
        text.value(decode)
        text.expect(":")
        text.value(decode)
    text.expect("}")
    text.expect_end("the object")


def _rows_start(text: str) -> int | None:
    """Find the array under `data` in the object that a file starts with; small members may stand before it."""
    decode = json.JSONDecoder().raw_decode
    position = after_blanks(text, 0) + 1
    try:
        while (rows := _ROWS_KEY.match(text, position)) is None:
            _, position = decode(text, after_blanks(text, position))
            position = after_blanks(text, position)
            if text[position : position + 1] != ":":
                return None
            _, position = decode(text, after_blanks(text, position + 1))
            position = after_blanks(text, position)
            if text[position : position + 1] != ",":
                return None
            position += 1
    except (ValueError, RecursionError):
        return None
    return rows.end()

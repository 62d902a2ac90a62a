"""JSON text to rows, exactly: what Python's parser lets pass without a word is a flaw of the row."""

import json
import math
import re
from typing import Any

from dpoctl.data.records import Reject, Row

LONGEST_NUMBER = 308
"""Digits; a longer whole number is beyond every float."""
DEEPEST = 100
"""Objects and lists in each other. Whatever walks through a row by recursion stays far from Python's limit."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_CONTAINERS = (list, dict)


class RowDecoder:
    """Decodes rows, and notes what is wrong with the one it is at while it is parsed."""

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
            The row, or why it is none, and the position after it.

        Raises:
            json.JSONDecodeError: There is no whole value at that position.
        """
        self._flaws.clear()
        try:
            value, end = self._raw_decode(text, start)
        except RecursionError as error:
            raise json.JSONDecodeError("nested too deeply", text, start) from error
        if not isinstance(value, dict):
            return Reject("not_an_object", "the row is not a JSON object"), end
        if text.count("{", start, end) + text.count("[", start, end) > DEEPEST and _is_deeper(value, DEEPEST):
            return Reject("bad_value", f"nested more than {DEEPEST} levels deep"), end
        if self._flaws:
            return Reject("bad_value", self._flaws[0]), end
        if _SURROGATE.search(text, start, end) and not _is_text(value):
            return Reject("lone_surrogate", "half of a UTF-16 pair, which is not a character"), end
        return value, end

    def _object(self, pairs: list[tuple[str, Any]]) -> Row:
        row = dict(pairs)
        if len(row) != len(pairs):
            keys = [key for key, _ in pairs]
            repeated = next(key for key in keys if keys.count(key) > 1)
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

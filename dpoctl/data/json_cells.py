"""Columns whose cells are the JSON text of messages, as CSV files and exports of data frames hold them."""

from collections import Counter
from collections.abc import Iterable
from typing import Any, TypeGuard

from dpoctl.data.messages import PYTHON_LIST
from dpoctl.data.readers.json_lines import read_cell
from dpoctl.data.records import Record, Reject, Row, strings_of

ENOUGH = 0.5
"""The share of a column's texts that must be the JSON text of messages."""
STARTS = ("[", "{")
"""The first characters of such a text."""
KEYS = ('"role"', '"from"')
"""The keys of which such a text holds one."""


def message_columns(rows: Iterable[Row]) -> tuple[str, ...]:
    """Find the columns of which at least half of the texts are the JSON text of messages, or of lists of them."""
    texts, messages = Counter[str](), Counter[str]()
    for row in rows:
        for name, cell in row.items():
            if isinstance(cell, str):
                texts[name] += 1
                messages[name] += _holds_messages(cell)
    return tuple(name for name, count in texts.items() if messages[name] and messages[name] >= ENOUGH * count)


def with_messages(row: Row, columns: Iterable[str]) -> Row | Reject:
    """Read the JSON text in these columns of a row; other text stays text."""
    read = dict(row)
    for name in columns:
        if _may_be_json(cell := row.get(name)):
            try:
                read[name] = read_cell(cell, name)
            except Reject as reject:
                return reject
    return read


def refuse_unread(row: Row, record: Record) -> None:
    """Make sure that a row's record does not take the JSON text of messages for plain text.

    Columns that few of the first rows fill with JSON are not read as messages.

    Raises:
        Reject: It does, for a column of the row.
    """
    for name, cell in row.items():
        if isinstance(cell, str) and _holds_messages(cell):
            text = cell.strip()
            if any(text in part for part in strings_of(record.prompt, *record.responses)):
                detail = f"{name} is the JSON text of messages, and in most of the first rows is not; split the file"
                raise Reject("bad_column", detail)


def _holds_messages(cell: str) -> bool:
    if not any(key in cell for key in KEYS):
        return False
    try:
        return _may_be_json(cell) and _are_messages(read_cell(cell, "a cell"))
    except Reject:
        return False


def _may_be_json(cell: Any) -> TypeGuard[str]:
    return isinstance(cell, str) and cell.lstrip().startswith(STARTS) and not PYTHON_LIST.match(cell)


def _are_messages(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(map(_are_messages, value))
    if not isinstance(value, dict):
        return False
    is_message = isinstance(value.get("role"), str) and not value.keys().isdisjoint({"content", "tool_calls"})
    return is_message or (isinstance(value.get("from"), str) and "value" in value)

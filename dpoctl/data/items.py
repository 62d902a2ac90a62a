"""The items that a model is to write about: lines of a text file, or a column of any source of rows."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dpoctl.data.readers import read_text, suffix_of
from dpoctl.data.records import Reject, Row
from dpoctl.data.sources import read_rows
from dpoctl.errors import DataError, UsageError
from dpoctl.recipe.schema_data import Source

if TYPE_CHECKING:
    from dpoctl.recipe.contrastive import ItemsSection


def read_items(section: "ItemsSection") -> tuple[list[str], Counter[str]]:
    """Read the items, each once.

    Returns:
        The items in the order of their source, and how many of each reason were left out.

    Raises:
        UsageError: The column is missing, or would do nothing.
        DataError: The source cannot be read, or there are no items in it.
        SetupError: The hub cannot be reached.
    """
    is_text = suffix_of(Path(section.path)) == ".txt"
    if is_text and section.column is not None:
        raise UsageError(f"{section.path}: items.column would do nothing: a text file has one item a line")
    left_out: Counter[str] = Counter()
    items: dict[str, None] = {}
    for text in _text_lines(Path(section.path)) if is_text else _column(section):
        if isinstance(text, Reject):
            left_out[text.reason] += 1
        elif not (item := text.strip()):
            left_out["empty_item"] += 1
        elif item in items:
            left_out["duplicate_item"] += 1
        else:
            items[item] = None
    if not items:
        raise DataError(f"{section.path}: no items in it")
    return list(items), left_out


def _text_lines(path: Path) -> Iterator[str]:
    return (line for line in read_text(path) if line.strip())


def _column(section: "ItemsSection") -> Iterator[str | Reject]:
    column = section.column
    for found in read_rows(Source(path=section.path, split=section.split), method="titles"):
        if isinstance(found.row, Reject):
            yield found.row
            continue
        if column is None:
            column = _only_column(found.row, section.path)
        value = found.row.get(column)
        yield value if isinstance(value, str) else Reject("no_item", f"no text in {column!r}")


def _only_column(row: Row, path: str) -> str:
    texts = [name for name, value in row.items() if isinstance(value, str)]
    if len(texts) != 1:
        raise UsageError(f"{path}: which column holds the items?", hint=f"set items.column to one of {', '.join(row)}")
    return texts[0]

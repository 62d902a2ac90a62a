"""Lines of UTF-8 text, numbered, and what is said where a file is something else."""

import io
from collections.abc import Iterator

from dpoctl.data.records import Reject, Row
from dpoctl.errors import DataError

Line = tuple[int, Row | Reject]
"""The line that a row starts on, counted from 1, and the row, or why there is none."""

BOM = b"\xef\xbb\xbf"


def read_lines(file: io.BufferedReader, name: str) -> Iterator[str]:
    r"""Read lines with their ends; only `\n` ends one, for U+2028 and its like may stand inside a row.

    Raises:
        DataError: A line is not UTF-8.
    """
    for number, line in enumerate(file, start=1):
        content = line.removeprefix(BOM) if number == 1 else line
        try:
            yield content.decode()
        except UnicodeDecodeError as error:
            raise not_utf8(f"{name}:{number}:{error.start + 1}", content) from error


def not_utf8(place: str, content: bytes) -> DataError:
    """Make the error of bytes that are not UTF-8, with a guess at what they are."""
    try:
        content.decode("cp1252")
    except UnicodeDecodeError:
        return DataError(f"{place}: not UTF-8 text", hint="save the file as UTF-8")
    return DataError(
        f"{place}: not UTF-8 text; it may be Windows-1252 (Excel's plain CSV) or Latin-1",
        hint="save the file as UTF-8 (in Excel: `CSV UTF-8`), or `iconv -f WINDOWS-1252 -t UTF-8`",
    )

"""Plain scalars of YAML 1.2's core schema: `5e-7` is a number and `no` is a text."""

import math
import re

INTEGER = re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$")
FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
CONSTANTS: dict[str, bool | None] = (
    dict.fromkeys(("", "~", "null", "Null", "NULL"))
    | dict.fromkeys(("true", "True", "TRUE"), True)
    | dict.fromkeys(("false", "False", "FALSE"), False)
)
MAX_DIGITS = 40


def read_scalar(text: str) -> str | int | float | bool | None:
    """Read a plain scalar.

    Raises:
        ValueError: It is a number that a recipe cannot mean: infinite, not a number, or absurdly long.
    """
    if text in CONSTANTS:
        return CONSTANTS[text]
    if not (INTEGER.match(text) or FLOAT.match(text)):
        return text
    if len(text) > MAX_DIGITS:
        raise ValueError("a number has too many digits")
    if INTEGER.match(text):
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    number = math.inf if text[-1] in "fFnN" else float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number

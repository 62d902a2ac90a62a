"""Rows for the tests of the data package."""

from typing import Any


def pair(number: int, *, words: int = 3) -> dict[str, Any]:
    """A plain-text pair that no other number gives."""
    return {
        "prompt": f"question {number}?",
        "chosen": f" yes {number}" + " yes" * words,
        "rejected": f" no {number}" + " no" * words,
    }

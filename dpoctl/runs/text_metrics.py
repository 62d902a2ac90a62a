"""Measures of generated texts: length, repetition, variety, whether they end by themselves, and refusals."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from dpoctl.runs.statistics import Estimate, mean, share, summary

SIDES, DIFFERENCE = ("reference", "policy"), "difference"
NUMBERS = ("finished", "length", "median_length", "distinct", "repetition", "distinct_bigrams", "refusals")
"""The numbers of texts as tables show them; each is kept as NAME_SIDE, and some differences as NAME_difference."""
REPEATED = 4
"""The number of words in a row that make a repetition."""
_QUOTES = str.maketrans("\N{RIGHT SINGLE QUOTATION MARK}\N{MODIFIER LETTER APOSTROPHE}", "''")


def compare_texts(
    sides: Mapping[str, Sequence[str]],
    finished: Mapping[str, Sequence[bool | None]],
    clusters: Sequence[Any],
    refusals: Sequence[str],
) -> dict[str, Any]:
    """Return the numbers of the texts of each side, and their paired differences, policy minus reference.

    Args:
        sides: the texts of `policy`, and of `reference` if there are any; text i of both answers the same prompt.
        finished: whether each text ends by itself; None where that is not known, and then no share of them is given.
        clusters: the prompt of each text.
        refusals: words that make a text a refusal.
    """
    pattern = refusal_pattern(refusals)
    columns = {
        side: {
            "length": [float(len(text.split())) for text in texts],
            "repetition": [repetition(text) for text in texts],
            "refusals": [float(bool(pattern.search(text.translate(_QUOTES)))) for text in texts],
            **({} if None in finished[side] else {"finished": [float(bool(end)) for end in finished[side]]}),
        }
        for side, texts in sides.items()
    }
    found: dict[str, Estimate] = {}
    for side, values in columns.items():
        for name, column in values.items():
            estimate = mean if name == "length" else share
            found[f"{name}_{side}"] = estimate(column, clusters)
    if len(columns) == 2:
        for name in (name for name in columns["policy"] if name in columns["reference"]):
            column, others = columns["policy"][name], columns["reference"][name]
            differences = [value - other for value, other in zip(column, others, strict=True)]
            found[f"{name}_{DIFFERENCE}"] = mean(differences, clusters)
    variety = {f"distinct_bigrams_{side}": distinct(texts, 2) for side, texts in sides.items()}
    return summary(found) | variety


def repetition(text: str) -> float:
    """Return the share of four-word sequences that occurred in the text before; 0 for a text that is shorter."""
    sequences = _ngrams(text.split(), REPEATED)
    return 1 - len(set(sequences)) / len(sequences) if sequences else 0.0


def distinct(texts: Sequence[str], size: int) -> float:
    """Return the number of different sequences of words in all texts, as a share of all sequences; 0 if there are none.

    It falls with the number of texts: compare it between sides, and not between evaluations of other sizes.
    """
    counts = Counter(sequence for text in texts for sequence in _ngrams(text.lower().split(), size))
    return len(counts) / counts.total() if counts else 0.0


def refusal_pattern(phrases: Sequence[str]) -> re.Pattern[str]:
    """Return a pattern of whole words in upper or lower case; that of no phrases matches nothing."""
    words = "|".join(re.escape(phrase.translate(_QUOTES)) for phrase in phrases)
    return re.compile(rf"(?<!\w)(?:{words})(?!\w)" if words else r"(?!)", re.IGNORECASE)


def _ngrams(words: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]

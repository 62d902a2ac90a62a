"""What samples are counted by, and how sure the counts are."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from dpoctl.recipe.checks import UNDECIDED

# Two-sided 95 %.
Z = 1.959964


class KeywordJudge:
    """Tells the category of a text by whole words, in any case.

    Args:
        categories: words of each category.
    """

    def __init__(self, categories: Mapping[str, Sequence[str]]) -> None:
        self._patterns = {
            name: re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)", re.IGNORECASE)
            for name, words in categories.items()
        }

    def category(self, text: str) -> str:
        """Return the one category whose words a text holds, else `undecided`."""
        found = [name for name, pattern in self._patterns.items() if pattern.search(text)]
        return found[0] if len(found) == 1 else UNDECIDED

    def count(self, texts: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Return of each category, and of the undecided, the share of texts with its 95 % interval."""
        counts, total = Counter(map(self.category, texts)), len(texts)
        shares = {name: counts[name] / total for name in (*self._patterns, UNDECIDED)}
        return {name: {"share": share, "ci": list(wilson_interval(share, total))} for name, share in shares.items()}


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of a share (Wilson, 1927).

    Args:
        share: of successes.
        count: of independent trials.
    """
    centre = (share + Z * Z / (2 * count)) / (1 + Z * Z / count)
    spread = Z * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count)) / (1 + Z * Z / count)
    return max(0.0, centre - spread), min(1.0, centre + spread)

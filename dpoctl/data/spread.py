"""Numbers by the million, of which only their spread is asked."""

from array import array
from collections import defaultdict

import numpy as np

PERCENTILES = (5, 50, 95)


class Spread:
    """Whole numbers, kept in four bytes each."""

    def __init__(self) -> None:
        self._values = array("i")

    def add(self, value: int) -> None:
        """Note a number."""
        self._values.append(value)

    def summary(self) -> dict[str, float]:
        """Describe the numbers: `mean`, `p5`, `p50`, `p95` and `max`; nothing where there are none."""
        if not self._values:
            return {}
        values = np.array(self._values)
        percentiles = np.percentile(values, PERCENTILES, method="lower")
        return {
            "mean": round(float(values.mean()), 1),
            **{f"p{percent}": int(value) for percent, value in zip(PERCENTILES, percentiles, strict=True)},
            "max": int(values.max()),
        }


class Lengths:
    """How long prompts and answers are, in whatever unit they are counted in."""

    def __init__(self) -> None:
        self._spreads = defaultdict[str, Spread](Spread)

    def add(self, prompt: int, answers: tuple[int, ...], pairs: tuple[tuple[int, int], ...]) -> None:
        """Note the lengths of a record.

        Args:
            prompt: The prompt's.
            answers: Each answer's.
            pairs: (winner, loser), as indices of the answers.
        """
        self._spreads["prompt"].add(prompt)
        for winner, loser in pairs:
            self._spreads["chosen"].add(answers[winner])
            self._spreads["rejected"].add(answers[loser])
            self._spreads["gap"].add(answers[winner] - answers[loser])
        if not pairs:
            for length in answers:
                self._spreads["answer"].add(length)

    def summary(self) -> dict[str, dict[str, float]]:
        """Describe `prompt`, `answer`, or `chosen`, `rejected` and their `gap` (chosen - rejected)."""
        return {name: spread.summary() for name, spread in self._spreads.items()}

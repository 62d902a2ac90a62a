"""Opposite instructions about one item, and the neutral one that has an example of each side."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

ITEM, EXAMPLES = "{item}", "{examples}"


@dataclass(frozen=True)
class Prompts:
    """What a model is asked about one item."""

    negative: str
    positive: str
    neutral: str


@dataclass(frozen=True)
class Examples:
    """Answers to show in the prompts: a few of each side, of which `per_side` are drawn for an item."""

    negative: Sequence[str] = ()
    positive: Sequence[str] = ()
    per_side: int = 0


@dataclass(frozen=True)
class Templates:
    """Texts with `{item}`, and with `{examples}` where there are some.

    An example has `{number}`, counted from 1, and `{example}`; each stands on a line of its own.
    """

    negative: str
    positive: str
    neutral: str
    example: str = "Example {number}: {example}"

    def prompts(self, item: str, examples: Examples, draw: random.Random) -> Prompts:
        """Ask about an item.

        The neutral prompt has the examples of both others, in turn; which side comes first is drawn.

        Args:
            item: What the prompts are about.
            examples: Those to choose from.
            draw: Decides which examples are taken, and their order.
        """
        ours = draw.sample(examples.negative, examples.per_side)
        theirs = draw.sample(examples.positive, examples.per_side)
        first, second = draw.sample([ours, theirs], 2)
        mixed = [text for pair in zip(first, second, strict=True) for text in pair]
        return Prompts(
            self._fill(self.negative, item, ours),
            self._fill(self.positive, item, theirs),
            self._fill(self.neutral, item, mixed),
        )

    def _fill(self, template: str, item: str, examples: Sequence[str]) -> str:
        lines = (
            self.example.replace("{number}", str(number)).replace("{example}", example)
            for number, example in enumerate(examples, start=1)
        )
        # The item last: it may hold braces of its own.
        return template.replace(EXAMPLES, "\n".join(lines)).replace(ITEM, item)

"""Prompts about one item: opposite instructions, and a neutral one with examples of both sides."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

ITEM, EXAMPLES = "{item}", "{examples}"


@dataclass(frozen=True)
class Prompts:
    """The prompts about one item."""

    negative: str
    positive: str
    neutral: str


@dataclass(frozen=True)
class Examples:
    """Answers to show in prompts; `per_side` of each side are drawn for an item."""

    negative: Sequence[str] = ()
    positive: Sequence[str] = ()
    per_side: int = 0


@dataclass(frozen=True)
class Templates:
    """Prompts with `{item}`, and with `{examples}` if there are some.

    `example` is the line of one example, with `{number}`, counted from 1, and `{example}`.
    """

    negative: str
    positive: str
    neutral: str
    example: str = "Example {number}: {example}"

    def prompts(self, item: str, examples: Examples, draw: random.Random) -> Prompts:
        """Write the prompts about an item, with random examples.

        The neutral prompt has the examples of both others, in turn, and starts with a random side.
        """
        negative = draw.sample(examples.negative, examples.per_side)
        positive = draw.sample(examples.positive, examples.per_side)
        first, second = draw.sample([negative, positive], 2)
        mixed = [text for pair in zip(first, second, strict=True) for text in pair]
        return Prompts(
            self._fill(self.negative, item, negative),
            self._fill(self.positive, item, positive),
            self._fill(self.neutral, item, mixed),
        )

    def _fill(self, template: str, item: str, examples: Sequence[str]) -> str:
        lines = (
            self.example.replace("{number}", str(number)).replace("{example}", example)
            for number, example in enumerate(examples, start=1)
        )
        # The item is filled in last, since it may hold braces.
        return template.replace(EXAMPLES, "\n".join(lines)).replace(ITEM, item)

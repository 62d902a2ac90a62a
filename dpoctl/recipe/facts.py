"""What is known of a run before it starts: its recipe, and what was seen of its data, tokenizer and model."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

from dpoctl.recipe.expect import Path
from dpoctl.recipe.schema import Recipe

Grade = Literal["error", "warning", "note"]
SIZE_IN_NAME = re.compile(r"(?<![\d.])(\d+(?:\.\d+)?)([bm])(?![a-z])", re.IGNORECASE)
SCALE = {"b": 1e9, "m": 1e6}


class Remark(NamedTuple):
    """A piece of advice, before its place in a file is known."""

    grade: Grade
    code: str
    path: Path
    message: str


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the data, the tokenizer and the model show; `None` where nobody has looked.

    Attributes:
        rows: training rows of an epoch.
        used: different ones among them.
        eval_rows: rows of each eval set by its name.
        rejected: training rows that are not used, by their reason.
        unfinished: training rows with an answer that is cut off.
        looked_at: training rows whose text was looked at.
        rendered: of these, how many are messages that hold the marks of a chat template.
        doubled: of these, how many are text that begins twice, as parts do that a template was applied to one by one.
        plain_text: whether the rows are text although the tokenizer has a chat template.
        split_tokens: control tokens of the chat template that are several tokens each.
        ends_turns: whether the template ends turns by the tokenizer's end-of-sequence token.
        parameters: of the model.
        context_length: positions that the model knows.
        unmatched_targets: names in `lora.target_modules` that nothing in the model has.
        linear_layers: names that would do.
        coupling: the losses that compare the rows of a step with one another.
        labels: desirable and undesirable training rows, where they are labelled.
        troubles: what went wrong while looking.
    """

    rows: int | None = None
    used: int | None = None
    eval_rows: Mapping[str, int] = field(default_factory=dict)
    rejected: Mapping[str, int] = field(default_factory=dict)
    unfinished: int = 0
    looked_at: int = 0
    rendered: int = 0
    doubled: int = 0
    plain_text: bool = False
    split_tokens: tuple[str, ...] = ()
    ends_turns: bool = True
    parameters: int | None = None
    context_length: int | None = None
    unmatched_targets: tuple[str, ...] = ()
    linear_layers: tuple[str, ...] = ()
    coupling: tuple[str, ...] = ()
    labels: tuple[int, int] | None = None
    troubles: tuple[Remark, ...] = ()


@dataclass(frozen=True)
class Situation:
    """A recipe in the light of the facts.

    Attributes:
        recipe: its keys are right one by one.
        facts: what was seen.
    """

    recipe: Recipe
    facts: Facts

    @property
    def kind(self) -> Literal["lora", "full"]:
        """Whether an adapter is trained or all weights."""
        return "full" if self.recipe.lora is None else "lora"

    @property
    def is_from_scratch(self) -> bool:
        """Whether the model is new, so that no knowledge of its can be lost."""
        return self.recipe.model.from_scratch is not None

    @cached_property
    def parameters(self) -> float | None:
        """Size of the model: as seen, else as its name says."""
        if self.facts.parameters is not None:
            return self.facts.parameters
        name = (self.recipe.model.model_name_or_path or "").rstrip("/").rpartition("/")[2]
        sizes = [float(number) * SCALE[unit.lower()] for number, unit in SIZE_IN_NAME.findall(name)]
        return max(sizes, default=None)

    @cached_property
    def rows_at_most(self) -> int | None:
        """Training rows: as seen, else as many as the recipe takes."""
        if self.facts.rows is not None:
            return self.facts.rows
        data = self.recipe.data
        counts = [None if s.max_samples is None else math.ceil(s.max_samples * s.weight) for s in data.train]
        total = 0
        for count in counts:
            if count is None:
                return None
            total += count
        return total

    @property
    def steps(self) -> int | None:
        """Optimizer steps of the run, where they are known."""
        training = self.recipe.training
        if training.max_steps is not None:
            return training.max_steps
        if self.facts.rows is None:
            return None
        return math.ceil(training.num_train_epochs * math.ceil(self.facts.rows / training.global_batch_size))

    @property
    def epochs_at_least(self) -> float | None:
        """Passes over the training rows; more where there are fewer rows than the recipe would take."""
        training = self.recipe.training
        if training.max_steps is None:
            return training.num_train_epochs
        if not self.rows_at_most:
            return None
        return training.max_steps * training.global_batch_size / self.rows_at_most

    @property
    def warmup_share(self) -> float | None:
        """Share of the run in which the learning rate still rises."""
        training = self.recipe.training
        if training.warmup_steps is None:
            return training.warmup_ratio
        return None if self.steps is None else training.warmup_steps / self.steps

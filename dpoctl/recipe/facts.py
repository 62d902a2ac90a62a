"""A run before it starts: its recipe, and the facts that are known about its data, tokenizer and model."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from dpoctl.recipe.diagnostics import Diagnostic
from dpoctl.recipe.schema import Recipe

SIZE_IN_NAME = re.compile(r"(?<![\d.])(\d+(?:\.\d+)?)([bm])(?![a-z])", re.IGNORECASE)
UNITS = {"b": 1e9, "m": 1e6}


@dataclass(frozen=True, kw_only=True)
class RowCounts:
    """The rows of a set.

    Attributes:
        used: The number of different rows that are used.
        dropped: The number of rows that are not used, by reason.
        unfinished: The number of rows with a truncated answer.
    """

    used: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    unfinished: int = 0


@dataclass(frozen=True, kw_only=True)
class AnswerLengths:
    """The lengths of the answers of pairs, in tokens.

    Attributes:
        pairs: The number of pairs.
        chosen: The mean of the chosen answers.
        rejected: The mean of the rejected answers.
        gap_error: The standard error of the mean difference within a pair.
    """

    pairs: int
    chosen: float
    rejected: float
    gap_error: float


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Properties of the data, the tokenizer and the model; `None` for those that are not known.

    Attributes:
        rows: The number of training rows per epoch.
        train: The counts of training rows.
        evals: The counts of rows of each eval set, by its name.
        eval_rows: The number of pairs, or else of rows, of each eval set, by its name.
        lengths: The lengths of answers, if the training rows are pairs.
        looked_at: The number of training rows whose text was inspected.
        rendered: The number of inspected rows that are messages with tokens of a chat template.
        doubled: The number of inspected rows that are text with two conversation starts.
        plain_text: Whether the rows are text although the tokenizer has a chat template.
        split_tokens: The control tokens of the chat template that the tokenizer splits.
        split_rows: The number of training rows that hold them in every turn.
        ends_turns: Whether the template ends turns with the end-of-sequence token of the tokenizer.
        parameters: The number of parameters of the model.
        context_length: The number of positions of the model.
        unmatched_targets: The names in `lora.target_modules` that match no layer of the model.
        linear_layers: The names that would match.
        coupling: The losses that compare the rows of a step with each other.
        labels: The numbers of desirable and undesirable training rows, if rows are labelled.
        diagnostics: The errors and notes of the inspection itself.
    """

    rows: int | None = None
    train: RowCounts = RowCounts()
    evals: Mapping[str, RowCounts] = field(default_factory=dict)
    eval_rows: Mapping[str, int] = field(default_factory=dict)
    lengths: AnswerLengths | None = None
    looked_at: int = 0
    rendered: int = 0
    doubled: int = 0
    plain_text: bool = False
    split_tokens: tuple[str, ...] = ()
    split_rows: int = 0
    ends_turns: bool = True
    parameters: int | None = None
    context_length: int | None = None
    unmatched_targets: tuple[str, ...] = ()
    linear_layers: tuple[str, ...] = ()
    coupling: tuple[str, ...] = ()
    labels: tuple[int, int] | None = None
    diagnostics: tuple[Diagnostic, ...] = ()


@dataclass(frozen=True)
class PlannedRun:
    """A run before it starts.

    Attributes:
        recipe: A recipe whose keys are valid one by one.
        facts: The facts about its data and model.
    """

    recipe: Recipe
    facts: Facts

    @property
    def kind(self) -> Literal["lora", "full"]:
        """The kind of training: LoRA, or full fine-tuning."""
        return "full" if self.recipe.lora is None else "lora"

    @property
    def is_from_scratch(self) -> bool:
        """Whether the model is new, so that training cannot damage earlier knowledge."""
        return self.recipe.model.from_scratch is not None

    @cached_property
    def parameters(self) -> float | None:
        """The number of parameters: as counted, else from the name of the model."""
        if self.facts.parameters is not None:
            return self.facts.parameters
        return size_in_name(self.recipe.model.model_name_or_path or "")

    @cached_property
    def max_rows(self) -> int | None:
        """The number of training rows: as counted, else the maximum that the recipe sets."""
        if self.facts.rows is not None:
            return self.facts.rows
        total = 0
        for source in self.recipe.data.train:
            if source.max_samples is None:
                return None
            total += math.ceil(source.max_samples * source.weight)
        return total

    @property
    def steps(self) -> int | None:
        """The number of optimizer steps, if it is known."""
        training = self.recipe.training
        if training.max_steps is not None:
            return training.max_steps
        if self.facts.rows is None:
            return None
        return math.ceil(training.num_train_epochs * math.ceil(self.facts.rows / training.global_batch_size))

    @property
    def min_epochs(self) -> float | None:
        """The number of passes over the training rows; more if the data has fewer rows than the recipe allows."""
        training = self.recipe.training
        if training.max_steps is None:
            return training.num_train_epochs
        if not self.max_rows:
            return None
        return training.max_steps * training.global_batch_size / self.max_rows

    @property
    def warmup_fraction(self) -> float | None:
        """The fraction of the run in which the learning rate rises."""
        training = self.recipe.training
        if training.warmup_steps is None:
            return training.warmup_ratio
        return None if self.steps is None else training.warmup_steps / self.steps


def size_in_name(model: str) -> float | None:
    """Return the number of parameters that the name of a model states; None if it states none."""
    name = model.rstrip("/").rpartition("/")[2]
    sizes = [float(number) * UNITS[unit.lower()] for number, unit in SIZE_IN_NAME.findall(name)]
    return max(sizes, default=None)

"""The arguments of schedules and optimizers of the libraries, under the names that the libraries give them."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ValidationError

from dpoctl.recipe.diagnostics import Diagnostic, KeyPath, dotted, shown
from dpoctl.recipe.key_errors import describe, hints
from dpoctl.recipe.schema import TrainingSection
from dpoctl.recipe.section import Count, Probability, Section

OPTIM: KeyPath = ("training", "optim")
SCHEDULE: KeyPath = ("training", "lr_scheduler_type")
KWARGS: KeyPath = ("training", "lr_scheduler_kwargs")
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]
Shape = Literal["linear", "cosine", "1-sqrt"]


class NoArguments(Section):
    """Takes no arguments."""


class Cosine(Section):
    """Falls along a cosine to 0."""

    num_cycles: Positive = 0.5


class CosineWithRestarts(Section):
    """Falls along a cosine several times, each time from the highest rate."""

    num_cycles: Count = 1


class CosineWithMinLr(Section):
    """Falls along a cosine to a lowest rate."""

    num_cycles: Positive = 0.5
    min_lr: NotNegative | None = None
    min_lr_rate: Share | None = None


class CosineWarmupWithMinLr(CosineWithMinLr):
    """Rises from a rate that is not 0, and falls along a cosine to a lowest rate."""

    warmup_lr_rate: Share | None = None


class Polynomial(Section):
    """Falls along a power to a last rate."""

    lr_end: NotNegative = 1e-7
    power: Positive = 1.0


class InverseSqrt(Section):
    """Falls with the square root of the step."""

    timescale: Count | None = None


class WarmupStableDecay(Section):
    """Stays at the highest rate, and falls in the last steps."""

    num_decay_steps: Count
    num_stable_steps: Annotated[int, Ge(0)] | None = None
    warmup_type: Shape = "linear"
    decay_type: Shape = "cosine"
    min_lr_ratio: Share = 0.0
    num_cycles: Positive = 0.5


SCHEDULES: dict[str, type[Section]] = {
    "linear": NoArguments,
    "cosine": Cosine,
    "cosine_with_restarts": CosineWithRestarts,
    "cosine_with_min_lr": CosineWithMinLr,
    "cosine_warmup_with_min_lr": CosineWarmupWithMinLr,
    "polynomial": Polynomial,
    "constant": NoArguments,
    "constant_with_warmup": NoArguments,
    "inverse_sqrt": InverseSqrt,
    "warmup_stable_decay": WarmupStableDecay,
}
"""The values of `lr_scheduler_type`, and the arguments of each in `lr_scheduler_kwargs`."""


class Adafactor(Section):
    """Second moments as the product of a row and a column; no first moment."""

    clip_threshold: Positive = 1.0
    decay_rate: Annotated[float, Lt(0)] = -0.8
    beta1: Probability | None = None
    scale_parameter: bool = False


class Muon(Section):
    """Orthogonalised momentum."""

    momentum: Probability = 0.95
    nesterov: bool = True
    ns_steps: Annotated[int, Ge(1), Lt(100)] = 5
    adjust_lr_fn: Literal["match_rms_adamw", "original"] = "match_rms_adamw"


OPTIMIZERS: dict[str, type[Section]] = {"adafactor": Adafactor, "muon": Muon}
"""Optimizers that have arguments in `optim_args`, and these."""


def optimizer_errors(training: TrainingSection) -> Iterator[Diagnostic]:
    """Find arguments in `optim_args` that the optimizer does not take."""
    known = OPTIMIZERS.get(training.optim, NoArguments)
    yield from argument_errors(("training", "optim_args"), training.optim_args, known, OPTIM, training.optim)


def schedule_errors(training: TrainingSection) -> Iterator[Diagnostic]:
    """Find arguments in `lr_scheduler_kwargs` that the schedule does not take, or cannot use."""
    name, given = training.lr_scheduler_type, training.lr_scheduler_kwargs
    wrong = list(argument_errors(KWARGS, given, SCHEDULES[name], SCHEDULE, name))
    yield from wrong or _unusable(training)


def argument_errors(
    path: KeyPath, given: Mapping[str, Any], known: type[BaseModel], owner: KeyPath, value: str
) -> Iterator[Diagnostic]:
    """Find arguments that are unknown, missing or of the wrong kind.

    Args:
        path: The key that holds them.
        given: The arguments by name.
        known: The arguments there are.
        owner: The key that they belong to.
        value: Its value.
    """
    what = f"{owner[-1]}: {value}"
    try:
        known.model_validate(dict(given))
    except ValidationError as error:
        takes = f"it takes {', '.join(known.model_fields) or 'none'}"
        # For a union of types, pydantic reports an error for each of them.
        for one in {problem["loc"][0]: problem for problem in error.errors(include_url=False)}.values():
            argument = str(one["loc"][0])
            at = (*path, argument)
            if one["type"] == "extra_forbidden":
                yield Diagnostic.error(at, f"{what} has no argument {shown(argument)}; {takes}")
            elif one["type"] == "missing":
                message = f"{what} needs {argument} in {path[-1]}, for example {path[-1]}: {{{argument}: 100}}"
                yield Diagnostic.error(owner, message, related=(path,))
            else:
                expected = describe(hints(known)[argument])
                yield Diagnostic.error(at, f"{dotted(at)}: expected {expected}, got {shown(given[argument])}")


def _unusable(training: TrainingSection) -> Iterator[Diagnostic]:
    """Find arguments that contradict each other, or the learning rate."""
    name, given, highest = training.lr_scheduler_type, training.lr_scheduler_kwargs, training.learning_rate
    related: tuple[KeyPath, ...] = (("training", "learning_rate"),)
    if issubclass(SCHEDULES[name], CosineWithMinLr):
        ends = [key for key in ("min_lr", "min_lr_rate") if given.get(key) is not None]
        if len(ends) != 1:
            example = f"{KWARGS[-1]}: {{min_lr_rate: 0.1}}"
            yield Diagnostic.error(SCHEDULE, f"lr_scheduler_type: {name} needs min_lr or min_lr_rate, e.g. {example}")
        elif ends == ["min_lr"] and not given["min_lr"] < highest:
            message = f"min_lr ({given['min_lr']}) must be below learning_rate ({highest})"
            yield Diagnostic.error((*KWARGS, "min_lr"), message, related=related)
    lowest = given.get("lr_end", Polynomial().lr_end)
    if name == "polynomial" and not lowest < highest:
        message = f"lr_end ({lowest}) must be below learning_rate ({highest})"
        yield Diagnostic.error((*KWARGS, "lr_end"), message, related=related)

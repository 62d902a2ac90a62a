"""What tells one task from another: its loss and what is reported of it. Everything else is shared."""

from dataclasses import dataclass

from dpoctl.core.losses import Loss
from dpoctl.core.objective import Report
from dpoctl.recipe.schema import Recipe
from dpoctl.tasks import dpo, sft


@dataclass(frozen=True)
class Task:
    """A loss handed to the loop.

    Attributes:
        loss: judges items.
        report: metrics of some scores and their loss values.
        at_init: value of the loss while policy and reference are equal, if that is known.
    """

    loss: Loss
    report: Report
    at_init: float | None = None


def build_task(recipe: Recipe) -> Task:
    """Pick the loss that the recipe names."""
    if recipe.method == "sft":
        return Task(sft.build_loss(), sft.report)
    loss = dpo.build_loss(recipe.dpo.loss)
    return Task(loss, dpo.Report(loss.beta), loss.at_init())

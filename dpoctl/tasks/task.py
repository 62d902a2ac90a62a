"""What tells one task from another: its losses and what is reported of them. Everything else is shared."""

from dataclasses import dataclass

from dpoctl.core.losses import Need, PreferenceLoss, Rows, Term
from dpoctl.core.objective import Report
from dpoctl.recipe.schema import Recipe
from dpoctl.tasks import dpo, sft


@dataclass(frozen=True)
class Task:
    """Losses handed to the loop.

    Attributes:
        terms: the losses and their weights.
        report: metrics of some scores.
    """

    terms: tuple[Term, ...]
    report: Report

    @property
    def rows(self) -> Rows:
        """The data that the losses judge; a supervised term takes what the others have."""
        losses = [term.loss for term in self.terms]
        return next((loss for loss in losses if isinstance(loss, PreferenceLoss)), losses[0]).rows

    @property
    def needs(self) -> frozenset[Need]:
        """What the losses need besides log-probabilities."""
        return frozenset[Need]().union(*(term.loss.needs for term in self.terms))

    @property
    def needs_reference(self) -> bool:
        """Whether any loss compares the policy with a reference."""
        return any(term.loss.needs_reference for term in self.terms)

    @property
    def at_init(self) -> float | None:
        """The loss while policy and reference are equal; `None` where it depends on the data."""
        total = 0.0
        for term in self.terms:
            value = term.loss.at_init() if isinstance(term.loss, PreferenceLoss) else None
            if value is None:
                return None
            total += term.weight * value
        return total


def build_task(recipe: Recipe) -> Task:
    """Pick the losses that the recipe names."""
    if recipe.method == "sft":
        return Task((Term(1.0, sft.build_loss(recipe.sft.average)),), sft.report)
    terms = dpo.build_terms(recipe.dpo.loss)
    (judging, *_) = (term.loss for term in terms if isinstance(term.loss, PreferenceLoss))
    return Task(terms, dpo.Report(judging))

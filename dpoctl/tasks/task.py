"""The losses and metrics of a task, the only difference between SFT and preference optimisation.

Preference optimisation reports the usual metrics of the implicit reward, SFT the likelihood of the answers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from dpoctl.core.meters import ItemMetric, Total, by_source
from dpoctl.core.objective import Report, TermValues
from dpoctl.losses import (
    LOSSES,
    Loss,
    Need,
    PreferenceLoss,
    Rows,
    Scores,
    SequenceNLL,
    TargetNLL,
    Term,
    TokenNLL,
    terms_of,
)
from dpoctl.recipe.schema import Recipe

Spec = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """The losses and metrics of a recipe.

    Attributes:
        terms: the losses and their weights.
        report: computes the metrics.
    """

    terms: tuple[Term, ...]
    report: Report

    @property
    def rows(self) -> Rows:
        """The kind of rows that the losses need; an SFT term takes the rows of the others."""
        losses = [term.loss for term in self.terms]
        return next((loss for loss in losses if isinstance(loss, PreferenceLoss)), losses[0]).rows

    @property
    def needs(self) -> frozenset[Need]:
        """The inputs that the losses need besides log-probabilities."""
        return frozenset[Need]().union(*(term.loss.needs for term in self.terms))

    @property
    def needs_reference(self) -> bool:
        """Whether a loss compares the policy with a reference."""
        return any(term.loss.needs_reference for term in self.terms)

    @property
    def at_init(self) -> float | None:
        """The loss while policy and reference are equal; None if it depends on the data."""
        total = 0.0
        for term in self.terms:
            value = term.loss.at_init if isinstance(term.loss, PreferenceLoss) else None
            if value is None:
                return None
            total += term.weight * value
        return total


def build_task(recipe: Recipe) -> Task:
    """Build the task of a recipe."""
    if recipe.method == "sft":
        return Task((Term(1.0, build_loss(recipe.sft.average)),), sft_metrics)
    terms = build_terms(recipe.dpo.loss)
    (first, *_) = (term.loss for term in terms if isinstance(term.loss, PreferenceLoss))
    return Task(terms, PreferenceMetrics(first))


def build_terms(spec: Spec | Sequence[Spec]) -> tuple[Term, ...]:
    """Build the terms of a recipe's `dpo.loss`: one loss by type and hyperparameters, or several with weights."""
    specs = [spec] if isinstance(spec, Mapping) else spec
    return tuple(term for one in specs for term in _terms(**one))


@dataclass(frozen=True)
class PreferenceMetrics:
    """The metrics of preference optimisation, with TRL's names.

    Rewards are those of the loss. The accuracy is the share of pairs whose chosen reward is strictly higher: it is 0
    while policy and reference are equal. For labelled responses, desirable ones count as chosen and the others as
    rejected.

    Attributes:
        loss: the loss that defines the rewards.
    """

    loss: PreferenceLoss

    def items(self, scores: Scores) -> dict[str, ItemMetric]:
        """Return rewards, log-probabilities and lengths by pair, or by labelled response."""
        return _by_label(self.loss, scores) if self.loss.rows == "labels" else _by_pair(self.loss, scores)

    def __call__(self, scores: Scores, values: Sequence[TermValues], names: Mapping[int, str]) -> dict[str, Total]:
        """Return the totals of rewards, log-probabilities and lengths, and the metrics of the losses themselves."""
        metrics = self.items(scores)
        if any(isinstance(term.loss, TargetNLL) for term in values):
            metrics["nll_loss"] = _nll(scores)
        own = {name: Total(*total) for term in values for name, total in term.loss.metrics(scores).items()}
        return by_source(metrics, scores.outline.sources, names) | own


def build_loss(average: Literal["tokens", "responses"]) -> Loss:
    """Return the SFT loss: the mean over tokens, or the mean over responses of their sums."""
    return TokenNLL() if average == "tokens" else SequenceNLL()


def sft_metrics(scores: Scores, values: Sequence[TermValues], names: Mapping[int, str]) -> dict[str, Total]:
    """Return the nats per trained token: the loss itself, unless that is a mean over responses."""
    metric = "loss" if values[0].loss.item == "tokens" else "nll_loss"
    return by_source({metric: _nats(scores)}, scores.outline.sources, names)


def record_metrics(task: Task, scores: Scores) -> dict[str, ItemMetric]:
    """Return the metrics of a task by item, before they are added up over records."""
    if isinstance(task.report, PreferenceMetrics):
        return task.report.items(scores)
    return {"nll_loss": _nats(scores)}


def _nats(scores: Scores) -> ItemMetric:
    return ItemMetric(-scores.logps, scores.num_tokens.to(scores.logps.dtype), scores.outline.records)


def _terms(*, type: str, weight: float = 1.0, **parameters: Any) -> tuple[Term, ...]:
    return terms_of(TargetNLL() if type == "sft" else LOSSES[type](**parameters), weight)


def _by_pair(loss: PreferenceLoss, scores: Scores) -> dict[str, ItemMetric]:
    records = scores.outline.records[scores.pairs[:, 0]]
    chosen, rejected = scores.split(loss.reward(scores))
    logps, lengths = scores.split(scores.logps), scores.split(scores.num_tokens.to(scores.logps.dtype))
    means = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
        "logps/chosen": logps[0],
        "logps/rejected": logps[1],
        "lengths/chosen": lengths[0],
        "lengths/rejected": lengths[1],
    }
    return {name: ItemMetric.of(values, records) for name, values in means.items()}


def _by_label(loss: PreferenceLoss, scores: Scores) -> dict[str, ItemMetric]:
    starts, labels = scores.outline.starts, scores.outline.labels
    own, records = starts[:-1], torch.arange(len(labels), device=labels.device)
    means = {
        "rewards": loss.reward(scores)[own],
        "logps": scores.logps[own],
        "lengths": scores.num_tokens[own].to(scores.logps.dtype),
    }
    sides = {"chosen": labels == 1, "rejected": labels == 0}
    return {
        f"{name}/{side}": ItemMetric.of(values, records, among)
        for name, values in means.items()
        for side, among in sides.items()
    }


def _nll(scores: Scores) -> ItemMetric:
    """Return the nats per token of the target responses of an SFT term."""
    targets = scores.outline.targets
    at, has_target = targets.clamp(0), targets >= 0
    lengths = scores.num_tokens[at] * has_target
    records = torch.arange(len(targets), device=targets.device)
    return ItemMetric(-scores.logps[at] * has_target, lengths.to(scores.logps.dtype), records)

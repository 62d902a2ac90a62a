"""Preference optimisation: losses over preferences, and the field's metrics of the implicit reward."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dpoctl.core.losses import LOSSES, PreferenceLoss, Scores, TargetNLL, Term, terms_of
from dpoctl.core.losses.scores import required
from dpoctl.core.meters import Tally, Total, by_source
from dpoctl.core.objective import Judged

Spec = Mapping[str, Any]


def build_terms(spec: Spec | Sequence[Spec]) -> tuple[Term, ...]:
    """Build what a recipe's `dpo.loss` describes: a loss by its `type` and hyperparameters, or several with weights."""
    specs = [spec] if isinstance(spec, Mapping) else spec
    return tuple(term for one in specs for term in _terms(**one))


def _terms(*, type: str, weight: float = 1.0, **parameters: Any) -> tuple[Term, ...]:
    return terms_of(TargetNLL() if type == "sft" else LOSSES[type](**parameters), weight)


@dataclass(frozen=True)
class Report:
    """The metrics of preferences, under TRL's names.

    Rewards are the loss's own. An accuracy counts the pairs whose chosen reward is strictly the higher one: it is 0
    while policy and reference are equal. Of labelled responses, the desirable ones stand for the chosen, the others
    for the rejected.

    Attributes:
        loss: whose rewards are reported.
    """

    loss: PreferenceLoss

    def __call__(self, scores: Scores, judged: Sequence[Judged], names: Mapping[int, str]) -> dict[str, Total]:
        """Return the totals of rewards, log-probabilities and lengths, and what the terms report of themselves."""
        tallies = _by_label(self.loss, scores) if self.loss.rows == "labels" else _by_pair(self.loss, scores)
        if any(isinstance(j.loss, TargetNLL) for j in judged):
            tallies["nll_loss"] = _nll(scores)
        own = {name: Total(*figure) for j in judged for name, figure in j.loss.metrics(scores).items()}
        return by_source(tallies, required(scores.sources, "sources"), names) | own


def _by_pair(loss: PreferenceLoss, scores: Scores) -> dict[str, Tally]:
    records = scores.records[scores.pairs[:, 0]]
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
    return {name: Tally.of(values, records) for name, values in means.items()}


def _by_label(loss: PreferenceLoss, scores: Scores) -> dict[str, Tally]:
    starts, labels = required(scores.starts, "starts"), required(scores.labels, "labels")
    own, records = starts[:-1], torch.arange(len(labels), device=labels.device)
    means = {
        "rewards": loss.reward(scores)[own],
        "logps": scores.logps[own],
        "lengths": scores.num_tokens[own].to(scores.logps.dtype),
    }
    sides = {"chosen": labels == 1, "rejected": labels == 0}
    return {
        f"{name}/{side}": Tally.of(values, records, among)
        for name, values in means.items()
        for side, among in sides.items()
    }


def _nll(scores: Scores) -> Tally:
    """Nats per token of the responses to imitate."""
    targets = required(scores.targets, "targets")
    at, there = targets.clamp(0), targets >= 0
    lengths = scores.num_tokens[at] * there
    records = torch.arange(len(targets), device=targets.device)
    return Tally(-scores.logps[at] * there, lengths.to(scores.logps.dtype), records)

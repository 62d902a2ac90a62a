"""Preference optimisation: a loss over pairs, and the field's metrics of the implicit reward."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dpoctl.core.losses import LOSSES, PreferenceLoss, Scores
from dpoctl.core.meters import Total


def build_loss(spec: Mapping[str, Any]) -> PreferenceLoss:
    """Build the loss that a recipe's `dpo.loss` describes: its `type` and its hyperparameters."""
    return LOSSES[spec["type"]](**{name: value for name, value in spec.items() if name != "type"})


@dataclass(frozen=True)
class Report:
    """The metrics of some pairs, under TRL's names.

    A reward is `beta` times the log-ratio of summed log-probabilities. An accuracy counts the pairs whose chosen
    reward is strictly the higher one: it is 0 while policy and reference are equal.

    Attributes:
        beta: of the loss.
    """

    beta: float

    def __call__(self, scores: Scores, values: Tensor) -> dict[str, Total]:
        """Return the totals of the loss values `[M]` and of the pairs' rewards and log-probabilities."""
        winners, losers = scores.pairs.unbind(1)
        rewards = self.beta * scores.log_ratios
        chosen, rejected = rewards[winners], rewards[losers]
        means = {
            "loss": values,
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).float(),
            "logps/chosen": scores.logps[winners],
            "logps/rejected": scores.logps[losers],
        }
        return {name: Total(value.sum(), len(value)) for name, value in means.items()}

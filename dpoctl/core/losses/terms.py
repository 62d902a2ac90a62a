"""Losses that imitate, and sums of losses."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from dpoctl.core.losses.scores import Item, Loss, PreferenceLoss, Rows, Scores, required

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TokenNLL(Loss):
    """Negative log-likelihood of every scored token: supervised fine-tuning, averaged over tokens."""

    item: ClassVar[Item] = "tokens"
    rows: ClassVar[Rows] = "demonstrations"

    def __call__(self, scores: Scores) -> "Tensor":
        """Return the loss of each scored token."""
        return -required(scores.token_logps, "token_logps")


@dataclass(frozen=True)
class SequenceNLL(Loss):
    """Negative log-likelihood of whole responses: supervised fine-tuning, summed over tokens, averaged over responses.

    A long response weighs as much more as it has tokens; its gradient is that much larger than `TokenNLL`'s.
    """

    item: ClassVar[Item] = "responses"
    rows: ClassVar[Rows] = "demonstrations"

    def __call__(self, scores: Scores) -> "Tensor":
        """Return the loss of each response."""
        return -scores.logps


@dataclass(frozen=True)
class TargetNLL(Loss):
    """Negative log-likelihood of the responses that records want imitated, averaged over their tokens."""

    item: ClassVar[Item] = "target_tokens"

    def __call__(self, scores: Scores) -> "Tensor":
        """Return the loss of each target, summed over its tokens."""
        targets = required(scores.targets, "targets")
        return -scores.logps[targets[targets >= 0]]


@dataclass(frozen=True)
class Term:
    """A loss and its weight in a sum: weight * values / count of the loss's item."""

    weight: float
    loss: Loss


def terms_of(loss: Loss, weight: float = 1.0) -> tuple[Term, ...]:
    """Return a weighted loss, followed by its SFT term where it has one."""
    term = Term(weight, loss)
    if isinstance(loss, PreferenceLoss) and loss.sft_weight > 0:
        return term, Term(weight * loss.sft_weight, TargetNLL())
    return (term,)

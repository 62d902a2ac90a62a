"""Supervised fine-tuning: the mean negative log-likelihood of the answers' tokens."""

from torch import Tensor

from dpoctl.core.losses import Loss, Scores, TokenNLL
from dpoctl.core.meters import Total


def build_loss() -> Loss:
    """Return the loss of the task."""
    return TokenNLL()


def report(scores: Scores, values: Tensor) -> dict[str, Total]:
    """Return the loss in nats per scored token."""
    return {"loss": Total(values.sum(), len(values))}

"""Supervised fine-tuning: the negative log-likelihood of the answers."""

from collections.abc import Mapping, Sequence
from typing import Literal

from dpoctl.core.losses import Loss, Scores, SequenceNLL, TokenNLL
from dpoctl.core.losses.scores import required
from dpoctl.core.meters import Tally, Total, by_source
from dpoctl.core.objective import Judged


def build_loss(average: Literal["tokens", "responses"]) -> Loss:
    """Return the loss of the task: a mean over tokens, or of sums over responses."""
    return TokenNLL() if average == "tokens" else SequenceNLL()


def report(scores: Scores, judged: Sequence[Judged], names: Mapping[int, str]) -> dict[str, Total]:
    """Return the nats per scored token, which are the loss itself unless that is a mean over responses."""
    metric = "loss" if judged[0].loss.item == "tokens" else "nll_loss"
    tally = Tally(-scores.logps, scores.num_tokens.to(scores.logps.dtype), scores.records)
    return by_source({metric: tally}, required(scores.sources, "sources"), names)

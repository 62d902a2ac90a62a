"""Losses of single responses: u and v are the log-ratios of winner and loser, or u that of a labelled response."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from dpoctl.losses.base import (
    Beta,
    Item,
    Loss,
    Memory,
    Need,
    PreferenceLoss,
    Rows,
    Scores,
    Weight,
    log_sigmoid,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class APOZero(PreferenceLoss):
    """Anchored preference optimisation (D'Oosterlinck et al., 2024, arXiv 2408.06266): winners up, losers down.

        1 - sigmoid(beta u) + sigmoid(beta v)

    For winners that are better than what the policy writes.
    """

    beta: Beta = 0.1
    """Scale of the reward, per nat; 0.05 to 0.1 is typical."""

    at_init: ClassVar[float] = 1.0

    def __call__(self, scores: Scores) -> "Tensor":
        """Return the loss of each pair."""
        won, lost = scores.split(self.reward(scores))
        return (-won).sigmoid() + lost.sigmoid()


@dataclass(frozen=True, kw_only=True)
class APODown(PreferenceLoss):
    """Anchored preference optimisation (D'Oosterlinck et al., 2024, arXiv 2408.06266): both down, losers further.

        sigmoid(beta u) + 1 - sigmoid(beta h)

    For winners that are worse than what the policy writes.
    """

    beta: Beta = 0.1
    """Scale of the reward, per nat; 0.05 to 0.1 is typical."""

    at_init: ClassVar[float] = 1.0

    def __call__(self, scores: Scores) -> "Tensor":
        """Return the loss of each pair."""
        won, lost = scores.split(self.reward(scores))
        return won.sigmoid() + (lost - won).sigmoid()


@dataclass(frozen=True, kw_only=True)
class NCAPair(PreferenceLoss):
    """Noise contrastive alignment (Chen et al., 2024, arXiv 2402.05369), of pairs.

        -log sigmoid(beta u) - 1/2 log sigmoid(-beta u) - 1/2 log sigmoid(-beta v)

    It keeps the winner's likelihood from falling, where DPO looks at the margin alone.
    """

    beta: Beta = 0.01
    """Scale of the reward, per nat; 0.01 is typical."""

    at_init: ClassVar[float] = 2 * math.log(2)

    def __call__(self, scores: Scores) -> "Tensor":
        """Return the loss of each pair."""
        won, lost = scores.split(self.reward(scores))
        return -log_sigmoid(won) - (log_sigmoid(-won) + log_sigmoid(-lost)) / 2


@dataclass(frozen=True, kw_only=True)
class SPPOHard(PreferenceLoss):
    """Self-play preference optimisation (Wu et al., 2024, arXiv 2405.00675), winners taken to win always.

    (u - 1 / (2 beta))^2 + (v + 1 / (2 beta))^2
    """

    beta: Beta = 1e-3
    """The paper's 1 / eta, per nat: 1 / (2 beta) is the target log-ratio. 0.001 is typical."""

    def __call__(self, scores: Scores) -> "Tensor":
        """Return the loss of each pair."""
        won, lost = scores.split(scores.log_ratios)
        target = 1 / (2 * self.beta)
        return (won - target) ** 2 + (lost + target) ** 2

    @property
    def at_init(self) -> float:
        """Twice the square of the target log-ratio."""
        return 1 / (2 * self.beta**2)


@dataclass(frozen=True, kw_only=True)
class KTO(PreferenceLoss):
    """Kahneman-Tversky optimisation (Ethayarajh et al., 2024, arXiv 2402.01306): labels instead of pairs.

        desirable:    desirable_weight   (1 - sigmoid(beta (u - z0)))
        undesirable:  undesirable_weight (1 - sigmoid(beta (z0 - u)))
        z0 = max(0, mean over the step of the log-ratio of mismatched responses), a constant

    A record's first response is its own; the second answers another prompt and serves z0 alone. The paper keeps
    desirable_weight n_desirable / (undesirable_weight n_undesirable) between 1 and 4/3.
    """

    beta: Beta = 0.1
    """Scale of the reward, per nat; 0.1 is typical."""
    desirable_weight: Weight = 1.0
    """Weight of desirable responses; raise it where they are fewer."""
    undesirable_weight: Weight = 1.0
    """Weight of undesirable responses; raise it where they are fewer."""

    item: ClassVar[Item] = "records"
    rows: ClassVar[Rows] = "labels"
    couples_batch: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset({"mismatched"})

    def for_step(self, scores: Scores, memory: Memory, *, step: int, seed: int) -> tuple[Loss, Memory]:
        """Return the loss with the z0 of a step."""
        return KTOAtStep(**vars(self), z0=self._baseline(scores)), memory

    def __call__(self, scores: Scores) -> "Tensor":
        """Return the loss of each record."""
        own = scores.log_ratios[scores.outline.starts[:-1]]
        desirable = scores.outline.labels.to(own.dtype)
        weight = self.desirable_weight * desirable + self.undesirable_weight * (1 - desirable)
        return weight * ((1 - 2 * desirable) * self.beta * (own - self._baseline(scores))).sigmoid()

    def _baseline(self, scores: Scores) -> "Tensor | float":
        """z0, in nats."""
        return scores.log_ratios.detach()[scores.outline.starts[:-1] + 1].mean().clamp(min=0)

    @property
    def at_init(self) -> float | None:
        """Half, if both labels weigh the same."""
        return self.desirable_weight / 2 if self.desirable_weight == self.undesirable_weight else None


@dataclass(frozen=True, kw_only=True)
class KTOAtStep(KTO):
    """KTO with the z0 of a step.

    Attributes:
        z0: in nats.
    """

    z0: "Tensor | float"

    def _baseline(self, scores: Scores) -> "Tensor | float":
        return self.z0

    def metrics(self, scores: Scores) -> "dict[str, tuple[Tensor | float, int]]":
        """Return z0 under TRL's name."""
        return {"kl": (self.z0, 1)}

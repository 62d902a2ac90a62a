"""Losses of pairs that look at the other pairs of the step: u and v are the log-ratios of winner and loser."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from dpoctl.core.losses.scores import Beta, Loss, Memory, PreferenceLoss, Scores, log_sigmoid, required

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class AOT(PreferenceLoss):
    """Alignment by optimal transport (Melnyk et al., 2024, arXiv 2406.05882), paired.

        -log sigmoid(beta (sort(p_w - p_l) - sort(ref_w - ref_l)))

    The quantiles of the policy's margins over the step must exceed those of the reference's. The values stand in
    sorted order, not in that of the pairs.
    """

    beta: Beta = 0.01
    """Scale of the reward, per nat; 0.01 is typical, with many pairs a step."""

    couples_batch: ClassVar[bool] = True

    def __call__(self, scores: Scores) -> "Tensor":
        """Return a value for each quantile."""
        policy = scores.differences(scores.logps).sort().values
        reference = scores.differences(required(scores.ref_logps, "ref_logps")).sort().values
        return -log_sigmoid(self.beta * (policy - reference))

    def at_init(self) -> float:
        """Ln 2."""
        return math.log(2)


@dataclass(frozen=True, kw_only=True)
class AOTUnpaired(PreferenceLoss):
    """Alignment by optimal transport (Melnyk et al., 2024, arXiv 2406.05882), unpaired.

        -log sigmoid(beta (sort(u) - sort(v)))

    The quantiles of the winners' rewards over the step must exceed those of the losers', whichever prompt they answer.
    The values stand in sorted order, not in that of the pairs.
    """

    beta: Beta = 0.01
    """Scale of the reward, per nat; 0.01 is typical, with many pairs a step."""

    couples_batch: ClassVar[bool] = True

    def __call__(self, scores: Scores) -> "Tensor":
        """Return a value for each quantile."""
        won, lost = scores.split(self.reward(scores))
        return -log_sigmoid(won.sort().values - lost.sort().values)

    def at_init(self) -> float:
        """Ln 2."""
        return math.log(2)


@dataclass(frozen=True, kw_only=True)
class BCOPair(PreferenceLoss):
    """Binary classifier optimisation (Jung et al., 2024, arXiv 2404.04656), of pairs.

        -log sigmoid(beta u - delta) - log sigmoid(-(beta v - delta))

    with delta the mean reward of all responses of all steps so far. Evaluation data has that of its own step.
    """

    beta: Beta = 0.1
    """Scale of the reward, per nat; 0.01 to 0.1 is typical."""
    running_mean: bool = True
    """Shift rewards by delta, as its authors do; false is a delta of 0, as in TRL 1."""

    couples_batch: ClassVar[bool] = True

    def settle(self, scores: Scores, memory: Memory, *, step: int, seed: int) -> tuple[Loss, Memory]:
        """Bring the mean reward up to date, and fix delta."""
        if not self.running_mean:
            return self, memory
        here = scores.pairs.numel()
        count = memory.get("count", 0.0) + here
        before = memory.get("mean", 0.0)
        mean = before + (float(self._delta(scores)) - before) * here / count
        return SettledBCOPair(**vars(self), delta=mean), {"count": count, "mean": mean}

    def __call__(self, scores: Scores) -> "Tensor":
        """Return the loss of each pair."""
        won, lost = scores.split(self.reward(scores))
        delta = self._delta(scores)
        return -log_sigmoid(won - delta) - log_sigmoid(delta - lost)

    def _delta(self, scores: Scores) -> "Tensor | float":
        """The mean reward over the pairs of some scores."""
        return self.reward(scores).detach()[scores.pairs].mean() if self.running_mean else 0.0

    def at_init(self) -> float:
        """Ln 2, twice."""
        return 2 * math.log(2)


@dataclass(frozen=True, kw_only=True)
class SettledBCOPair(BCOPair):
    """BCO with the delta of one step.

    Attributes:
        delta: a reward.
    """

    delta: float

    def _delta(self, scores: Scores) -> float:
        return self.delta

    def metrics(self, scores: Scores) -> "dict[str, tuple[Tensor | float, int]]":
        """Delta."""
        return {"delta": (self.delta, 1)}

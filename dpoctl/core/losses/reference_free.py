"""Losses without a reference: p_w and p_l are the policy's own log-probabilities of winner and loser."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Ge

from dpoctl.core.losses.scores import Beta, PreferenceLoss, Scores, Weight, log_sigmoid

if TYPE_CHECKING:
    from torch import Tensor

SUREST = -1e-7
"""The highest mean log-probability whose odds are told apart from certainty."""


@dataclass(frozen=True, kw_only=True)
class SimPO(PreferenceLoss):
    """Simple preference optimisation (Meng et al., 2024, arXiv 2405.14734).

        -log sigmoid(beta (p_w / nw - p_l / nl) - gamma),  gamma = gamma_beta_ratio beta

    with nw and nl the tokens of winner and loser.
    """

    beta: Beta = 2.0
    """Scale of the reward, per nat a token; 2 to 2.5 is typical, 10 for Gemma."""
    gamma_beta_ratio: Annotated[float, Ge(0)] = 0.5
    """The margin that is asked for, in nats a token, as its authors write it; TRL's simpo_gamma is beta times it."""

    needs_reference: ClassVar[bool] = False

    def reward(self, scores: Scores) -> "Tensor":
        """Return `beta` times the log-probability per token, `[R]`."""
        return self.beta * scores.logps / scores.num_tokens

    def __call__(self, scores: Scores) -> "Tensor":
        """Return the loss of each pair."""
        return -log_sigmoid(scores.differences(self.reward(scores)) - self.gamma_beta_ratio * self.beta)


@dataclass(frozen=True, kw_only=True)
class CPO(PreferenceLoss):
    """Contrastive preference optimisation (Xu et al., 2024, arXiv 2401.08417).

        -log sigmoid(beta (p_w - p_l))

    plus the likelihood of the winners, which is the term of `sft_weight`.
    """

    sft_weight: Weight = 1.0
    """Weight of the mean negative log-likelihood of the tokens of preferred responses."""

    needs_reference: ClassVar[bool] = False

    def reward(self, scores: Scores) -> "Tensor":
        """Return `beta` times the log-probability, `[R]`."""
        return self.beta * scores.logps

    def __call__(self, scores: Scores) -> "Tensor":
        """Return the loss of each pair."""
        return -log_sigmoid(scores.differences(self.reward(scores)))


@dataclass(frozen=True, kw_only=True)
class ORPO(PreferenceLoss):
    """Odds ratio preference optimisation (Hong et al., 2024, arXiv 2403.07691).

        -beta log sigmoid(log odds_w - log odds_l),  log odds = a - log(1 - exp a),  a = p / n

    plus the likelihood of the winners, which is the term of `sft_weight`.
    """

    beta: Beta = 0.1
    """The paper's lambda: the weight of the odds ratio beside the likelihood; 0.05 to 0.1 is typical."""
    sft_weight: Weight = 1.0
    """Weight of the mean negative log-likelihood of the tokens of preferred responses."""

    needs_reference: ClassVar[bool] = False

    def reward(self, scores: Scores) -> "Tensor":
        """Return `beta` times the log-probability per token, `[R]`."""
        return self.beta * scores.logps / scores.num_tokens

    def __call__(self, scores: Scores) -> "Tensor":
        """Return the loss of each pair."""
        mean = (scores.logps / scores.num_tokens).clamp(max=SUREST)
        log_odds = mean - (-mean.expm1()).log()
        return -self.beta * log_sigmoid(scores.differences(log_odds))

"""Losses of a pair's margin, with a reference and without one.

u and v are the log-ratios of winner and loser, h = u - v; without a reference, p_w and p_l are the policy's own
log-probabilities of winner and loser.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt

from dpoctl.losses.base import Beta, Need, PreferenceLoss, Scores, Weight, log_sigmoid, required

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_EXPONENT = 80.0
"""An exponent whose exponential, about 5e34, is finite in float32."""
Flipped = Annotated[float, Ge(0), Lt(0.5)]
SUREST = -1e-7
"""An upper bound on the mean log-probability, which keeps the odds finite."""


@dataclass(frozen=True, kw_only=True)
class Sigmoid(PreferenceLoss):
    """Direct preference optimisation (Rafailov et al., 2023, arXiv 2305.18290), Eq. 7.

        -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h)

    with eps the label smoothing: above zero this is conservative DPO (Mitchell, 2023).
    A higher beta keeps the policy closer to the reference.
    """

    beta: Beta = 0.1
    """Scale of the reward, per nat. Typical are 0.01 for 7B models on UltraFeedback, 0.1, and 0.5 for summaries."""
    label_smoothing: Flipped = 0.0
    """The share of preferences that is assumed to be flipped."""
    reference_free: bool = False
    """Assume a uniform reference: u and v are then the policy's own log-probabilities."""

    @property
    def needs_reference(self) -> bool:
        """True unless `reference_free`."""
        return not self.reference_free

    def reward(self, scores: Scores) -> "Tensor":
        """Return `beta` times u, `[R]`."""
        return self.beta * (scores.logps if self.reference_free else scores.log_ratios)

    def __call__(self, scores: Scores) -> "Tensor":
        """Return the loss of each pair."""
        logits = scores.differences(self.reward(scores))
        return -(1 - self.label_smoothing) * log_sigmoid(logits) - self.label_smoothing * log_sigmoid(-logits)

    @property
    def at_init(self) -> float | None:
        """Ln 2, whatever the smoothing."""
        return None if self.reference_free else math.log(2)


@dataclass(frozen=True, kw_only=True)
class Robust(PreferenceLoss):
    """Provably robust DPO (Ray Chowdhury et al., 2024, arXiv 2403.00409): DPO's loss, unbiased under flipped labels.

    (-(1 - eps) log sigmoid(beta h) + eps log sigmoid(-beta h)) / (1 - 2 eps)
    """

    label_smoothing: Flipped = 0.1
    """eps, the share of preferences that is flipped."""

    at_init: ClassVar[float] = math.log(2)

    def __call__(self, scores: Scores) -> "Tensor":
        """Return the loss of each pair."""
        logits, eps = self.beta * scores.margins, self.label_smoothing
        return (eps * log_sigmoid(-logits) - (1 - eps) * log_sigmoid(logits)) / (1 - 2 * eps)


@dataclass(frozen=True, kw_only=True)
class Hinge(PreferenceLoss):
    """Hinge loss on the margin, as in SLiC (Zhao et al., 2023, arXiv 2305.10425) and RSO (Liu et al., 2309.06657).

    max(0, 1 - beta h)
    """

    beta: Beta = 0.1
    """Reciprocal of the target margin, per nat; 0.05 to 0.1 is typical."""

    at_init: ClassVar[float] = 1.0

    def __call__(self, scores: Scores) -> "Tensor":
        """Return the loss of each pair."""
        return (1 - self.beta * scores.margins).relu()


@dataclass(frozen=True, kw_only=True)
class IPO(PreferenceLoss):
    """Identity preference optimisation (Azar et al., 2023, arXiv 2310.12036), Eq. 17.

    (h - 1 / (2 beta))^2
    """

    beta: Beta = 0.1
    """The paper's tau: 1 / (2 beta) is the target margin. 0.01 to 0.1 is typical."""
    average: bool = True
    """Average log-ratios over tokens, as its authors advise and TRL does, so that beta does not depend on lengths."""

    def __call__(self, scores: Scores) -> "Tensor":
        """Return the loss of each pair."""
        ratios = scores.log_ratios / scores.num_tokens if self.average else scores.log_ratios
        return (scores.differences(ratios) - 1 / (2 * self.beta)) ** 2

    @property
    def at_init(self) -> float:
        """The square of the target margin."""
        return 1 / (2 * self.beta) ** 2


@dataclass(frozen=True, kw_only=True)
class SigmoidNorm(PreferenceLoss):
    """Length-normalised DPO, as in Tulu 3 (Lambert et al., 2024, arXiv 2411.15124).

        -log sigmoid(beta (u / nw - v / nl))

    with nw and nl the tokens of winner and loser.
    """

    beta: Beta = 5.0
    """Scale of the reward, per nat a token; 5 is typical."""

    at_init: ClassVar[float] = math.log(2)

    def reward(self, scores: Scores) -> "Tensor":
        """Return `beta` times the log-ratio per token, `[R]`."""
        return self.beta * scores.log_ratios / scores.num_tokens

    def __call__(self, scores: Scores) -> "Tensor":
        """Return the loss of each pair."""
        return -log_sigmoid(scores.differences(self.reward(scores)))


@dataclass(frozen=True, kw_only=True)
class RDPO(PreferenceLoss):
    """Length-regularised DPO (Park et al., 2024, arXiv 2403.19159).

        -log sigmoid(beta h + alpha (nw - nl))

    with nw and nl the tokens of winner and loser: a longer winner gets a smaller gradient.
    """

    alpha: Annotated[float, Ge(0)] = 0.01
    """Strength of the regularisation, per token; 0.01 to 0.05 is typical."""

    def __call__(self, scores: Scores) -> "Tensor":
        """Return the loss of each pair."""
        lengths = scores.num_tokens.to(scores.logps.dtype)
        return -log_sigmoid(self.beta * scores.margins + self.alpha * scores.differences(lengths))


@dataclass(frozen=True, kw_only=True)
class DPOP(PreferenceLoss):
    """DPO-positive, or Smaug (Pal et al., 2024, arXiv 2402.13228): winners must not become less likely.

    -log sigmoid(beta (h - penalty max(0, -u)))
    """

    beta: Beta = 0.3
    """Scale of the reward, per nat; 0.3 is typical."""
    penalty: Annotated[float, Ge(0)] = 50.0
    """The paper's lambda: the weight of a winner's loss of likelihood; 5 to 50 is typical."""

    at_init: ClassVar[float] = math.log(2)

    def __call__(self, scores: Scores) -> "Tensor":
        """Return the loss of each pair."""
        won, lost = scores.split(scores.log_ratios)
        return -log_sigmoid(self.beta * (won - lost - self.penalty * (-won).relu()))


@dataclass(frozen=True, kw_only=True)
class EXOPair(PreferenceLoss):
    """Efficient exact optimisation of preferences (Ji et al., 2024, arXiv 2402.00856), of pairs.

        s (log s - log(1 - eps)) + (1 - s) (log(1 - s) - log eps),  s = sigmoid(beta h)

    the reverse KL divergence from the labels, smoothed by eps.
    """

    label_smoothing: Annotated[float, Gt(0), Lt(0.5)] = 1e-3
    """eps, the share of preferences that is assumed to be flipped; the loss is not defined at 0."""

    def __call__(self, scores: Scores) -> "Tensor":
        """Return the loss of each pair."""
        logits, eps = self.beta * scores.margins, self.label_smoothing
        agree = logits.sigmoid() * (log_sigmoid(logits) - math.log(1 - eps))
        return agree + (-logits).sigmoid() * (log_sigmoid(-logits) - math.log(eps))

    @property
    def at_init(self) -> float:
        """The loss at h = 0, where both answers are equally likely to be preferred."""
        eps = self.label_smoothing
        return -math.log(2) - (math.log(1 - eps) + math.log(eps)) / 2


@dataclass(frozen=True, kw_only=True)
class DiscoPOP(PreferenceLoss):
    """Discovered preference optimisation (Lu et al., 2024, arXiv 2406.08414), the log-ratio modulated loss.

        -(1 - s) log sigmoid(z) + s exp(-z),  z = beta h,  s = sigmoid(z / tau)

    Its slope at h = 0 is negative only for a tau above (1 - ln 2) / 3 = 0.102: with the published one a policy that
    equals its reference first moves away from the winners, towards a local minimum at a negative margin.
    """

    beta: Beta = 0.05
    """Scale of the reward, per nat; 0.05 is typical."""
    tau: Annotated[float, Gt(0), Le(1)] = 0.05
    """Temperature of the mixture of the logistic and the exponential loss, in rewards."""

    at_init: ClassVar[float] = (math.log(2) + 1) / 2

    def __call__(self, scores: Scores) -> "Tensor":
        """Return the loss of each pair."""
        logits = self.beta * scores.margins
        logistic = -(-logits / self.tau).sigmoid() * log_sigmoid(logits)
        # One exponential: s vanishes faster than exp(-z) grows, and each by itself would overflow.
        return logistic + (log_sigmoid(logits / self.tau) - logits).exp()


@dataclass(frozen=True, kw_only=True)
class FDPO(PreferenceLoss):
    """DPO under another divergence from the reference (Wang et al., 2023, arXiv 2309.16240).

        -log sigmoid(beta (f'(exp u) - f'(exp v)))

    where, but for constants, f'(exp r) is -exp(-r) for the forward KL, log sigmoid(r) for Jensen-Shannon, and
    exp((alpha - 1) r) / (alpha - 1) for the alpha divergence. That is the convention of TRL 1: alpha near 0 is
    the forward KL, near 1 the reverse KL, which is DPO itself. Others write 1 - alpha for it; they agree at 0.5.
    Exponents are capped at 80.
    """

    divergence: Literal["forward_kl", "js", "alpha"] = "js"
    """The divergence that keeps the policy near the reference."""
    alpha: Annotated[float, Gt(0), Lt(1)] | None = None
    """The parameter of `divergence: alpha`; null is 0.5."""

    at_init: ClassVar[float] = math.log(2)

    def __post_init__(self) -> None:
        """Refuse an alpha without effect."""
        if self.alpha is not None and self.divergence != "alpha":
            raise ValueError(
                f"alpha does nothing with divergence: {self.divergence}; drop it, or set divergence: alpha"
            )

    def __call__(self, scores: Scores) -> "Tensor":
        """Return the loss of each pair."""
        return -log_sigmoid(self.beta * scores.differences(self._slope(scores.log_ratios)))

    def _slope(self, ratios: "Tensor") -> "Tensor":
        """The derivative f' at the probability ratio, without its constant."""
        if self.divergence == "js":
            return log_sigmoid(ratios)
        exponent = -1.0 if self.divergence == "forward_kl" else (0.5 if self.alpha is None else self.alpha) - 1
        return (exponent * ratios).clamp(max=LARGEST_EXPONENT).exp() / exponent


@dataclass(frozen=True, kw_only=True)
class LDDPO(PreferenceLoss):
    """Length-desensitised DPO (Liu et al., 2024, arXiv 2409.06411): tokens beyond the shorter response count less.

        -log sigmoid(beta h),  with log p = sum over t <= m + alpha (sum over t > m)

    for policy and reference alike, m the tokens of the shorter response.
    """

    alpha: Annotated[float, Ge(0), Le(1)] = 0.5
    """Weight of the tokens after the m-th: 1 is DPO, 0 leaves them out; 0.3 to 0.6 is typical."""

    needs: ClassVar[frozenset[Need]] = frozenset({"head"})
    at_init: ClassVar[float] = math.log(2)

    def reward(self, scores: Scores) -> "Tensor":
        """Return `beta` times the discounted log-ratio, `[R]`."""
        head = required(scores.head_logps, "head_logps") - required(scores.ref_head_logps, "ref_head_logps")
        return self.beta * (head + self.alpha * (scores.log_ratios - head))

    def __call__(self, scores: Scores) -> "Tensor":
        """Return the loss of each pair."""
        return -log_sigmoid(scores.differences(self.reward(scores)))


@dataclass(frozen=True, kw_only=True)
class WPO(PreferenceLoss):
    """Weighted preference optimisation (Zhou et al., 2024, arXiv 2406.11827): likely pairs weigh more.

        -w_w w_l log sigmoid(beta h),  w = exp(mean over t of (log p(y_t) - log sum_v p(v)^2))

    The weights are constants. A response drawn from the policy has a w of about 1.
    """

    beta: Beta = 0.01
    """Scale of the reward, per nat; 0.01 is typical."""
    clamp: bool = True
    """Limit the weight of a pair to 1, as its authors' code does; TRL does not."""

    needs: ClassVar[frozenset[Need]] = frozenset({"confidence"})

    def __call__(self, scores: Scores) -> "Tensor":
        """Return the loss of each pair."""
        won, lost = scores.split(required(scores.confidence, "confidence").detach())
        log_weight = (won + lost).clamp(max=0) if self.clamp else won + lost
        return -log_weight.exp() * log_sigmoid(self.beta * scores.margins)


@dataclass(frozen=True, kw_only=True)
class SimPO(PreferenceLoss):
    """Simple preference optimisation (Meng et al., 2024, arXiv 2405.14734).

        -log sigmoid(beta (p_w / nw - p_l / nl) - gamma),  gamma = gamma_beta_ratio beta

    with nw and nl the tokens of winner and loser.
    """

    beta: Beta = 2.0
    """Scale of the reward, per nat a token; 2 to 2.5 is typical, 10 for Gemma."""
    gamma_beta_ratio: Annotated[float, Ge(0)] = 0.5
    """The target margin, in nats a token, as its authors write it; TRL's simpo_gamma is beta times it."""

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

"""The losses: each a frozen dataclass whose fields are its recipe keys and whose call is the paper's equation.

A loss returns one value per item (`"pairs"`, `"responses"` or `"tokens"`) and never divides: the loop does.
It is written in tensor methods alone and imports no torch, so that a recipe is checked without that wait.

To add one: a dataclass here, a line in `LOSSES`, and a row of hand-computed values in its test.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Protocol

from annotated_types import Ge, Gt, Lt

if TYPE_CHECKING:
    from torch import Tensor

Item = Literal["pairs", "responses", "tokens"]


@dataclass(frozen=True)
class Scores:
    """What a loss judges: R responses, and M pairs (winner, loser) among them.

    Attributes:
        logps: `[R]`, summed log-probability of each response under the policy, in nats.
        num_tokens: `[R]`, scored tokens of each response, its end-of-turn included.
        pairs: `[M, 2]`, indices into the responses.
        ref_logps: `[R]` under the reference; `None` stands for a uniform one, which cancels in every pair.
        token_logps: `[N]`, one for every scored token of every response.
    """

    logps: "Tensor"
    num_tokens: "Tensor"
    pairs: "Tensor"
    ref_logps: "Tensor | None" = None
    token_logps: "Tensor | None" = None

    @property
    def log_ratios(self) -> "Tensor":
        """`[R]`, log pi(y|x) - log ref(y|x)."""
        return self.logps if self.ref_logps is None else self.logps - self.ref_logps

    @property
    def margins(self) -> "Tensor":
        """`[M]`, log-ratio of the winner minus log-ratio of the loser."""
        return self.differences(self.log_ratios)

    def differences(self, values: "Tensor") -> "Tensor":
        """`[M]`, a value `[R]` of the winner minus that of the loser."""
        return values[self.pairs[:, 0]] - values[self.pairs[:, 1]]


class Loss(Protocol):
    """What the loop asks of a loss."""

    item: ClassVar[Item]
    couples_batch: ClassVar[bool]

    @property
    def needs_reference(self) -> bool:
        """Whether `Scores.ref_logps` must be there."""
        ...

    def __call__(self, scores: Scores) -> "Tensor":
        """Return one value for each item, not averaged."""
        ...


class PreferenceLoss(Loss, Protocol):
    """A loss over pairs, whose implicit reward is `beta` times the log-ratio."""

    @property
    def beta(self) -> float:
        """Scale of the reward, per nat."""
        ...

    def at_init(self) -> float | None:
        """Value of every pair while policy and reference are equal; `None` where it depends on the data."""
        ...


def log_sigmoid(x: "Tensor") -> "Tensor":
    """Return log(1 / (1 + exp(-x))), finite for every finite `x`."""
    return -(-x).logaddexp(x.new_zeros(()))


@dataclass(frozen=True, kw_only=True)
class Sigmoid:
    """Direct preference optimisation (Rafailov et al., 2023, arXiv 2305.18290), Eq. 7.

        -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h)

    with h the margin and eps the label smoothing: above zero this is conservative DPO (Mitchell, 2023), which takes
    that share of the preferences to be flipped. A higher beta keeps the policy closer to the reference.
    """

    beta: Annotated[float, Gt(0)] = 0.1
    label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = 0.0
    reference_free: bool = False

    item: ClassVar[Item] = "pairs"
    couples_batch: ClassVar[bool] = False

    @property
    def needs_reference(self) -> bool:
        """True unless the reference is taken to be uniform."""
        return not self.reference_free

    def __call__(self, scores: Scores) -> "Tensor":
        """Return the loss of each pair."""
        logits = self.beta * scores.margins
        keep, flip = log_sigmoid(logits), log_sigmoid(-logits)
        return -(1 - self.label_smoothing) * keep - self.label_smoothing * flip

    def at_init(self) -> float | None:
        """Ln 2, whatever the smoothing."""
        return None if self.reference_free else math.log(2)


@dataclass(frozen=True, kw_only=True)
class IPO:
    """Identity preference optimisation (Azar et al., 2023, arXiv 2310.12036), Eq. 17.

        (h - 1 / (2 beta))^2

    The paper's h is the margin of summed log-probabilities (`average: false`). By default h is the margin of the
    log-ratios per token, which its authors advise and TRL computes: beta then does not depend on the answers' lengths.
    """

    beta: Annotated[float, Gt(0)] = 0.1
    average: bool = True

    item: ClassVar[Item] = "pairs"
    couples_batch: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = True

    def __call__(self, scores: Scores) -> "Tensor":
        """Return the loss of each pair."""
        ratios = scores.log_ratios / scores.num_tokens if self.average else scores.log_ratios
        return (scores.differences(ratios) - 1 / (2 * self.beta)) ** 2

    def at_init(self) -> float:
        """The square of the target margin."""
        return 1 / (2 * self.beta) ** 2


@dataclass(frozen=True, kw_only=True)
class Hinge:
    """Hinge loss on the margin, as in SLiC (Zhao et al., 2023, arXiv 2305.10425) and RSO (Liu et al., 2309.06657).

    max(0, 1 - beta h)
    """

    beta: Annotated[float, Gt(0)] = 0.1

    item: ClassVar[Item] = "pairs"
    couples_batch: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = True

    def __call__(self, scores: Scores) -> "Tensor":
        """Return the loss of each pair."""
        return (1 - self.beta * scores.margins).relu()

    def at_init(self) -> float:
        """One: a margin of zero."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class TokenNLL:
    """Negative log-likelihood of every scored token: supervised fine-tuning, averaged over tokens."""

    item: ClassVar[Item] = "tokens"
    couples_batch: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False

    def __call__(self, scores: Scores) -> "Tensor":
        """Return the loss of each scored token."""
        if scores.token_logps is None:
            raise ValueError("TokenNLL judges tokens, and these scores hold none")
        return -scores.token_logps


LOSSES: dict[str, type[PreferenceLoss]] = {"sigmoid": Sigmoid, "ipo": IPO, "hinge": Hinge}

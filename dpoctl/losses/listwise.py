"""Losses of a whole ranking. r_k is the reward of a record's k-th best response: beta times its log-ratio."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from dpoctl.losses.base import Beta, Item, PreferenceLoss, Rows, Scores

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PlackettLuce(PreferenceLoss):
    """List-wise DPO under the Plackett-Luce model (Rafailov et al., 2023, arXiv 2305.18290), appendix A.3.

        -sum over k of (r_k - log sum over j >= k of exp r_j),  responses from best to worst

    With two responses this is DPO. Each response is compared with those that it beats, so the records of a batch may
    differ in size, and in how much of their order is known.
    """

    beta: Beta = 0.1
    """Scale of the reward, per nat; 0.1 is typical."""
    average: bool = False
    """Divide by K - 1, the number of choices in a ranking of K responses."""

    item: ClassVar[Item] = "records"
    rows: ClassVar[Rows] = "rankings"

    def __call__(self, scores: Scores) -> "Tensor":
        """Return the loss of each record."""
        values = per_record(scores, choices(scores, self.reward(scores)))
        return values / (scores.outline.starts.diff() - 1).clamp(min=1) if self.average else values


@dataclass(frozen=True, kw_only=True)
class SDPO(PreferenceLoss):
    """Softmax DPO (Chen et al., 2024, arXiv 2406.09215): the best response against all others at once.

        -log sigmoid(-log sum over l of exp(r_l - r_w))

    with w the best response of a record and l all that it beats; the order of the others does not matter.
    """

    beta: Beta = 0.1
    """Scale of the reward, per nat."""

    item: ClassVar[Item] = "records"
    rows: ClassVar[Rows] = "rankings"

    def __call__(self, scores: Scores) -> "Tensor":
        """Return the loss of each record."""
        values = choices(scores, self.reward(scores))
        is_beaten = values.new_zeros(len(values)).index_fill(0, scores.pairs[:, 1], 1.0)
        return per_record(scores, values * (1 - is_beaten))


def choices(scores: Scores, rewards: "Tensor") -> "Tensor":
    """`[R]`, -log of the chance that a response with these rewards `[R]` is chosen among itself and those it beats."""
    winners = scores.pairs[:, 0]
    lead = -scores.differences(rewards)
    # log(1 + sum of exp), taken from the largest term or from the 1, whichever is larger.
    largest = rewards.new_zeros(len(rewards)).scatter_reduce(0, winners, lead.detach(), "amax")
    terms = (lead - largest[winners]).exp()
    return largest + (-largest).exp().index_add(0, winners, terms).log()


def per_record(scores: Scores, values: "Tensor") -> "Tensor":
    """`[G]`, sums over the responses of each record."""
    size = len(scores.outline.starts) - 1
    return values.new_zeros(size).index_add(0, scores.outline.records, values)

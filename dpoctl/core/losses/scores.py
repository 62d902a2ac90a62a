"""What a loss judges, and what is asked of a loss."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge, Gt

if TYPE_CHECKING:
    from torch import Tensor

Item = Literal["pairs", "responses", "records", "tokens", "target_tokens"]
Rows = Literal["demonstrations", "pairs", "rankings", "labels"]
Need = Literal["head", "confidence", "mismatched"]
Memory = dict[str, float]

Beta = Annotated[float, Gt(0)]
Weight = Annotated[float, Ge(0)]


@dataclass(frozen=True)
class Scores:
    """R responses of G records, and M pairs (winner, loser) among them.

    Log-probabilities are in nats. Half precision becomes float32 here, so that no loss computes in less.

    Attributes:
        logps: `[R]`, summed log-probability of each response under the policy.
        num_tokens: `[R]`, scored tokens of each response, its end-of-turn included.
        pairs: `[M, 2]`, indices into the responses.
        ref_logps: `[R]` under the reference; `None` stands for a uniform one, which cancels in every pair.
        starts: `[G + 1]`, where the responses of each record start; its last entry is R.
        labels: `[G]`, 1 where a record's response is desirable, 0 where it is not, -1 where nobody said.
        targets: `[G]`, index of the response that a record wants imitated, -1 for none.
        sources: `[G]`, number of the data source of each record.
        token_logps: `[N]`, one for every scored token of every response.
        head_logps: `[R]`, like `logps`, over as many first tokens as the record's shortest response has.
        ref_head_logps: `[R]`, the same under the reference.
        confidence: `[R]`, mean over tokens of log p(y_t) - log sum_v p(v)^2 under the policy; carries no gradient.
    """

    logps: "Tensor"
    num_tokens: "Tensor"
    pairs: "Tensor"
    ref_logps: "Tensor | None" = None
    starts: "Tensor | None" = None
    labels: "Tensor | None" = None
    targets: "Tensor | None" = None
    sources: "Tensor | None" = None
    token_logps: "Tensor | None" = None
    head_logps: "Tensor | None" = None
    ref_head_logps: "Tensor | None" = None
    confidence: "Tensor | None" = None

    def __post_init__(self) -> None:
        """Bring half precision to float32."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and value.is_floating_point() and value.dtype.itemsize < 4:
                object.__setattr__(self, field.name, value.float())

    @property
    def log_ratios(self) -> "Tensor":
        """`[R]`, log pi(y|x) - log ref(y|x)."""
        return self.logps if self.ref_logps is None else self.logps - self.ref_logps

    @property
    def margins(self) -> "Tensor":
        """`[M]`, log-ratio of the winner minus log-ratio of the loser."""
        return self.differences(self.log_ratios)

    @property
    def records(self) -> "Tensor":
        """`[R]`, number of the record of each response."""
        sizes = required(self.starts, "starts").diff()
        return sizes.new_ones(len(sizes)).cumsum(0).sub(1).repeat_interleave(sizes)

    def differences(self, values: "Tensor") -> "Tensor":
        """`[M]`, a value `[R]` of the winner minus that of the loser."""
        won, lost = self.split(values)
        return won - lost

    def split(self, values: "Tensor") -> "tuple[Tensor, Tensor]":
        """A value `[R]` of the winners `[M]` and of the losers `[M]`."""
        return values[self.pairs[:, 0]], values[self.pairs[:, 1]]


class Loss(ABC):
    """What the loop asks of a loss. The values that it returns add up to its mean times the count of its item.

    Attributes:
        item: what its mean is taken over.
        rows: the data it judges.
        couples_batch: whether a value depends on other records of the step: then `settle` is shown the whole step.
    """

    item: ClassVar[Item]
    rows: ClassVar[Rows] = "pairs"
    couples_batch: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[Need]:
        """The optional parts of `Scores` that must be there: `head` and `confidence`; `mismatched` responses."""
        return frozenset()

    @property
    def needs_reference(self) -> bool:
        """Whether `Scores.ref_logps` must be there."""
        return False

    @abstractmethod
    def __call__(self, scores: Scores) -> "Tensor":
        """Return the values, whose sum divided by the step's count of `item` is the loss."""

    def settle(self, scores: Scores, memory: Memory, *, step: int, seed: int) -> tuple["Loss", Memory]:
        """Fix what depends on the whole of a training step.

        Args:
            scores: of the whole step over all ranks, without gradients.
            memory: what it returned in the step before; empty in the first. It survives a checkpoint.
            step: number of the step.
            seed: of the run; with `step` it decides every draw.

        Returns:
            The loss of this step, and the memory for the next.
        """
        return self, memory

    def at_eval(self) -> "Loss":
        """Return the loss that evaluation data is judged by; it is not settled."""
        return self

    def metrics(self, scores: Scores) -> "dict[str, tuple[Tensor | float, int]]":
        """Return what else a settled loss has to log of its step: a sum and a count by name."""
        return {}


@dataclass(frozen=True, kw_only=True)
class PreferenceLoss(Loss):
    """A loss with an implicit reward. What a subclass does not say is as here."""

    beta: Beta = 0.1
    """Scale of the reward, per nat: higher keeps the policy closer to the reference."""
    sft_weight: Weight = 0.0
    """Weight of a further term: the mean negative log-likelihood of the tokens of preferred responses."""

    item: ClassVar[Item] = "pairs"

    @property
    def needs_reference(self) -> bool:
        """True: rewards are log-ratios."""
        return True

    def reward(self, scores: Scores) -> "Tensor":
        """Return the implicit reward `[R]` of each response."""
        return self.beta * scores.log_ratios

    def at_init(self) -> float | None:
        """Return the loss while policy and reference are equal; `None` where it depends on the data."""
        return None


def required(value: "Tensor | None", name: str) -> "Tensor":
    """Return an optional part of `Scores` that must be there."""
    if value is None:
        raise ValueError(f"the loss needs {name}, and these scores hold none")
    return value


def log_sigmoid(x: "Tensor") -> "Tensor":
    """Return log(1 / (1 + exp(-x))), finite for every finite `x`."""
    return -(-x).logaddexp(x.new_zeros(()))

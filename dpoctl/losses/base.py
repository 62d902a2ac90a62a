"""The interface of a loss: the scores that it gets, the inputs that it declares, and weighted sums of losses."""

from abc import ABC, abstractmethod
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_type_hints

from annotated_types import Ge, Gt
from pydantic import BaseModel, ConfigDict, create_model

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

Item = Literal["pairs", "responses", "records", "tokens", "target_tokens"]
Rows = Literal["demonstrations", "pairs", "rankings", "labels"]
Need = Literal["head", "confidence", "mismatched"]
Memory = dict[str, float]
Beta = Annotated[float, Gt(0)]
Weight = Annotated[float, Ge(0)]
STRICT = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
"""The checks of a value that a recipe gives: no unknown keys, no coercion, only finite numbers."""


@dataclass(frozen=True)
class Outline:
    """The structure of a batch or a step, known without a model: R responses of G records, and M pairs of responses.

    Attributes:
        num_tokens: `[R]`, scored tokens of each response, its end-of-turn included.
        pairs: `[M, 2]`, (winner, loser), indices into the responses.
        starts: `[G + 1]`, index of each record's first response; the last entry is R.
        labels: `[G]`, 1 for a desirable response, 0 for an undesirable one, -1 for a record without a label.
        targets: `[G]`, index of the response that a record wants imitated, -1 for none.
        sources: `[G]`, number of each record's data source.
        imitated: `[G']`, the targets that are not -1.
    """

    num_tokens: "Tensor"
    pairs: "Tensor"
    starts: "Tensor"
    labels: "Tensor"
    targets: "Tensor"
    sources: "Tensor"
    imitated: "Tensor"

    @property
    def records(self) -> "Tensor":
        """`[R]`, number of the record of each response."""
        sizes = self.starts.diff()
        # Without `output_size` the host waits for a GPU to know the number of responses.
        return sizes.new_ones(len(sizes)).cumsum(0).sub(1).repeat_interleave(sizes, output_size=len(self.num_tokens))

    def count(self, item: Item) -> "Tensor | int":
        """Return the number of items."""
        if item == "pairs":
            return len(self.pairs)
        if item == "responses":
            return len(self.num_tokens)
        if item == "records":
            return len(self.targets)
        if item == "tokens":
            return self.num_tokens.sum()
        return (self.num_tokens[self.targets.clamp(0)] * (self.targets >= 0)).sum()

    def map(self, function: "Callable[[Tensor], Tensor]") -> "Outline":
        """Return the outline with a function applied to each of its tensors."""
        return Outline(**{name: function(column) for name, column in vars(self).items()})


@dataclass(frozen=True)
class Scores:
    """The log-probabilities of responses, in nats, and what else a loss may need to know of them.

    Half precision becomes float32 here, so that no loss computes in less.

    Attributes:
        logps: `[R]`, summed log-probability of each response under the policy.
        outline: lengths, pairs and records of the responses.
        ref_logps: `[R]` under the reference; `None` stands for a uniform one, which cancels in every pair.
        token_logps: `[N]`, one for every scored token of every response.
        head_logps: `[R]`, like `logps`, over as many first tokens as the record's shortest response has.
        ref_head_logps: `[R]`, the same under the reference.
        confidence: `[R]`, mean over tokens of log p(y_t) - log sum_v p(v)^2 under the policy; carries no gradient.
    """

    logps: "Tensor"
    outline: Outline
    ref_logps: "Tensor | None" = None
    token_logps: "Tensor | None" = None
    head_logps: "Tensor | None" = None
    ref_head_logps: "Tensor | None" = None
    confidence: "Tensor | None" = None

    def __post_init__(self) -> None:
        """Bring half precision to float32."""
        for name, value in list(vars(self).items()):
            if name != "outline" and value is not None and value.dtype.itemsize < 4:
                object.__setattr__(self, name, value.float())

    @property
    def num_tokens(self) -> "Tensor":
        """`[R]`, scored tokens of each response."""
        return self.outline.num_tokens

    @property
    def pairs(self) -> "Tensor":
        """`[M, 2]`, (winner, loser), indices into the responses."""
        return self.outline.pairs

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
        won, lost = self.split(values)
        return won - lost

    def split(self, values: "Tensor") -> "tuple[Tensor, Tensor]":
        """A value `[R]` of the winners `[M]` and of the losers `[M]`."""
        return values[self.pairs[:, 0]], values[self.pairs[:, 1]]


class Loss(ABC):
    """A loss as the loop uses it: a call returns values that add up to its mean times the count of its item.

    Attributes:
        item: the unit that its mean is taken over.
        rows: the kind of data that it is for.
        couples_batch: whether a value depends on other records of the step; `for_step` then sees the whole step.
    """

    item: ClassVar[Item]
    rows: ClassVar[Rows] = "pairs"
    couples_batch: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[Need]:
        """The optional inputs that it needs: `head` and `confidence` of `Scores`, and `mismatched` responses."""
        return frozenset()

    @property
    def needs_reference(self) -> bool:
        """Whether `Scores.ref_logps` must be there."""
        return False

    @abstractmethod
    def __call__(self, scores: Scores) -> "Tensor":
        """Return the values, whose sum divided by the step's count of `item` is the loss."""

    def for_step(self, scores: Scores, memory: Memory, *, step: int, seed: int) -> tuple["Loss", Memory]:
        """Return the loss with the statistics of a training step filled in.

        Args:
            scores: of the whole step over all ranks, without gradients.
            memory: the one returned for the step before, empty in the first step; checkpoints keep it.
            step: number of the step.
            seed: of the run; with `step` it decides every random draw.

        Returns:
            The loss of this step, and the memory for the next.
        """
        return self, memory

    def at_eval(self) -> "Loss":
        """Return the loss for evaluation data, which is used without `for_step`."""
        return self

    def metrics(self, scores: Scores) -> "dict[str, tuple[Tensor | float, int]]":
        """Return metrics of its own, each a sum and a count; asked of the loss that `for_step` returned."""
        return {}


@dataclass(frozen=True, kw_only=True)
class PreferenceLoss(Loss):
    """A loss with an implicit reward, by default `beta` times the log-ratio to a reference."""

    beta: Beta = 0.1
    """Scale of the reward, per nat: higher keeps the policy closer to the reference."""
    sft_weight: Weight = 0.0
    """Weight of a further term: the mean negative log-likelihood of the tokens of preferred responses."""

    item: ClassVar[Item] = "pairs"

    @property
    def at_init(self) -> float | None:
        """The loss of a policy that equals its reference, `None` if it depends on the data."""
        return None

    @property
    def needs_reference(self) -> bool:
        """True, as rewards are log-ratios."""
        return True

    def reward(self, scores: Scores) -> "Tensor":
        """Return the implicit reward `[R]` of each response."""
        return self.beta * scores.log_ratios


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

    Its gradient grows with a response's length, where that of `TokenNLL` does not.
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
        return -scores.logps[scores.outline.imitated]


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


@cache
def loss_parameters(loss: type[Loss] | None, *, with_weight: bool = False) -> type[BaseModel]:
    """Return the pydantic model of a loss's hyperparameters, as strict as the rest of a recipe.

    Args:
        loss: a dataclass; None has no hyperparameters.
        with_weight: add the weight of a loss among several.
    """
    found: dict[str, Any] = {"weight": (Annotated[float, Gt(0)], 1.0)} if with_weight else {}
    if loss is not None:
        annotations = get_type_hints(loss, include_extras=True)
        found |= {
            field.name: (annotations[field.name], ... if field.default is MISSING else field.default)
            for field in fields(loss)  # type: ignore[arg-type]
        }
    return create_model("sft" if loss is None else loss.__name__, __config__=STRICT, **found)


def required(value: "Tensor | None", name: str) -> "Tensor":
    """Return an optional column of `Scores`, or raise `ValueError` if it is missing."""
    if value is None:
        raise ValueError(f"the loss needs {name}, but the scores have none")
    return value


def log_sigmoid(x: "Tensor") -> "Tensor":
    """Return log(1 / (1 + exp(-x))), finite for every finite `x`."""
    return -(-x).logaddexp(x.new_zeros(()))

"""beta-DPO: a loss whose beta follows the step's data, on pairs that are not outliers."""

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from annotated_types import Ge, Lt
from pydantic import ValidationError

from dpoctl.core import losses
from dpoctl.core.losses.scores import Beta, Loss, Memory, Need, PreferenceLoss, Scores
from dpoctl.recipe.loss import loss_parameters

if TYPE_CHECKING:
    from torch import Tensor

Gaps = np.ndarray[tuple[int], np.dtype[np.float64]]
Kept = np.ndarray[tuple[int], np.dtype[np.bool_]]

FIXED = ("momentum", "beta_min", "beta_max", "gap_scale", "debias", "base")
"""What `parity: original` decides: in the released code these are constants."""


@dataclass(frozen=True, kw_only=True)
class BetaDPO(PreferenceLoss):
    """beta-DPO (Wu et al., 2024, arXiv 2407.08639): beta from the step's data, and a filter of outliers.

        gap = (reward of winner - reward of loser) / beta
        M0 <- m M0 + (1 - m) mean(gap),  sigma <- m sigma + (1 - m) std(gap)
        kept: a share 1 - filter_ratio of the pairs, drawn without replacement by exp(-(gap - M0)^2 / (2 sigma^2))
        beta used = max(beta_min, beta (1 + alpha (mean of the kept gaps - M0)))
        loss: the mean of the base loss, with that beta, over the kept pairs

    The batch is the whole step, over all ranks. While sigma is 0, and in a step of one pair, every pair is kept and
    beta is as given. Rewards are logged with the beta of the recipe; evaluation takes the base loss with that beta, of
    all pairs.
    """

    beta: Beta = 0.1
    """beta0, the beta of a step whose gaps are the usual ones; in the unit of the base loss, and typical as there."""
    alpha: Annotated[float, Ge(0)] = 0.6
    """How much beta follows the gaps, per nat, or per reward with `gap_scale: reward`; 0.6 to 1 is typical."""
    filter_ratio: Annotated[float, Ge(0), Lt(1)] = 0.2
    """The share of pairs that is left out; 0.2 to 0.5 is typical."""
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    """m: how slowly the moving mean and spread of the gaps change."""
    beta_min: Beta = 1e-3
    """The lowest beta that is used."""
    beta_max: Beta | None = None
    """The highest beta that is used; null has no limit."""
    gap_scale: Literal["raw", "reward"] = "raw"
    """Take gaps in nats, as the released code does, or times beta, as the paper writes."""
    debias: bool | None = None
    """Correct the moving mean and spread for their start at 0; null is true, but false with `parity: original`."""
    parity: Literal["ours", "original"] = "ours"
    """The released code instead: its constants, no correction, and weights that may underflow in float32."""
    base: str | dict[str, Any] = "sigmoid"
    """The loss of a pair: its name, or a mapping of its `type` and what it takes besides beta and sft_weight."""

    couples_batch: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse a wrong base, and what would do nothing."""
        check_base(self.base)
        if self.alpha == 0 and self.filter_ratio == 0:
            raise ValueError("alpha and filter_ratio are both 0, which is the base loss itself")
        if self.alpha == 0 and (idle := self._given("beta_min", "beta_max", "gap_scale")):
            raise ValueError(f"alpha: 0 leaves nothing to do for {idle}; drop that, or raise alpha")
        if not self.beta_min <= self.beta <= (self.beta_max or self.beta):
            raise ValueError("beta must be between beta_min and beta_max")
        if self.parity == "original" and (given := self._given(*FIXED)):
            raise ValueError(f"parity: original has its own {given}; drop that, or set parity: ours")

    def _given(self, *names: str) -> str:
        """Which of these are not at their defaults."""
        return ", ".join(
            one.name for one in fields(self) if one.name in names and getattr(self, one.name) != one.default
        )

    @property
    def needs(self) -> frozenset[Need]:
        """What the base loss needs."""
        return self.at_eval().needs

    @property
    def needs_reference(self) -> bool:
        """Whether the base loss needs one."""
        return self.at_eval().needs_reference

    def reward(self, scores: Scores) -> "Tensor":
        """Return the reward `[R]` of the base loss."""
        return self.at_eval().reward(scores)

    def at_init(self) -> float | None:
        """Return what the base loss has."""
        return self.at_eval().at_init()

    def at_eval(self) -> PreferenceLoss:
        """Return the base loss with the beta of the recipe."""
        kind, given = base_of(self.base)
        return kind(**given, beta=self.beta, sft_weight=self.sft_weight)

    def __call__(self, scores: Scores) -> "Tensor":
        """Return the base loss of each pair."""
        return self.at_eval()(scores)

    def settle(self, scores: Scores, memory: Memory, *, step: int, seed: int) -> tuple[Loss, Memory]:
        """Bring the moments up to date, draw the pairs, and choose beta."""
        scale = 1.0 if self.gap_scale == "reward" else 1 / self.beta
        gaps: Gaps = (scores.differences(self.reward(scores)).detach().double() * scale).cpu().numpy()
        memory = self._remember(gaps, memory)
        mean, std = self._moments(memory)
        kept = np.ones(len(gaps), dtype=np.bool_)
        beta = self.beta
        if std > 0 and len(gaps) > 1:
            kept = self._draw((gaps - mean) / std, np.random.default_rng((seed, step)))
            beta = max(beta * (1 + self.alpha * (float(gaps[kept].mean()) - mean)), self.beta_min)
            beta = beta if self.beta_max is None else min(beta, self.beta_max)
        share = scores.logps.new_tensor(kept * len(kept) / kept.sum())
        return SettledBetaDPO(**vars(self), beta_used=beta, share=share, gap_mean=mean, gap_std=std), memory

    def _remember(self, gaps: Gaps, memory: Memory) -> Memory:
        """Move the moments, which start at 0, towards those of some gaps. One gap has no spread, and moves nothing."""
        if len(gaps) < 2:
            return memory
        moved = {"updates": memory.get("updates", 0.0) + 1}
        for name, value in (("gap_mean", gaps.mean()), ("gap_std", gaps.std(ddof=1))):
            moved[name] = self.momentum * memory.get(name, 0.0) + (1 - self.momentum) * float(value)
        return moved

    def _moments(self, memory: Memory) -> tuple[float, float]:
        """Mean and spread of the gaps so far."""
        is_corrected = self.parity == "ours" if self.debias is None else self.debias
        weight = 1 - self.momentum ** memory.get("updates", 0.0) if is_corrected else 1.0
        return memory.get("gap_mean", 0.0) / (weight or 1.0), memory.get("gap_std", 0.0) / (weight or 1.0)

    def _draw(self, z: Gaps, generator: np.random.Generator) -> Kept:
        """Draw pairs without replacement by weights exp(-z^2 / 2): the highest log-weights plus Gumbel noise."""
        log_weights = -(z**2) / 2
        if self.parity == "original":
            with np.errstate(divide="ignore"):
                log_weights = np.log(np.exp(log_weights).astype(np.float32))
        # The little extra is for 10 * (1 - 0.9), which is less than 1.
        count = max(1, int(len(z) * (1 - self.filter_ratio) + 1e-6))
        order = np.argsort(-(log_weights + generator.gumbel(size=len(z))), kind="stable")
        kept = np.zeros(len(z), dtype=np.bool_)
        kept[order[:count]] = True
        return kept


@dataclass(frozen=True, kw_only=True)
class SettledBetaDPO(BetaDPO):
    """beta-DPO with what one step decided.

    Attributes:
        beta_used: of the base loss.
        share: `[M]`, 0 for a pair that is left out, else pairs over kept pairs: a mean over all is one over the kept.
        gap_mean: M0.
        gap_std: sigma.
    """

    beta_used: float
    share: "Tensor"
    gap_mean: float
    gap_std: float

    def __call__(self, scores: Scores) -> "Tensor":
        """Return the values of the step's pairs."""
        return self.share * replace(self.at_eval(), beta=self.beta_used)(scores)

    def metrics(self, scores: Scores) -> "dict[str, tuple[Tensor | float, int]]":
        """Return beta, the number of kept pairs, and the moments, under the released code's names."""
        figures: dict[str, Tensor | float] = {
            "beta_used": self.beta_used,
            "mask_count": self.share.count_nonzero(),
            "gap_mean": self.gap_mean,
            "gap_std": self.gap_std,
        }
        return {name: (figure, 1) for name, figure in figures.items()}


def base_of(base: str | dict[str, Any]) -> tuple[type[PreferenceLoss], dict[str, Any]]:
    """Return the class of a base loss, and what it is given."""
    given = {"type": base} if isinstance(base, str) else dict(base)
    name = given.pop("type", None)
    possible = {name: kind for name, kind in losses.LOSSES.items() if kind.item == "pairs" and not kind.couples_batch}
    if not (isinstance(name, str) and name in possible):
        raise ValueError(f"base: expected one of {', '.join(possible)}, got {name!r}")
    return possible[name], given


def check_base(base: str | dict[str, Any]) -> None:
    """Refuse a base loss that does not exist, or does not take what it is given."""
    kind, given = base_of(base)
    for key in ("beta", "sft_weight"):
        if key in given:
            raise ValueError(f"base.{key}: {key} stands beside base, not in it")
    try:
        kind(**loss_parameters(kind).model_validate(given).model_dump())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"base.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None

"""Losses that couple the pairs of an optimizer step: AOT, BCO and beta-DPO.

u and v are the log-ratios of winner and loser.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from annotated_types import Ge, Lt
from pydantic import ValidationError

from dpoctl.losses import pairwise, unpaired
from dpoctl.losses.base import Beta, Loss, Memory, Need, PreferenceLoss, Scores, log_sigmoid, loss_parameters, required

if TYPE_CHECKING:
    from torch import Tensor

Gaps = np.ndarray[tuple[int], np.dtype[np.float64]]
Kept = np.ndarray[tuple[int], np.dtype[np.bool_]]
FIXED = ("momentum", "beta_min", "beta_max", "gap_scale", "debias", "base")
"""Keys that `parity: original` fixes: they are constants in the released code."""

BASES: dict[str, type[PreferenceLoss]] = {
    "sigmoid": pairwise.Sigmoid,
    "robust": pairwise.Robust,
    "ipo": pairwise.IPO,
    "hinge": pairwise.Hinge,
    "sigmoid_norm": pairwise.SigmoidNorm,
    "r_dpo": pairwise.RDPO,
    "dpop": pairwise.DPOP,
    "simpo": pairwise.SimPO,
    "cpo": pairwise.CPO,
    "orpo": pairwise.ORPO,
    "apo_zero": unpaired.APOZero,
    "apo_down": unpaired.APODown,
    "ld_dpo": pairwise.LDDPO,
    "wpo": pairwise.WPO,
    "exo_pair": pairwise.EXOPair,
    "nca_pair": unpaired.NCAPair,
    "sppo_hard": unpaired.SPPOHard,
    "discopop": pairwise.DiscoPOP,
    "f_dpo": pairwise.FDPO,
}
"""The losses of single pairs, each of which beta-DPO can take as its base."""


@dataclass(frozen=True, kw_only=True)
class AOT(PreferenceLoss):
    """Alignment by optimal transport (Melnyk et al., 2024, arXiv 2406.05882), paired.

        -log sigmoid(beta (sort(p_w - p_l) - sort(ref_w - ref_l)))

    The quantiles of the policy's margins over the step must exceed those of the reference's. The values are in sorted
    order, not in that of the pairs.
    """

    beta: Beta = 0.01
    """Scale of the reward, per nat; 0.01 is typical, with many pairs a step."""

    couples_batch: ClassVar[bool] = True
    at_init: ClassVar[float] = math.log(2)

    def __call__(self, scores: Scores) -> "Tensor":
        """Return a value for each quantile."""
        policy = scores.differences(scores.logps).sort().values
        reference = scores.differences(required(scores.ref_logps, "ref_logps")).sort().values
        return -log_sigmoid(self.beta * (policy - reference))


@dataclass(frozen=True, kw_only=True)
class AOTUnpaired(PreferenceLoss):
    """Alignment by optimal transport (Melnyk et al., 2024, arXiv 2406.05882), unpaired.

        -log sigmoid(beta (sort(u) - sort(v)))

    The quantiles of the winners' rewards over the step must exceed those of the losers', whichever prompt they answer.
    The values are in sorted order, not in that of the pairs.
    """

    beta: Beta = 0.01
    """Scale of the reward, per nat; 0.01 is typical, with many pairs a step."""

    couples_batch: ClassVar[bool] = True
    at_init: ClassVar[float] = math.log(2)

    def __call__(self, scores: Scores) -> "Tensor":
        """Return a value for each quantile."""
        won, lost = scores.split(self.reward(scores))
        return -log_sigmoid(won.sort().values - lost.sort().values)


@dataclass(frozen=True, kw_only=True)
class BCOPair(PreferenceLoss):
    """Binary classifier optimisation (Jung et al., 2024, arXiv 2404.04656), of pairs.

        -log sigmoid(beta u - delta) - log sigmoid(-(beta v - delta))

    with delta the mean reward of all responses of all steps so far; in evaluation, of the evaluated step alone.
    """

    beta: Beta = 0.1
    """Scale of the reward, per nat; 0.01 to 0.1 is typical."""
    running_mean: bool = True
    """Shift rewards by delta, as its authors do; false is a delta of 0, as in TRL 1."""

    couples_batch: ClassVar[bool] = True
    at_init: ClassVar[float] = 2 * math.log(2)

    def for_step(self, scores: Scores, memory: Memory, *, step: int, seed: int) -> tuple[Loss, Memory]:
        """Update the running mean reward, and return the loss with it as delta."""
        if not self.running_mean:
            return self, memory
        here = scores.pairs.numel()
        count = memory.get("count", 0.0) + here
        before = memory.get("mean", 0.0)
        mean = before + (float(self._delta(scores)) - before) * here / count
        return BCOPairAtStep(**vars(self), delta=mean), {"count": count, "mean": mean}

    def __call__(self, scores: Scores) -> "Tensor":
        """Return the loss of each pair."""
        won, lost = scores.split(self.reward(scores))
        delta = self._delta(scores)
        return -log_sigmoid(won - delta) - log_sigmoid(delta - lost)

    def _delta(self, scores: Scores) -> "Tensor | float":
        """The mean reward over the pairs of some scores."""
        return self.reward(scores).detach()[scores.pairs].mean() if self.running_mean else 0.0


@dataclass(frozen=True, kw_only=True)
class BCOPairAtStep(BCOPair):
    """BCO with the delta of a step.

    Attributes:
        delta: a reward.
    """

    delta: float

    def _delta(self, scores: Scores) -> float:
        return self.delta

    def metrics(self, scores: Scores) -> "dict[str, tuple[Tensor | float, int]]":
        """Return delta."""
        return {"delta": (self.delta, 1)}


@dataclass(frozen=True, kw_only=True)
class BetaDPO(PreferenceLoss):
    """beta-DPO (Wu et al., 2024, arXiv 2407.08639): beta from the step's data, and a filter of outliers.

        gap = (reward of winner - reward of loser) / beta
        M0 <- m M0 + (1 - m) mean(gap),  sigma <- m sigma + (1 - m) std(gap)
        kept: a share 1 - filter_ratio of the pairs, drawn without replacement by exp(-(gap - M0)^2 / (2 sigma^2))
        beta used = max(beta_min, beta (1 + alpha (mean of the kept gaps - M0)))
        loss: the mean of the base loss, with that beta, over the kept pairs

    The batch is the whole step, over all ranks. While sigma is 0, and in a step of one pair, every pair is kept and
    beta is as given. Logged rewards use the beta of the recipe; evaluation is the base loss with that beta, of all
    pairs.
    """

    beta: Beta = 0.1
    """beta0, used in a step of average gaps; its unit and typical values are those of the base loss."""
    alpha: Annotated[float, Ge(0)] = 0.6
    """Sensitivity of beta to the gaps, per nat, or per reward with `gap_scale: reward`; 0.6 to 1 is typical."""
    filter_ratio: Annotated[float, Ge(0), Lt(1)] = 0.2
    """The share of pairs that is left out; 0.2 to 0.5 is typical."""
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    """m, the momentum of the moving mean and spread of the gaps."""
    beta_min: Beta = 1e-3
    """The lowest beta that is used."""
    beta_max: Beta | None = None
    """The highest beta that is used; null has no limit."""
    gap_scale: Literal["raw", "reward"] = "raw"
    """Measure gaps in nats, as the released code does, or as rewards, as the paper does."""
    debias: bool | None = None
    """Correct the moving mean and spread for starting at 0; null is true, but false with `parity: original`."""
    parity: Literal["ours", "original"] = "ours"
    """`original` is the released code: its constants, no correction, and weights that may underflow in float32."""
    base: str | dict[str, Any] = "sigmoid"
    """The loss of a pair: its name, or a mapping with its `type` and its keys other than beta and sft_weight."""

    couples_batch: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse a wrong base, and keys without effect."""
        check_base(self.base)
        if self.alpha == 0 and self.filter_ratio == 0:
            raise ValueError("alpha and filter_ratio are both 0, which is the base loss itself")
        if self.alpha == 0 and (idle := self._given("beta_min", "beta_max", "gap_scale")):
            what, them = (f"{idle[0]} has", "it") if len(idle) == 1 else (f"{_listed(idle)} have", "them")
            raise ValueError(f"{what} no effect with alpha: 0; remove {them}, or set alpha above 0")
        if not self.beta_min <= self.beta <= (self.beta_max or self.beta):
            highest = "" if self.beta_max is None else f" and at most beta_max ({self.beta_max})"
            raise ValueError(f"beta ({self.beta}) must be at least beta_min ({self.beta_min}){highest}")
        if self.parity == "original" and (given := self._given(*FIXED)):
            own, them = ("its own value", "it") if len(given) == 1 else ("its own values", "them")
            raise ValueError(
                f"{_listed(given)} cannot be set with parity: original, which uses {own}; "
                f"remove {them}, or set parity: ours"
            )

    def _given(self, *names: str) -> list[str]:
        """Names of those keys that are not at their defaults."""
        return [one.name for one in fields(self) if one.name in names and getattr(self, one.name) != one.default]

    @property
    def needs(self) -> frozenset[Need]:
        """The needs of the base loss."""
        return self.at_eval().needs

    @property
    def needs_reference(self) -> bool:
        """Whether the base loss needs one."""
        return self.at_eval().needs_reference

    def reward(self, scores: Scores) -> "Tensor":
        """Return the reward `[R]` of the base loss."""
        return self.at_eval().reward(scores)

    @property
    def at_init(self) -> float | None:
        """Return the value of the base loss."""
        return self.at_eval().at_init

    def at_eval(self) -> PreferenceLoss:
        """Return the base loss with the beta of the recipe."""
        kind, given = base_of(self.base)
        return kind(**given, beta=self.beta, sft_weight=self.sft_weight)

    def __call__(self, scores: Scores) -> "Tensor":
        """Return the base loss of each pair."""
        return self.at_eval()(scores)

    def for_step(self, scores: Scores, memory: Memory, *, step: int, seed: int) -> tuple[Loss, Memory]:
        """Update the moments, draw the pairs to keep, and choose beta."""
        scale = 1.0 if self.gap_scale == "reward" else 1 / self.beta
        gaps: Gaps = (scores.differences(self.reward(scores)).detach().double() * scale).cpu().numpy()
        memory = self._update(memory, gaps)
        mean, std = self._moments(memory)
        kept = np.ones(len(gaps), dtype=np.bool_)
        beta = self.beta
        if std > 0 and len(gaps) > 1:
            kept = self._draw((gaps - mean) / std, np.random.default_rng((seed, step)))
            beta = max(beta * (1 + self.alpha * (float(gaps[kept].mean()) - mean)), self.beta_min)
            beta = beta if self.beta_max is None else min(beta, self.beta_max)
        share = scores.logps.new_tensor(kept * len(kept) / kept.sum())
        return BetaDPOAtStep(**vars(self), beta_used=beta, share=share, gap_mean=mean, gap_std=std), memory

    def _update(self, memory: Memory, gaps: Gaps) -> Memory:
        """Move the moments, which start at 0, towards those of a step. A single gap has no spread: no change."""
        if len(gaps) < 2:
            return memory
        moved = {"updates": memory.get("updates", 0.0) + 1}
        for name, value in (("gap_mean", gaps.mean()), ("gap_std", gaps.std(ddof=1))):
            moved[name] = self.momentum * memory.get(name, 0.0) + (1 - self.momentum) * float(value)
        return moved

    def _moments(self, memory: Memory) -> tuple[float, float]:
        """Moving mean and standard deviation of the gaps."""
        is_corrected = self.parity == "ours" if self.debias is None else self.debias
        weight = 1 - self.momentum ** memory.get("updates", 0.0) if is_corrected else 1.0
        return memory.get("gap_mean", 0.0) / (weight or 1.0), memory.get("gap_std", 0.0) / (weight or 1.0)

    def _draw(self, z: Gaps, generator: np.random.Generator) -> Kept:
        """Draw pairs without replacement by weights exp(-z^2 / 2): the top log-weights after adding Gumbel noise."""
        log_weights = -(z**2) / 2
        if self.parity == "original":
            with np.errstate(divide="ignore"):
                log_weights = np.log(np.exp(log_weights).astype(np.float32))
        # The small addend is for 10 * (1 - 0.9), which is less than 1 in floating point.
        count = max(1, int(len(z) * (1 - self.filter_ratio) + 1e-6))
        order = np.argsort(-(log_weights + generator.gumbel(size=len(z))), kind="stable")
        kept = np.zeros(len(z), dtype=np.bool_)
        kept[order[:count]] = True
        return kept


@dataclass(frozen=True, kw_only=True)
class BetaDPOAtStep(BetaDPO):
    """beta-DPO with the beta, the kept pairs and the moments of a step.

    Attributes:
        beta_used: the beta of the base loss.
        share: `[M]`, 0 for a pair that is left out, else pairs / kept pairs, so that the mean is over the kept ones.
        gap_mean: M0.
        gap_std: sigma.
    """

    beta_used: float
    share: "Tensor"
    gap_mean: float
    gap_std: float

    def __call__(self, scores: Scores) -> "Tensor":
        """Return the weighted loss of each pair."""
        return self.share * replace(self.at_eval(), beta=self.beta_used)(scores)

    def metrics(self, scores: Scores) -> "dict[str, tuple[Tensor | float, int]]":
        """Return beta, the number of kept pairs, and the moments, under the released code's names."""
        return {
            "beta_used": (self.beta_used, 1),
            "mask_count": (self.share.count_nonzero(), 1),
            "gap_mean": (self.gap_mean, 1),
            "gap_std": (self.gap_std, 1),
        }


def _listed(names: list[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def base_of(base: str | dict[str, Any]) -> tuple[type[PreferenceLoss], dict[str, Any]]:
    """Return the class of a base loss, and its hyperparameters."""
    given = {"type": base} if isinstance(base, str) else dict(base)
    name = given.pop("type", None)
    if not (isinstance(name, str) and name in BASES):
        raise ValueError(f"base: expected one of {', '.join(BASES)}, got {name!r}")
    return BASES[name], given


def check_base(base: str | dict[str, Any]) -> None:
    """Refuse a base loss that does not exist, or hyperparameters that it does not have."""
    kind, given = base_of(base)
    for key in ("beta", "sft_weight"):
        if key in given:
            raise ValueError(f"base.{key}: write {key} beside base, not inside it")
    try:
        kind(**loss_parameters(kind).model_validate(given).model_dump())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"base.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None

"""Statistics of an evaluation: means, shares and differences with intervals that know which values share a prompt.

Several answers to one prompt are no independent evidence. Each standard error sums the residuals of a prompt before
it squares them (Liang and Zeger, 1986; Miller, arXiv 2411.00640), and each interval has the degrees of freedom of the
prompts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Z = 1.959964
"""Two-sided 95 %."""
POWER = NormalDist().inv_cdf(0.8)
MEAN, SHARE, RATIO = "t interval", "Wilson interval of the effective number of prompts", "t interval of a ratio"
EXACT = "exact interval of the number of prompts"
LENGTH_CONTROLLED = "Wald interval of a logistic regression"
CORRECTED = "Wald interval with the errors of the calibration"
CLUSTERED = "errors clustered by prompt"
_TINY, _STEPS = 1e-14, 300


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval.

    Attributes:
        value: the estimate.
        error: its standard error; None if it is not known.
        interval: the lower and the upper end; None if a single prompt gives none.
        method: how the interval was computed, in words.
    """

    value: float
    error: float | None
    interval: tuple[float, float] | None
    method: str

    def named(self, name: str) -> dict[str, Any]:
        """Return the keys of a result: the value under a name, the interval, its method and the error beside it."""
        keys: dict[str, Any] = {name: self.value}
        if self.interval is not None:
            keys |= {f"{name}_ci": list(self.interval), f"{name}_ci_method": self.method}
        return keys | ({} if self.error is None else {f"{name}_se": self.error})


def mean(values: ArrayLike, clusters: Sequence[Any]) -> Estimate:
    """Estimate a mean; for paired differences the values are the differences.

    Args:
        values: shape (n,).
        clusters: the prompt of each value; anything that can be compared.
    """
    return ratio(values, np.ones(np.shape(values)), clusters, method=MEAN)


def ratio(numerators: ArrayLike, denominators: ArrayLike, clusters: Sequence[Any], *, method: str = RATIO) -> Estimate:
    """Estimate sum(x) / sum(y), such as nats per token: r, with the error of the linearised residuals x - r y.

    se^2 = G / (G - 1) sum_g (sum_{i in g} (x_i - r y_i))^2 / (sum_i y_i)^2 for G prompts.

    Args:
        numerators: x, shape (n,).
        denominators: y, shape (n,).
        clusters: the prompt of each value.
        method: the name of the interval.
    """
    x, y = _floats(numerators), _floats(denominators)
    total = float(y.sum())
    value = float(x.sum()) / total
    sums = cluster_sums(x - value * y, clusters)
    groups = len(sums)
    if groups < 2:
        return Estimate(value, None, None, method)
    error = math.sqrt(groups / (groups - 1) * float(sums @ sums)) / abs(total)
    spread = t_quantile(0.975, groups - 1) * error
    return Estimate(value, error, (value - spread, value + spread), f"{method}, {CLUSTERED}")


def share(values: ArrayLike, clusters: Sequence[Any], counts: ArrayLike | None = None) -> Estimate:
    """Estimate the mean of values between 0 and 1, such as a win rate in which a tie counts one half.

    The interval is Wilson's with the effective number of independent trials (Korn and Graubard, 1998): of n trials of
    G prompts, n (se0 / se)^2 (t(n - 1) / t(G - 1))^2 with the error of independent trials, se0^2 = p (1 - p) / (n - 1).
    With one trial per prompt it is Wilson's of n trials. If all values are equal, the number of prompts is taken, and
    if all are 0 or all are 1 the interval is exact (Clopper and Pearson, 1934): of few prompts, Wilson's is too short.

    Args:
        values: shape (n,).
        clusters: the prompt of each value.
        counts: the number of trials of each value, if that is a sum of several; shape (n,).
    """
    trials = np.ones(np.shape(values)) if counts is None else _floats(counts)
    kept = [cluster for cluster, count in zip(clusters, trials, strict=True) if count]
    found = ratio(_floats(values)[trials > 0], trials[trials > 0], kept)
    p, n, prompts = found.value, float(trials.sum()), len(set(kept))
    effective = float(prompts)
    if found.error:
        independent = p * (1 - p) / (n - 1)
        freedom = t_quantile(0.975, n - 1) / t_quantile(0.975, prompts - 1)
        effective = n * independent / found.error**2 * freedom**2
    elif p in (0.0, 1.0):
        bound = 0.025 ** (1 / prompts)
        return Estimate(p, found.error, (bound, 1.0) if p else (0.0, 1 - bound), f"{EXACT}, {CLUSTERED}")
    return Estimate(p, found.error, wilson_interval(p, effective), f"{SHARE}, {CLUSTERED}")


def wilson_interval(share: float, count: float, z: float = Z) -> tuple[float, float]:
    """Return the confidence interval of a share (Wilson, 1927).

    Args:
        share: share of successes.
        count: number of independent trials.
        z: the quantile of the interval.
    """
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, centre - spread), min(1.0, centre + spread)


def difference_p_value(values: ArrayLike, clusters: Sequence[Any]) -> float:
    """Return the two-sided p-value of paired differences whose mean is 0 if nothing differs; 1 if all are 0."""
    found = mean(values, clusters)
    if found.error is None or not found.value:
        return 1.0
    return 0.0 if not found.error else t_p_value(found.value / found.error, len(set(clusters)) - 1)


def minimum_detectable(estimate: Estimate, values: ArrayLike, clusters: Sequence[Any]) -> float:
    """Return the smallest true difference that as many prompts would show in four of five evaluations: 2.8 errors.

    Args:
        estimate: the mean of the values.
        values: between 0 and 1; if all are equal, the error is that of independent halves.
        clusters: the prompt of each value.
    """
    error = estimate.error or 0.5 / math.sqrt(len(set(clusters)))
    return (Z + POWER) * error


def length_controlled(wins: ArrayLike, differences: ArrayLike, clusters: Sequence[Any]) -> Estimate:
    """Estimate the win rate between answers of equal length (after arXiv 2404.04475).

    logit P(win) = a + b tanh(d / sd(d)) with the difference d of the lengths; the estimate is 1 / (1 + exp(-a)). The
    fit is Firth's (1993), which is finite also where lengths decide every vote. The error of a is the clustered one, or
    the model's own where lengths decide every vote and no residual is left.

    Args:
        wins: 1 for a win, 0.5 for a tie, 0 for a loss; shape (n,).
        differences: the length of the answer minus that of the other one, in any unit; shape (n,).
        clusters: the prompt of each value.
    """
    y, d = _floats(wins), _floats(differences)
    scale = float(d.std())
    x = np.stack([np.ones_like(d), np.tanh(d / scale) if scale else np.zeros_like(d)], axis=1)
    if not scale:
        x = x[:, :1]
    weights = _firth(x, y)
    residuals = y - _expit(x @ weights)
    information = np.linalg.pinv(_information(x, weights))
    prompts = len(set(clusters))
    scores = np.stack([cluster_sums(column * residuals, clusters) for column in x.T], axis=1)
    robust = information @ (scores.T @ scores) @ information * (prompts / max(1, prompts - x.shape[1]))
    is_decided = _separates(y, x[:, -1])
    variance = max(float(robust[0, 0]), float(information[0, 0])) if is_decided else float(robust[0, 0])
    spread = t_quantile(0.975, max(1, prompts - x.shape[1])) * math.sqrt(variance)
    low, value, high = (float(_expit(np.array(weights[0] + side))) for side in (-spread, 0.0, spread))
    return Estimate(value, value * (1 - value) * math.sqrt(variance), (low, high), f"{LENGTH_CONTROLLED}, {CLUSTERED}")


@dataclass(frozen=True)
class Calibration:
    """The agreement of a judge with people.

    Attributes:
        sensitivity: q1, the judge's mean vote where people preferred the first answer.
        specificity: q0, one minus its mean vote where they preferred the second.
        positives: the number of the former pairs.
        negatives: the number of the latter pairs.
    """

    sensitivity: float
    specificity: float
    positives: int
    negatives: int

    @property
    def is_informative(self) -> bool:
        """Whether the judge agrees with people more often than chance."""
        return self.positives > 0 and self.negatives > 0 and self.sensitivity + self.specificity > 1


def corrected(found: Estimate, count: int, calibration: Calibration) -> Estimate:
    """Correct a judge's win rate for its errors (Rogan and Gladen, 1978; arXiv 2511.21140).

    theta = (p + q0 - 1) / (q0 + q1 - 1). The interval adds the errors of p, q0 and q1, each of shares moved towards one
    half, and is cut at 0 and 1.

    Args:
        found: the judge's win rate p.
        count: the number of prompts.
        calibration: q0 and q1, with q0 + q1 > 1.
    """
    z, (q1, q0) = Z, (calibration.sensitivity, calibration.specificity)
    theta = min(1.0, max(0.0, (found.value + q0 - 1) / (q0 + q1 - 1)))
    m1, m0 = calibration.positives + 2, calibration.negatives + 2
    p = (count * found.value + z * z / 2) / (count + z * z)
    q1, q0 = (calibration.positives * q1 + 1) / m1, (calibration.negatives * q0 + 1) / m0
    slope = q0 + q1 - 1
    if slope <= 0:
        return Estimate(theta, None, (0.0, 1.0), f"{CORRECTED}: they leave everything open")
    moved = (p + q0 - 1) / slope
    first, second = moved * q1 * (1 - q1) / m1, (1 - moved) * q0 * (1 - q0) / m0
    shift = 2 * z * z * (first - second)
    sampling = p * (1 - p) / (count + z * z) if not found.error else found.error**2
    error = math.sqrt(sampling + moved * first + (1 - moved) * second) / slope
    low, high = (min(1.0, max(0.0, moved + shift + side * z * error)) for side in (-1, 1))
    return Estimate(theta, error, (low, high), CORRECTED)


def cluster_sums(values: ArrayLike, clusters: Sequence[Any]) -> Floats:
    """Return the sum of the values of each prompt, in the order of first appearance; shape (G,)."""
    number: dict[Any, int] = {}
    index = [number.setdefault(cluster, len(number)) for cluster in clusters]
    return np.bincount(index, weights=_floats(values), minlength=len(number)).astype(np.float64)


def summary(totals: Mapping[str, Estimate]) -> dict[str, Any]:
    """Return the keys of several estimates, by name."""
    return {key: value for name, estimate in totals.items() for key, value in estimate.named(name).items()}


def t_p_value(t: float, freedom: float) -> float:
    """Return the two-sided p-value of Student's t."""
    return _incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t))


def t_quantile(probability: float, freedom: float) -> float:
    """Return a quantile of Student's t above the median, found by bisection."""
    low, high = 0.0, 1e8
    for _ in range(_STEPS):
        middle = (low + high) / 2 if high - low < 8 else math.sqrt(max(low, 1e-3) * high)
        if 1 - t_p_value(middle, freedom) / 2 < probability:
            low = middle
        else:
            high = middle
        if high - low < 1e-12 * high:
            break
    return (low + high) / 2


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Return the regularised incomplete beta function by its continued fraction (Lentz's method)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, 1 - x)
    scale = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    front = math.exp(scale + a * math.log(x) + b * math.log1p(-x)) / a
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    found = d
    for m in range(1, _STEPS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d, c = 1 / (1 + term * d), 1 + term / c
            found *= c * d
        if abs(c * d - 1) < _TINY:
            break
    return front * found


def _firth(x: Floats, y: Floats) -> Floats:
    """Maximise the likelihood of a logistic regression times Jeffreys' prior, by Newton's method with half steps."""
    weights = np.zeros(x.shape[1])
    value = _penalised(x, y, weights)
    for _ in range(_STEPS):
        chances = _expit(x @ weights)
        w = chances * (1 - chances)
        inverse = np.linalg.pinv(_information(x, weights))
        leverage = w * np.einsum("ij,jk,ik->i", x, inverse, x)
        step = inverse @ (x.T @ (y - chances + leverage * (0.5 - chances)))
        while (after := _penalised(x, y, weights + step)) < value and np.abs(step).max() > _TINY:
            step = step / 2
        weights, value = weights + step, max(value, after)
        if np.abs(step).max() < 1e-10:
            break
    return weights


def _penalised(x: Floats, y: Floats, weights: Floats) -> float:
    linear = x @ weights
    likelihood = float(np.sum(y * linear - np.logaddexp(0, linear)))
    return likelihood + 0.5 * float(np.linalg.slogdet(_information(x, weights))[1])


def _information(x: Floats, weights: Floats) -> Floats:
    chances = _expit(x @ weights)
    found: Floats = (x * (chances * (1 - chances))[:, None]).T @ x
    return found


def _separates(y: Floats, x: Floats) -> bool:
    """Whether a threshold of x parts wins from losses; a tie is both."""
    wins, losses = x[y > 0], x[y < 1]
    if not len(wins) or not len(losses):
        return True
    return bool(wins.min() >= losses.max() or losses.min() >= wins.max())


def _expit(x: Floats) -> Floats:
    return np.asarray(np.exp(-np.logaddexp(0, -x)))


def _floats(values: ArrayLike) -> Floats:
    return np.asarray(values, dtype=np.float64)

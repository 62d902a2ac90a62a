"""Charts of a run's metrics: series of numbers in, coordinates and labels of small figures out.

Nothing here knows HTML. All coordinates are in the units of the figure, which scales with the page.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from dpoctl.runs.metrics import STANDARD_ERROR

WIDTH, HEIGHT = 380, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 30, 24
MOST_POINTS = 240
MOST_STOPS = 48
# Beyond this ratio a falling loss needs a logarithmic scale; on a linear one it is a vertical line, then a flat one.
LOG_RATIO = 8.0
MINUS, HARD_SPACE = "\u2212", "\u00a0"
THOUSANDS = ((1e9, "B"), (1e6, "M"), (1e3, "k"))
Point = tuple[float, float]
Show = Callable[[float], str]
SUMS = "Mean over pairs of beta times log(policy / reference), summed over an answer's tokens, not averaged per token."
STATE = ("epoch", "learning_rate", "grad_norm", "tokens_per_second")
PAIRED = {
    "Rewards": ("rewards/chosen", "rewards/rejected", SUMS),
    "Log-probabilities": (
        "logps/chosen",
        "logps/rejected",
        "Of whole answers under the policy, in nats, summed over tokens. Both may fall: only their gap is trained.",
    ),
    "Answer lengths": ("lengths/chosen", "lengths/rejected", "Mean over pairs, in tokens that are trained on."),
}
TITLES = {
    "samples/finished": "Sampled texts that end",
    "samples/median_length": "Words of a sampled text",
    "nll_loss": "Negative log-likelihood",
    "peak_memory_gb": "Peak memory in GB",
}
ALWAYS = ("Loss", "Reward accuracy", "Reward margin")
# A rise above the best evaluation is reported from this share of the total improvement on.
RISEN = 0.1
# Half the width of a 95 % interval, in standard errors.
Z95 = 1.96
# A preference loss this close to ln 2 has learned nothing.
STUCK = 0.003


@dataclass(frozen=True)
class Series:
    """The points of a line.

    Attributes:
        label: its name in the legend.
        look: its CSS classes, separated by spaces.
        points: (step, value), in the order of the steps; a value may be NaN.
        is_sparse: draw a dot at every point.
    """

    label: str
    look: str
    points: Sequence[Point]
    is_sparse: bool = False


@dataclass(frozen=True)
class Mark:
    """A known value, drawn as a horizontal line."""

    value: float
    label: str


LN2 = Mark(math.log(2), "ln 2")


@dataclass(frozen=True)
class Line:
    """A drawn series: an SVG path, and dots."""

    label: str
    look: str
    path: str
    dots: tuple[Point, ...]


@dataclass(frozen=True)
class Reading:
    """The values of all lines at one step.

    Attributes:
        step: the step.
        x: its coordinate.
        left: left end of the area that shows this reading.
        width: width of that area.
        values: label, CSS classes, height and text of the value of each line.
    """

    step: int
    x: float
    left: float
    width: float
    values: tuple[tuple[str, str, float, str], ...]


@dataclass(frozen=True)
class Figure:
    """Everything that a template needs to draw a figure.

    Attributes:
        title: name of the quantity.
        caption: its meaning.
        summary: the figure in words, for screen readers.
        lines: the curves.
        rows: height and label of each horizontal grid line.
        columns: coordinate and label of each tick on the step axis.
        mark: height and label of the line of a known value.
        readings: values by step; the last one is the end of the run.
        is_flat: whether all values of several steps are the same.
    """

    title: str
    caption: str
    summary: str
    lines: tuple[Line, ...]
    rows: tuple[tuple[float, str], ...]
    columns: tuple[tuple[float, str], ...]
    mark: tuple[float, str] | None = None
    readings: tuple[Reading, ...] = field(default=())
    is_flat: bool = False


def draw(
    title: str,
    caption: str,
    series: Iterable[Series],
    *,
    mark: Mark | None = None,
    bounds: tuple[float, float] | None = None,
    allow_log: bool = False,
    are_shares: bool = False,
) -> Figure | None:
    """Lay out a figure.

    Args:
        title: name of the quantity.
        caption: its meaning.
        series: the lines; those without a finite value are left out.
        mark: a known value, drawn if it is near the lines.
        bounds: known bounds of the values.
        allow_log: use a logarithmic scale if the values span a wide range.
        are_shares: write the values as percentages.

    Returns:
        The figure, or None if there is nothing to draw.
    """
    drawn = [one for one in map(_thin, series) if _finite(one.points)]
    if not drawn:
        return None
    steps = [step for one in drawn for step, _ in one.points]
    across = _Axis(min(0.0, min(steps)), max(1.0, max(steps)), LEFT, WIDTH - RIGHT)
    up = _value_axis([value for one in drawn for _, value in _finite(one.points)], mark, bounds, allow_log)
    ticks = _log_ticks(up) if up.is_log else _ticks(up.low, up.high, 6)
    show = percent if are_shares else number
    known = mark is not None and up.low <= mark.value <= up.high
    return Figure(
        title=title,
        caption=f"{caption} Logarithmic scale." if up.is_log else caption,
        summary=f"{title}: " + "; ".join(_summary(one, show) for one in drawn),
        lines=tuple(_line(one, across, up) for one in drawn),
        rows=tuple((up.place(tick), label) for tick, label in zip(ticks, _labels(ticks, show), strict=True)),
        columns=tuple(
            (across.place(tick), number(tick)) for tick in _ticks(across.low, across.high, 5) if tick % 1 == 0
        ),
        mark=(up.place(mark.value), mark.label) if mark is not None and known else None,
        readings=tuple(_readings(drawn, across, up, show)),
        is_flat=len(set(steps)) > 1 and len({value for one in drawn for _, value in _finite(one.points)}) == 1,
    )


def number(value: float) -> str:
    """Write a number in about three digits: `0.693`, `1.5e-6`, `12.3k`."""
    if not math.isfinite(value):
        return str(value)
    if value < 0:
        return f"{MINUS}{number(-value)}"
    size = value
    if size >= 1e4:
        scale, unit = next((scale, unit) for scale, unit in THOUSANDS if size >= scale)
        return f"{value / scale:.3g}{unit}"
    if value == 0 or size >= 1e-3:
        return f"{value:.4g}" if size >= 1 else f"{value:.3g}"
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def percent(share: float) -> str:
    """Write a share as a percentage with three digits."""
    return f"{100 * share:.3g}{HARD_SPACE}%"


@dataclass(frozen=True)
class History:
    """Metrics by series.

    Attributes:
        train: the points of each training metric.
        evals: the points of each metric of each eval set; `eval` is the main set.
    """

    train: dict[str, list[Point]] = field(default_factory=dict)
    evals: dict[str, dict[str, list[Point]]] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> "History":
        """Group the rows of a metrics file.

        Args:
            rows: one row per step, of training or of one evaluation.
            names: names of the eval sets.
        """
        history = cls()
        for row in rows:
            for key, value in row.items():
                point = _value(value)
                if key == "step" or point is None:
                    continue
                history._series(key, names).append((float(row["step"]), point))
        return history

    @property
    def last_step(self) -> int:
        """The last step with metrics."""
        steps = [points[-1][0] for table in (self.train, *self.evals.values()) for points in table.values()]
        return int(max(steps, default=0))

    def evaluations(self, metric: str) -> list[tuple[str, list[Point]]]:
        """Return the points of a metric on every eval set that has it."""
        return [(name, table[metric]) for name, table in self.evals.items() if metric in table]

    def _series(self, key: str, names: Sequence[str]) -> list[Point]:
        if not key.startswith("eval_"):
            return self.train.setdefault(key, [])
        rest = key.removeprefix("eval_")
        name = next(
            (n for n in sorted(names, key=len, reverse=True) if n != "eval" and rest.startswith(f"{n}_")), "eval"
        )
        metric = rest if name == "eval" else rest.removeprefix(f"{name}_")
        return self.evals.setdefault(name, {}).setdefault(metric, [])


def figures(history: History, recipe: Mapping[str, Any]) -> list[Figure]:
    """Draw every metric of a run: first those of the task, then speed and learning rate, then the user's own.

    One that stays the same, such as a constant learning rate, is not drawn, unless it is what training is for.
    """
    drawn = (figure for figure in _figures(history, recipe) if figure is not None)
    return [figure for figure in drawn if figure.title in ALWAYS or not figure.is_flat]


def observations(history: History, recipe: Mapping[str, Any]) -> list[str]:
    """Describe the curves of the main eval set in sentences."""
    is_dpo = recipe.get("method") == "dpo"
    table = history.evals.get("eval") or next(iter(history.evals.values()), {})
    loss = [point for point in table.get("loss", []) if math.isfinite(point[1])]
    found = list(_pair_observations(table)) if is_dpo else []
    if len(loss) > 1:
        found += _loss_observations(
            loss, dict(table.get(f"loss{STANDARD_ERROR}", [])), starts_at_ln2=_starts_at_ln2(recipe)
        )
    broken = [metric for metric, points in history.train.items() if any(not math.isfinite(v) for _, v in points)]
    if broken:
        found.append(f"Some values are not finite: {', '.join(broken)}.")
    return found


def losses_of(recipe: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the terms of a recipe's preference loss: one, several with weights, or none."""
    loss = (recipe.get("dpo") or {}).get("loss")
    terms = loss if isinstance(loss, list) else [loss]
    return [term for term in terms if isinstance(term, Mapping)]


@dataclass(frozen=True)
class _Axis:
    """An axis: maps values to coordinates."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def place(self, value: float) -> float:
        low, high = self.low, self.high
        if self.is_log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)


def _finite(points: Iterable[Point]) -> list[Point]:
    return [point for point in points if math.isfinite(point[1])]


def _thin(series: Series) -> Series:
    """Replace groups of neighbouring points by their mean if there are more than one can see."""
    points = series.points
    if len(points) <= MOST_POINTS:
        return series
    size = math.ceil(len(points) / MOST_POINTS)
    groups = [points[first : first + size] for first in range(0, len(points), size)]
    means = [(group[-1][0], math.fsum(value for _, value in group) / len(group)) for group in groups]
    return Series(series.label, series.look, means, series.is_sparse)


def _value_axis(
    values: Sequence[float], mark: Mark | None, bounds: tuple[float, float] | None, allow_log: bool
) -> _Axis:
    low, high = bounds or (min(values), max(values))
    if bounds is None and mark is not None and low - (high - low) <= mark.value <= high + (high - low):
        low, high = min(low, mark.value), max(high, mark.value)
    is_log = allow_log and low > 0 and high / low > LOG_RATIO
    if is_log:
        low, high = low / 1.15, high * 1.15
    elif bounds is None:
        margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        # A quantity without negative values gets no room below zero.
        low, high = (max(0.0, low - margin) if low >= 0 else low - margin), high + margin
    return _Axis(low, high, HEIGHT - BOTTOM, TOP, is_log)


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Return about `count` round numbers between two bounds."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _labels(ticks: Sequence[float], show: Show) -> list[str]:
    """Write ticks so that no two read the same: with more digits where the usual ones are too few."""
    labels = [show(tick) for tick in ticks]
    if len(set(labels)) == len(labels):
        return labels
    decimals = math.ceil(-math.log10(min(b - a for a, b in pairwise(ticks))) - 1e-9)
    return [f"{tick:.{max(0, decimals)}f}".replace("-", MINUS) for tick in ticks]


def _log_ticks(axis: _Axis) -> list[float]:
    powers = range(math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high)) + 1)
    fine = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    inside = [tick for tick in fine if axis.low <= tick <= axis.high]
    return inside if len(inside) <= 7 else [tick for tick in inside if f"{tick:.0e}".startswith("1")]


def _line(series: Series, across: _Axis, up: _Axis) -> Line:
    path, pen = [], "M"
    for step, value in series.points:
        if not math.isfinite(value):
            pen = "M"
            continue
        path.append(f"{pen}{across.place(step)} {up.place(value)}")
        pen = "L"
    dots = _finite(series.points) if series.is_sparse or len(series.points) == 1 else []
    placed = tuple((across.place(step), up.place(value)) for step, value in dots)
    return Line(series.label, series.look, "".join(path), placed)


def _summary(series: Series, show: Show) -> str:
    finite = _finite(series.points)
    return f"{series.label} from {show(finite[0][1])} to {show(finite[-1][1])}"


def _readings(drawn: Sequence[Series], across: _Axis, up: _Axis, show: Show) -> Iterable[Reading]:
    """Divide the figure into areas, each with the last values up to its step."""
    steps = sorted({step for one in drawn for step, _ in one.points})
    if len(steps) > MOST_STOPS:
        every = (len(steps) - 1) / (MOST_STOPS - 1)
        steps = sorted({steps[round(n * every)] for n in range(MOST_STOPS)})
    places = [across.place(step) for step in steps]
    for at, (step, x) in enumerate(zip(steps, places, strict=True)):
        left = (places[at - 1] + x) / 2 if at else float(LEFT)
        right = (x + places[at + 1]) / 2 if at + 1 < len(places) else float(WIDTH - RIGHT)
        values = []
        for one in drawn:
            before = [value for other, value in _finite(one.points) if other <= step]
            if before:
                values.append((one.label, one.look, up.place(before[-1]), show(before[-1])))
        yield Reading(int(step), x, round(left, 1), round(max(right - left, 0.5), 1), tuple(values))


def _figures(history: History, recipe: Mapping[str, Any]) -> Iterator[Figure | None]:
    is_dpo = recipe.get("method") == "dpo"
    caption = (
        "Mean over pairs; in training, over the pairs since the last point." if is_dpo else "Nats per trained token."
    )
    yield _plain(history, "loss", "Loss", caption, mark=LN2 if _starts_at_ln2(recipe) else None, allow_log=not is_dpo)
    yield _plain(
        history,
        "rewards/accuracies",
        "Reward accuracy",
        "Share of pairs whose chosen answer has the higher reward. Before training it is 0: ties count as wrong.",
        mark=Mark(0.5, "chance"),
        bounds=(0.0, 1.0),
        are_shares=True,
    )
    yield _plain(
        history, "rewards/margins", "Reward margin", "Reward of the chosen answer minus reward of the rejected one."
    )
    for title, (better, worse, meaning) in PAIRED.items():
        yield _paired(history, title, better, worse, meaning)
    yield _plain(history, "learning_rate", "Learning rate", "At each logged step.")
    yield _plain(history, "grad_norm", "Gradient norm", "Before clipping.", allow_log=True)
    yield _plain(history, "tokens_per_second", "Tokens per second", "Of training only; a shared prompt counts once.")
    known = {"loss", "rewards/accuracies", "rewards/margins", *STATE}
    known |= {metric for better, worse, _ in PAIRED.values() for metric in (better, worse)}
    own = [*history.train, *(metric for table in history.evals.values() for metric in table)]
    for metric in dict.fromkeys(own):
        if metric not in known and not metric.endswith(STANDARD_ERROR):
            yield _plain(history, metric, TITLES.get(metric, metric), "")


def _plain(history: History, metric: str, title: str, caption: str, **options: Any) -> Figure | None:
    """Draw one quantity: training as a pale line, every eval set on top."""
    look = "train" if history.evaluations(metric) else "train sole"
    series = [Series("train", look, history.train.get(metric, ()))]
    for index, (name, points) in enumerate(history.evaluations(metric)):
        series.append(Series(name, f"eval-{index % 4}", points, is_sparse=len(points) <= 60))
    return draw(title, caption, series, **options)


def _paired(history: History, title: str, better: str, worse: str, caption: str) -> Figure | None:
    """Draw a quantity of chosen and rejected answers: training as pale lines, the first eval set on top."""
    series = []
    for look, metric in (("chosen", better), ("rejected", worse)):
        series.append(Series(f"{look}, train", f"{look} thin", history.train.get(metric, ())))
    for look, metric in (("chosen", better), ("rejected", worse)):
        for name, points in history.evaluations(metric)[:1]:
            series.append(Series(f"{look}, {name}", look, points, is_sparse=len(points) <= 60))
    return draw(title, caption, series)


def _loss_observations(loss: Sequence[Point], errors: Mapping[float, float], *, starts_at_ln2: bool) -> Iterator[str]:
    """Describe the held-out loss; a change that chance explains is told as that, and gives no advice."""
    (start, first), (end, last) = loss[0], loss[-1]
    best_step, best = min(loss, key=lambda point: point[1])

    def error(one: float, other: float) -> float:
        """Half the 95 % interval of a change, as if both evaluations had rows of their own: at most too wide."""
        return Z95 * math.hypot(errors.get(one, math.inf), errors.get(other, math.inf))

    went = f"The loss on held-out rows went from {number(first)} to {number(last)}"
    spread, change = error(start, end), last - first
    if not math.isfinite(spread):
        yield f"{went}."
        return
    interval = f"95 % interval of the change {number(change - spread)} to {number(change + spread)}"
    if abs(change) <= spread:
        yield f"{went}; the {interval} contains no change: more held-out rows would tell more."
    else:
        yield f"{went}; {interval}."
    if best_step < end and last - best > max(RISEN * (first - best), error(best_step, end)):
        yield (
            f"It was lowest at step {best_step:,.0f} ({number(best)}) and has risen since: "
            "use fewer steps, or a lower learning rate."
        )
    if starts_at_ln2 and abs(last - LN2.value) + spread < STUCK:
        yield "It is still close to ln 2 = 0.693, the first loss of DPO: the policy has learned nothing yet."


def _pair_observations(table: Mapping[str, list[Point]]) -> Iterator[str]:
    moves = {}
    for side in ("chosen", "rejected"):
        points = table.get(f"logps/{side}", [])
        if len(points) > 1:
            moves[side] = points[-1][1] - points[0][1]
    if len(moves) < 2:
        return
    changes = [
        f"{side} answers {'more' if by >= 0 else 'less'} likely by {number(abs(by))} nats" for side, by in moves.items()
    ]
    yield f"Training made {', and '.join(changes)}, on average over held-out pairs."
    if moves["chosen"] < 0:
        yield "It is common that chosen answers become less likely too: only the gap is trained. Read the samples."


def _starts_at_ln2(recipe: Mapping[str, Any]) -> bool:
    """Whether the loss of equal policy and reference is ln 2."""
    plain = [term.get("type") == "sigmoid" and not term.get("sft_weight") for term in losses_of(recipe)]
    return recipe.get("method") == "dpo" and plain == [True]


def _value(value: Any) -> float | None:
    """Return a metric as a number; NaN and infinity are texts in the file."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None

"""Learning curves as geometry: series of numbers in, the coordinates and labels of a small figure out.

Nothing here knows HTML. All coordinates are in the units of the figure, which scales with the page.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 380, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 30, 24
MOST_POINTS = 240
MOST_STOPS = 48
# Beyond this ratio a falling loss is a vertical line and then a flat one; on a logarithmic scale it is a curve.
WIDE = 8.0
MINUS, HARD_SPACE = "\u2212", "\u00a0"
THOUSANDS = ((1e9, "B"), (1e6, "M"), (1e3, "k"))

Point = tuple[float, float]
Show = Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """A line.

    Attributes:
        label: what the legend calls it.
        look: the names of its styles, separated by blanks.
        points: (step, value), in the order of the steps; a value may be NaN.
        is_sparse: whether its points are few enough to be worth a dot each.
    """

    label: str
    look: str
    points: Sequence[Point]
    is_sparse: bool = False


@dataclass(frozen=True)
class Mark:
    """A known value to compare with: a horizontal line."""

    value: float
    label: str


@dataclass(frozen=True)
class Line:
    """A series as drawn: an SVG path, and dots."""

    label: str
    look: str
    path: str
    dots: tuple[Point, ...]


@dataclass(frozen=True)
class Reading:
    """What the lines say at one step.

    Attributes:
        step: which.
        x: where it is.
        left: where the stretch begins that belongs to it.
        width: of that stretch.
        values: label, style, height and text of each line's value.
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
        title: the quantity.
        caption: what it means.
        summary: the figure in words, for those who cannot see it.
        lines: the curves.
        rows: height and label of each horizontal grid line.
        columns: place and label of each tick of the steps.
        mark: height, label of the line of a known value.
        readings: values by step; the last one is the end of the run.
    """

    title: str
    caption: str
    summary: str
    lines: tuple[Line, ...]
    rows: tuple[tuple[float, str], ...]
    columns: tuple[tuple[float, str], ...]
    mark: tuple[float, str] | None = None
    readings: tuple[Reading, ...] = field(default=())


@dataclass(frozen=True)
class _Axis:
    """Values to coordinates."""

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
        title: the quantity.
        caption: what it means.
        series: the lines; those without a finite value are left out.
        mark: a known value, drawn where it is near the lines.
        bounds: of the values, where they are known.
        allow_log: take a logarithmic scale where the values span much of one.
        are_shares: write the values as percentages.

    Returns:
        The figure, or None where there is nothing to draw.
    """
    drawn = [one for one in map(_thin, series) if _finite(one.points)]
    if not drawn:
        return None
    steps = [step for one in drawn for step, _ in one.points]
    across = _Axis(min(0.0, min(steps)), max(1.0, max(steps)), LEFT, WIDTH - RIGHT)
    up = _upward([value for one in drawn for _, value in _finite(one.points)], mark, bounds, allow_log)
    ticks = _log_ticks(up) if up.is_log else _ticks(up.low, up.high, 6)
    show = percent if are_shares else number
    known = mark is not None and up.low <= mark.value <= up.high
    return Figure(
        title=title,
        caption=f"{caption} Logarithmic scale." if up.is_log else caption,
        summary=f"{title}: " + "; ".join(_summary(one, show) for one in drawn),
        lines=tuple(_line(one, across, up) for one in drawn),
        rows=tuple((up.place(tick), show(tick)) for tick in ticks),
        columns=tuple(
            (across.place(tick), number(tick)) for tick in _ticks(across.low, across.high, 5) if tick % 1 == 0
        ),
        mark=(up.place(mark.value), mark.label) if mark is not None and known else None,
        readings=tuple(_readings(drawn, across, up, show)),
    )


def number(value: float) -> str:
    """Write a number in three digits or so: `0.693`, `1.5e-6`, `12.3k`."""
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
    """Write a share as a percentage in three digits."""
    return f"{100 * share:.3g}{HARD_SPACE}%"


def _finite(points: Iterable[Point]) -> list[Point]:
    return [point for point in points if math.isfinite(point[1])]


def _thin(series: Series) -> Series:
    """Replace runs of neighbouring points by their mean, where there are more than can be seen."""
    points = series.points
    if len(points) <= MOST_POINTS:
        return series
    size = math.ceil(len(points) / MOST_POINTS)
    groups = [points[first : first + size] for first in range(0, len(points), size)]
    means = [(group[-1][0], math.fsum(value for _, value in group) / len(group)) for group in groups]
    return Series(series.label, series.look, means, series.is_sparse)


def _upward(values: Sequence[float], mark: Mark | None, bounds: tuple[float, float] | None, allow_log: bool) -> _Axis:
    low, high = bounds or (min(values), max(values))
    if bounds is None and mark is not None and low - (high - low) <= mark.value <= high + (high - low):
        low, high = min(low, mark.value), max(high, mark.value)
    is_log = allow_log and low > 0 and high / low > WIDE
    if is_log:
        low, high = low / 1.15, high * 1.15
    elif bounds is None:
        margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        # What never is negative does not look better below zero.
        low, high = (max(0.0, low - margin) if low >= 0 else low - margin), high + margin
    return _Axis(low, high, HEIGHT - BOTTOM, TOP, is_log)


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers between two bounds, about as many as asked for."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


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
    """Cut the figure into stretches, each with the values nearest before its step."""
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

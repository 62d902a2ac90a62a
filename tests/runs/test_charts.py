"""Curves as geometry: on the paper, in proportion, and honest about what is missing."""

import math
import re

import pytest

from dpoctl.runs.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    MOST_POINTS,
    MOST_STOPS,
    RIGHT,
    TOP,
    WIDTH,
    History,
    Mark,
    Series,
    draw,
    figures,
    number,
)


def line(*values: float, every: int = 10) -> Series:
    return Series("train", "train", [(every * n, value) for n, value in enumerate(values)])


def coordinates(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.-]+)", path)]


def test_a_curve_stays_on_the_paper_and_rises_upwards() -> None:
    figure = draw("Loss", "", [line(1.0, 3.0, 2.0)])
    assert figure is not None
    points = coordinates(figure.lines[0].path)
    assert [x for x, _ in points] == [LEFT, (LEFT + WIDTH - RIGHT) / 2, WIDTH - RIGHT]
    assert all(TOP <= y <= HEIGHT - BOTTOM for _, y in points)
    assert points[1][1] < points[2][1] < points[0][1]


def test_ticks_are_round_and_in_place() -> None:
    figure = draw("Loss", "", [line(0.0, 0.7, 1.0)])
    assert figure is not None
    assert [label for _, label in figure.rows] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    assert [label for _, label in figure.columns] == ["0", "5", "10", "15", "20"]


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ((0.6931, 0.6929, 0.6927), ["0.6927", "0.6928", "0.6929", "0.6930", "0.6931"]),
        ((-12.34561, -12.34568), ["\u221212.34568", "\u221212.34566", "\u221212.34564", "\u221212.34562"]),
    ],
)
def test_ticks_of_a_narrow_range_read_differently(values: tuple[float, ...], labels: list[str]) -> None:
    figure = draw("Loss", "", [line(*values)])
    assert figure is not None
    found = [label for _, label in figure.rows]
    assert len(set(found)) == len(found)
    assert set(labels) <= set(found)


def test_what_stays_the_same_is_not_drawn_unless_it_is_the_result() -> None:
    rows = [{"step": step, "loss": 0.5, "learning_rate": 1e-6, "mine": 2.0 + step % 2} for step in (1, 2, 3)]
    titles = [figure.title for figure in figures(History.of(rows, []), {"method": "sft"})]
    assert titles == ["Loss", "mine"]


def test_lengths_of_answers_share_a_chart() -> None:
    rows = [{"step": step, "lengths/chosen": 5.0 + step, "lengths/rejected": 9.0} for step in (1, 2)]
    (figure,) = figures(History.of(rows, []), {"method": "dpo"})
    assert (figure.title, [one.label for one in figure.lines]) == (
        "Answer lengths",
        ["chosen, train", "rejected, train"],
    )


def test_a_value_that_is_missing_leaves_a_gap() -> None:
    figure = draw("Loss", "", [line(1.0, 2.0, math.nan, 2.0, 1.0)])
    assert figure is not None
    assert figure.lines[0].path.count("M") == 2
    assert "nan" not in figure.lines[0].path


@pytest.mark.parametrize("values", [(), (math.nan,), (math.inf, math.nan)])
def test_nothing_finite_is_no_figure(values: tuple[float, ...]) -> None:
    assert draw("Loss", "", [line(*values)]) is None


@pytest.mark.parametrize("values", [(0.0,), (5.0, 5.0), (-2.0,), (1e-9, 1e-9), (1e30, 2e30)])
def test_a_flat_or_lonely_series_is_drawn_all_the_same(values: tuple[float, ...]) -> None:
    figure = draw("Loss", "", [line(*values)])
    assert figure is not None
    assert figure.rows
    assert all(math.isfinite(y) for _, y in coordinates(figure.lines[0].path))


def test_a_loss_that_falls_far_is_drawn_on_a_logarithmic_scale_and_says_so() -> None:
    figure = draw("Loss", "In nats.", [line(8.0, 1.0, 0.5)], allow_log=True)
    assert figure is not None
    assert figure.caption == "In nats. Logarithmic scale."
    assert [label for _, label in figure.rows] == ["0.5", "1", "2", "5"]
    plain = draw("Loss", "In nats.", [line(2.0, 1.0)], allow_log=True)
    assert plain is not None
    assert plain.caption == "In nats."


def test_a_known_value_is_drawn_where_it_is_near() -> None:
    near = draw("Loss", "", [line(0.7, 0.5)], mark=Mark(0.693, "ln 2"))
    far = draw("Loss", "", [line(100.0, 101.0)], mark=Mark(0.693, "ln 2"))
    assert near is not None
    assert far is not None
    assert near.mark is not None
    assert far.mark is None


def test_a_long_run_is_thinned_without_losing_its_end() -> None:
    figure = draw("Loss", "", [line(*[math.sin(n / 100) for n in range(5001)])])
    assert figure is not None
    assert len(coordinates(figure.lines[0].path)) <= MOST_POINTS
    assert len(figure.readings) <= MOST_STOPS
    assert figure.readings[-1].step == 50_000


def test_readings_cover_the_figure_and_hold_the_last_known_value_of_every_line() -> None:
    evals = Series("eval", "eval-0", [(0, 0.9), (20, 0.4)], is_sparse=True)
    figure = draw("Loss", "", [line(0.8, 0.6, 0.5), evals])
    assert figure is not None
    assert [[text for *_, text in reading.values] for reading in figure.readings] == [
        ["0.8", "0.9"],
        ["0.6", "0.9"],
        ["0.5", "0.4"],
    ]
    assert figure.readings[0].left == LEFT
    assert sum(reading.width for reading in figure.readings) == pytest.approx(WIDTH - RIGHT - LEFT, abs=0.5)
    assert len(figure.lines[1].dots) == 2


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (0.6931, "0.693"), (5e-6, "5e-6"), (1.25e-5, "1.25e-5"), (12.345, "12.35"), (1234.5, "1234"),
        (12345, "12.3k"), (2.5e9, "2.5B"), (-0.5, "\u22120.5"), (math.nan, "nan"),
    ],
)  # fmt: skip
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text

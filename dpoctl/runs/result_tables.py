"""The tables of a result of `dpoctl eval`, as the report shows them: numbers with their intervals."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from dpoctl.runs.charts import MINUS, number, percent
from dpoctl.runs.metrics import STANDARD_ERROR
from dpoctl.runs.results import PROVENANCE
from dpoctl.runs.text_metrics import DIFFERENCE, NUMBERS, SIDES

INTERVAL, METHOD = "_ci", "_ci_method"
COLUMNS = (*SIDES, DIFFERENCE)
SHARES = {
    *("share", "rewards/accuracies", "finished", "repetition", "refusals", "win_rate", "length_controlled_win_rate"),
    *("corrected_win_rate", "ties", "order_ties", "first_share"),
}
"""Numbers that are shares, and are written in percent; others may lie between 0 and 1 by chance."""
KL = ("kl", f"kl{INTERVAL}", f"kl{METHOD}", f"kl{STANDARD_ERROR}")
OWN_TABLES = {"samples", "benchmarks", *KL}


class Cell(NamedTuple):
    """A number with its confidence interval.

    Attributes:
        text: the number.
        interval: its 95 % interval in words; empty if there is none.
        bar: value, low and high of a share, drawn on a scale from 0 to 1; None for other numbers.
    """

    text: str
    interval: str = ""
    bar: tuple[float, float, float] | None = None


class TableRow(NamedTuple):
    """A quantity and its cells, one per column of the table."""

    name: str
    cells: tuple[Cell, ...]


class Table(NamedTuple):
    """Rows under a heading; a table with one column has no column names."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]


def tables(report: Mapping[str, Any]) -> list[Table]:
    """Return the tables of a result: each eval set, texts, benchmarks, then other comparisons with the reference."""
    report = {key: value for key, value in report.items() if key not in PROVENANCE}
    sets = report.pop("sets", None) or {}
    rest = {key: value for key, value in report.items() if key not in OWN_TABLES}
    found = [_plain("eval", rest), *(_plain(str(name), table) for name, table in sets.items())]
    found += [_texts(report), _benchmarks(report.get("benchmarks") or {}), *_comparisons(rest, ())]
    return [table for table in found if table.rows]


def _plain(title: str, values: Mapping[str, Any]) -> Table:
    rows = tuple(TableRow(name, (cell,)) for name, cell in _cells(values, ()))
    return Table(title, (), rows)


def _texts(report: Mapping[str, Any]) -> Table:
    """Return the numbers of the texts of both models, and how far the policy's are from the reference."""
    numbers = report.get("samples") or {}
    rows = []
    for name in NUMBERS:
        keys = [f"{name}_{side}" for side in COLUMNS]
        if any(key in numbers for key in keys):
            sides = (_cell(name, numbers.get(key), numbers.get(f"{key}{INTERVAL}")) for key in keys[:-1])
            difference = _difference(name, numbers.get(keys[-1]), numbers.get(f"{keys[-1]}{INTERVAL}"))
            rows.append(TableRow(name, (*sides, difference)))
    if "kl" in report:
        cells = (Cell(""), _cell("kl", report["kl"], report.get(f"kl{INTERVAL}")), Cell(""))
        rows.append(TableRow("kl per token, nats", cells))
    return Table(f"{numbers.get('num', 0):,} samples, lengths in words", COLUMNS, tuple(rows))


def _benchmarks(benchmarks: Mapping[str, Any]) -> Table:
    rows = []
    for task, metrics in benchmarks.items():
        for metric, one in metrics.items():
            sides = (_cell("value", one.get(side), None) for side in SIDES)
            delta = _difference("value", one.get("delta"), one.get(f"delta{INTERVAL}"))
            rows.append(TableRow(f"{task} {metric}", (*sides, delta)))
    return Table("benchmarks", COLUMNS, tuple(rows))


def _cells(values: Mapping[str, Any], above: tuple[str, ...]) -> Iterator[tuple[str, Cell]]:
    """Yield the numbers of nested tables by dotted names; comparisons have their own tables."""
    if _is_comparison(values):
        return
    for key, value in values.items():
        name = ".".join((*above, str(key)))
        if isinstance(value, Mapping) and value.keys() == {"share", "ci"}:
            yield name, _cell("share", value["share"], value["ci"])
        elif isinstance(value, Mapping):
            yield from _cells(value, (*above, str(key)))
        elif isinstance(value, int | float | str) and not str(key).endswith((INTERVAL, METHOD, STANDARD_ERROR)):
            yield name, _cell(str(key), value, values.get(f"{key}{INTERVAL}"))


def _comparisons(values: Mapping[str, Any], above: tuple[str, ...]) -> Iterator[Table]:
    if _is_comparison(values):
        sides = [dict(_cells(_as_table(values[side]), ())) for side in SIDES]
        names = dict.fromkeys(name for side in sides for name in side)
        rows = tuple(TableRow(name, tuple(side.get(name, Cell("")) for side in sides)) for name in names)
        yield Table(".".join(above) or "eval", SIDES, rows)
        return
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _comparisons(value, (*above, str(key)))


def _is_comparison(values: Mapping[str, Any]) -> bool:
    return all(side in values for side in SIDES)


def _as_table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {"share": value}


def _cell(key: str, value: float | str | None, interval: Any) -> Cell:
    if value is None:
        return Cell("")
    if isinstance(value, bool | str):
        return Cell(str(value))
    if not _is_interval(interval):
        return Cell(f"{value:,}" if isinstance(value, int) else number(value))
    low, high = (float(end) for end in interval)
    is_share = key in SHARES
    write = percent if is_share else number
    bar = (min(1.0, max(0.0, float(value))), low, high) if is_share else None
    return Cell(write(float(value)), f"{write(low)} to {write(high)}", bar)


def _difference(name: str, value: float | None, interval: Any) -> Cell:
    """Return a difference of policy minus reference; that of shares is in points."""
    if value is None:
        return Cell("")
    scale, unit = (100, " points") if name in SHARES else (1, "")
    spread = " to ".join(_signed(scale * float(end)) for end in interval) if _is_interval(interval) else ""
    return Cell(f"{_signed(scale * value)}{unit}", spread)


def _signed(value: float) -> str:
    written = number(value)
    return written if value == 0 or written.startswith(MINUS) else f"+{written}"


def _is_interval(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(end, int | float) and math.isfinite(end) for end in value)
    )

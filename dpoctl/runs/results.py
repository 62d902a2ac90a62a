"""`eval.json` and `data_report.json` as tables for people."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from dpoctl.runs.curves import number, percent

INTERVAL = "_ci"
SIDES = ("reference", "policy")


class Cell(NamedTuple):
    """A number, and how sure it is.

    Attributes:
        text: the number.
        interval: its 95 % interval in words; empty where there is none.
        bar: value, low and high of a share, to draw it from 0 to 1; None for what is no share.
    """

    text: str
    interval: str = ""
    bar: tuple[float, float, float] | None = None


class Row(NamedTuple):
    """A quantity and its cells, one a column of the table."""

    name: str
    cells: tuple[Cell, ...]


class Table(NamedTuple):
    """Rows under a heading; `columns` are empty where one column needs no name."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def tables(report: Mapping[str, Any]) -> list[Table]:
    """Lay out what `dpoctl eval` wrote: each eval set, then every comparison of the policy with its reference."""
    report = {key: value for key, value in report.items() if key != "run"}
    sets = report.pop("sets", None) or {}
    found = [_plain("eval", report), *(_plain(str(name), table) for name, table in sets.items())]
    found += _comparisons(report, ())
    return [table for table in found if table.rows]


def _plain(title: str, values: Mapping[str, Any]) -> Table:
    rows = tuple(Row(name, (cell,)) for name, cell in _cells(values, ()))
    return Table(title, (), rows)


def _cells(values: Mapping[str, Any], above: tuple[str, ...]) -> Iterator[tuple[str, Cell]]:
    """The numbers of nested tables by their dotted names; comparisons are left to their own tables."""
    if _is_comparison(values):
        return
    for key, value in values.items():
        name = ".".join((*above, str(key)))
        if isinstance(value, Mapping) and value.keys() == {"share", "ci"}:
            yield name, _cell(str(key), value["share"], value["ci"])
        elif isinstance(value, Mapping):
            yield from _cells(value, (*above, str(key)))
        elif isinstance(value, int | float | str) and not str(key).endswith(INTERVAL):
            yield name, _cell(str(key), value, values.get(f"{key}{INTERVAL}"))


def _comparisons(values: Mapping[str, Any], above: tuple[str, ...]) -> Iterator[Table]:
    if _is_comparison(values):
        sides = [dict(_cells(_as_table(values[side]), ())) for side in SIDES]
        names = dict.fromkeys(name for side in sides for name in side)
        rows = tuple(Row(name, tuple(side.get(name, Cell("")) for side in sides)) for name in names)
        yield Table(".".join(above) or "eval", SIDES, rows)
        return
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _comparisons(value, (*above, str(key)))


def _is_comparison(values: Mapping[str, Any]) -> bool:
    return all(side in values for side in SIDES)


def _as_table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {"share": value}


def _cell(key: str, value: float | str, interval: Any) -> Cell:
    if isinstance(value, bool | str):
        return Cell(str(value))
    if not _is_interval(interval):
        return Cell(f"{value:,}" if isinstance(value, int) else number(value))
    low, high = (float(end) for end in interval)
    is_share = 0 <= low <= high <= 1
    write = percent if is_share else number
    bar = (min(1.0, max(0.0, float(value))), low, high) if is_share else None
    return Cell(write(float(value)), f"{write(low)} to {write(high)}", bar)


def _is_interval(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(end, int | float) and math.isfinite(end) for end in value)
    )


class DataSet(NamedTuple):
    """What became of the rows of one set."""

    name: str
    rows: int
    used: int
    facts: tuple[tuple[str, str], ...]
    lengths: tuple[tuple[str, tuple[str, ...]], ...]
    sources: tuple[tuple[str, str], ...]
    first: tuple[str, ...]


LENGTHS = ("mean", "p5", "p50", "p95", "max")
FACTS = (
    *("held_out", "unsampled", "duplicates", "tied_pairs", "outvoted_pairs"),
    *("prompts_truncated", "answers_truncated", "eos_added"),
)


def data_sets(report: Mapping[str, Any]) -> list[DataSet]:
    """Lay out what became of every row."""
    sets = {"train": report.get("train"), **(report.get("evals") or {})}
    return [_data_set(name, account) for name, account in sets.items() if isinstance(account, Mapping)]


def _data_set(name: str, account: Mapping[str, Any]) -> DataSet:
    tokens = dict(account.get("tokens") or {})
    facts = [(key.replace("_", " "), account.get(key)) for key in FACTS]
    facts += [(f"rejected: {reason}", count) for reason, count in (account.get("rejected") or {}).items()]
    shown = [(key, f"{value:,}") for key, value in facts if isinstance(value, int) and value]
    shown += [(f"tokens, {key}", f"{tokens[key]:,}") for key in ("total", "scored") if isinstance(tokens.get(key), int)]
    first = account.get("first_rejected") or {}
    return DataSet(
        name=name,
        rows=int(account.get("rows") or 0),
        used=int(account.get("used") or 0),
        facts=tuple(shown),
        lengths=tuple(
            (side, tuple(f"{lengths.get(key, 0):,}" for key in LENGTHS))
            for side, lengths in tokens.items()
            if isinstance(lengths, Mapping)
        ),
        sources=tuple(
            (str(source.get("path")), f"{source.get('format')}, {source.get('rows', 0):,} rows")
            for source in account.get("sources") or []
        ),
        first=tuple(
            f"{reason}: {at.get('file')}:{at.get('line')} {at.get('detail') or ''}".rstrip()
            for reason, at in first.items()
        ),
    )

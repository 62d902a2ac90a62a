"""Exact means of metrics: sums and counts are added up over micro-batches and ranks, and divided once."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Total:
    """A sum and the number of items in it; tensors stay on their device, so nothing waits for it."""

    sum: Tensor | float
    count: Tensor | float


@dataclass(frozen=True, slots=True)
class ItemMetric:
    """A metric by item, so that it can be added up by data source.

    Attributes:
        sums: `[n]`, each item's contribution to the sum.
        counts: `[n]`, its contribution to the count: a weight, 0 for an item that is left out.
        records: `[n]`, the record that it belongs to.
    """

    sums: Tensor
    counts: Tensor
    records: Tensor

    @classmethod
    def of(cls, values: Tensor, records: Tensor, chosen: Tensor | None = None) -> "ItemMetric":
        """Count each value once, or only the chosen ones."""
        counts = torch.ones_like(values) if chosen is None else chosen.to(values.dtype)
        return cls(values * counts, counts, records)

    def total(self, chosen: Tensor | None = None) -> Total:
        """Add up all items, or only the chosen ones `[n]`."""
        weights = self.counts.new_ones(()) if chosen is None else chosen.to(self.counts.dtype)
        return Total((self.sums * weights).sum(), (self.counts * weights).sum())


def by_source(metrics: Mapping[str, ItemMetric], sources: Tensor, names: Mapping[int, str]) -> dict[str, Total]:
    """Add metrics up, over all records and over those of each named source.

    Args:
        metrics: the metrics by name.
        sources: `[G]`, the number of each record's source.
        names: the names of sources by number; several sources may share one.

    Returns:
        Totals by `metric` and `source/metric`. The names do not depend on the records.
    """
    totals = {name: metric.total() for name, metric in metrics.items()}
    for source in dict.fromkeys(names.values()):
        # Numbers reach a GPU as arguments of a kernel; a tensor of them would be a copy to wait for.
        chosen = torch.stack([sources == number for number, own in names.items() if own == source]).any(0)
        totals |= {f"{source}/{name}": metric.total(chosen[metric.records]) for name, metric in metrics.items()}
    return totals


_MOMENT = "loss_moments/"


def loss_moments(terms: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Total]:
    """Return what `standard_error` needs to know of some records: moments of the sums and counts of each term.

    Args:
        terms: for each term of the loss `[G]` sums, times its weight, and `[G]` counts of its items.
    """
    columns = [column.double() for term in terms for column in term]
    columns = [torch.ones_like(columns[0]), *columns]
    return {
        f"{_MOMENT}{i},{j}": Total((columns[i] * columns[j]).sum(), len(columns[0]))
        for j in range(1, len(columns))
        for i in range(j + 1)
    }


def standard_error(metrics: Mapping[str, float], records: int) -> dict[str, float]:
    """Return metrics with the standard error of the loss, `loss_se`, in place of its moments.

    Records are independent of each other; the pairs or tokens of one record are not. The loss is a sum of ratios of
    means over records, and the error is that of its linear approximation.

    Args:
        metrics: the means over all records.
        records: the number of records.
    """
    found = {name: value for name, value in metrics.items() if not name.startswith(_MOMENT)}
    moments = {
        tuple(map(int, name.removeprefix(_MOMENT).split(","))): value
        for name, value in metrics.items()
        if name.startswith(_MOMENT)
    }
    if records < 2 or not moments:
        return found
    weights = [0.0]
    for at in range(1, max(max(moments)), 2):
        total, count = moments[0, at], moments[0, at + 1]
        weights += [1 / count, -total / count**2] if count else [0.0, 0.0]
    variance = sum((1 if i == j else 2) * weights[i] * weights[j] * value for (i, j), value in moments.items() if i > 0)
    return found | {"loss_se": math.sqrt(max(0.0, variance) / (records - 1))}


class Meter:
    """Running totals by name, on the device; they are divided when the meter is read.

    Only reading waits for the device or for other ranks.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, Tensor | float] = {}

    def add(self, totals: Mapping[str, Total]) -> None:
        """Add the totals of a micro-batch."""
        for name, total in totals.items():
            term = total.sum.detach().double() if isinstance(total.sum, Tensor) else total.sum
            self._sums[name] = self._sums.get(name, 0.0) + term
            self._counts[name] = self._counts.get(name, 0) + total.count

    def take(self, other: "Meter") -> None:
        """Add the totals of another meter."""
        for name, total in other._sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + total
            self._counts[name] = self._counts.get(name, 0) + other._counts[name]

    def sum(self, name: str) -> Tensor | float:
        """Return this rank's sum so far, 0 for an unknown name."""
        return self._sums.get(name, 0.0)

    def read(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the means over all ranks, and reset the meter.

        Args:
            reduce: adds a tensor up over ranks. Every rank must have added the same names.
        """
        if not self._sums:
            return {}
        names = list(self._sums)
        options: dict[str, Any] = {"dtype": torch.float64, "device": self._device}
        sums = torch.stack([torch.as_tensor(self._sums[name], **options) for name in names])
        counts = torch.stack([torch.as_tensor(self._counts[name], **options) for name in names])
        totals = reduce(torch.stack([sums, counts])).tolist()
        self._sums, self._counts = {}, {}
        return {name: total / count for name, total, count in zip(names, *totals, strict=True) if count}

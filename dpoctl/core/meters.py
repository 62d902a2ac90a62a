"""Exact means: sums and counts are added up everywhere, and divided once."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Total:
    """A sum and the number of items in it; as tensors they need not be waited for."""

    sum: Tensor | float
    count: Tensor | int


@dataclass(frozen=True, slots=True)
class Tally:
    """A metric item by item, so that it can be added up by data source.

    Attributes:
        sums: `[n]`, what each item adds to the sum.
        counts: `[n]`, what it adds to the count: a weight, 0 for an item that is left out.
        records: `[n]`, the record that it belongs to.
    """

    sums: Tensor
    counts: Tensor
    records: Tensor

    @classmethod
    def of(cls, values: Tensor, records: Tensor, chosen: Tensor | None = None) -> "Tally":
        """Count each value once, or those alone that are chosen."""
        counts = torch.ones_like(values) if chosen is None else chosen.to(values.dtype)
        return cls(values * counts, counts, records)

    def total(self, chosen: Tensor | None = None) -> Total:
        """Add up everything, or the items `[n]` that are chosen."""
        weights = self.counts.new_ones(()) if chosen is None else chosen.to(self.counts.dtype)
        return Total((self.sums * weights).sum(), (self.counts * weights).sum())


def by_source(tallies: Mapping[str, Tally], sources: Tensor, names: Mapping[int, str]) -> dict[str, Total]:
    """Add metrics up, over all records and over those of each named source.

    Args:
        tallies: the metrics by name.
        sources: `[G]`, the number of each record's source.
        names: of sources by number, several of which may share one.

    Returns:
        Totals by `metric` and `source/metric`. The names do not depend on the records.
    """
    totals = {metric: tally.total() for metric, tally in tallies.items()}
    for name in dict.fromkeys(names.values()):
        numbers = torch.tensor([number for number, own in names.items() if own == name], device=sources.device)
        chosen = torch.isin(sources, numbers)
        totals |= {f"{name}/{metric}": tally.total(chosen[tally.records]) for metric, tally in tallies.items()}
    return totals


class Meter:
    """Adds totals up by name, on the device, and divides when it is read.

    Reading is the only moment that waits for the device or for other ranks.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, Tensor | int] = {}

    def add(self, totals: Mapping[str, Total]) -> None:
        """Add the totals of a micro-batch."""
        for name, total in totals.items():
            term = total.sum.detach().double() if isinstance(total.sum, Tensor) else total.sum
            self._sums[name] = self._sums.get(name, 0.0) + term
            self._counts[name] = self._counts.get(name, 0) + total.count

    def take(self, other: "Meter") -> None:
        """Add what another meter holds."""
        for name, total in other._sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + total
            self._counts[name] = self._counts.get(name, 0) + other._counts[name]

    def sum(self, name: str) -> Tensor | float:
        """Return this rank's sum so far; 0 of what was never added."""
        return self._sums.get(name, 0.0)

    def read(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the means over all ranks and start anew.

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

"""Exact means: sums and counts are added up everywhere, and divided once."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Total:
    """A sum and the number of items in it."""

    sum: Tensor | float
    count: int


class Meter:
    """Adds totals up by name, on the device, and divides when it is read.

    Reading is the only moment that waits for the device or for other ranks.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, int] = {}

    def add(self, totals: Mapping[str, Total]) -> None:
        """Add the totals of a micro-batch."""
        for name, total in totals.items():
            term = total.sum.detach().double() if isinstance(total.sum, Tensor) else total.sum
            self._sums[name] = self._sums.get(name, 0.0) + term
            self._counts[name] = self._counts.get(name, 0) + total.count

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
        counts = torch.tensor([self._counts[name] for name in names], **options)
        totals = reduce(torch.stack([sums, counts])).tolist()
        self._sums, self._counts = {}, {}
        return {name: total / count for name, total, count in zip(names, *totals, strict=True) if count}

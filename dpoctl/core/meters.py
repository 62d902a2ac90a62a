"""Exact means: sums and counts are added up everywhere, and divided once."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Total:
    """A sum and the number of items in it."""

    sum: Tensor | float
    count: Tensor | int


class Meter:
    """Adds totals up by name, on the device, and divides when it is read.

    Reading is the only moment that waits for the device or for other ranks.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._totals: dict[str, Tensor] = {}

    def add(self, totals: Mapping[str, Total]) -> None:
        """Add the totals of a micro-batch."""
        for name, total in totals.items():
            pair = torch.stack([self._number(total.sum), self._number(total.count)])
            self._totals[name] = self._totals[name] + pair if name in self._totals else pair

    def read(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the means over all ranks and start anew.

        Args:
            reduce: adds a tensor up over ranks. Every rank must have added the same names.
        """
        if not self._totals:
            return {}
        names = list(self._totals)
        sums, counts = reduce(torch.stack([self._totals[name] for name in names])).T.tolist()
        self._totals = {}
        return {name: sums[i] / counts[i] for i, name in enumerate(names) if counts[i]}

    def _number(self, value: Tensor | float) -> Tensor:
        return torch.as_tensor(value, device=self._device).detach().to(torch.float64)

"""Whether a step may reach the weights: its numbers are finite, and every rank is at the same step with the same model.

All ranks decide together, in one exchange before the update, which also carries a request to stop.
"""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor

from dpoctl import console
from dpoctl.core.planner import Step
from dpoctl.errors import RunError

MOST_IN_A_ROW = 5
"""Rejected steps after which skipping does not help any more."""
TOLERANCE = 1e-3
"""Relative difference of gradient norms between ranks that hold the same gradient."""


@dataclass
class Guard:
    """Judges steps, and counts those that were rejected.

    Attributes:
        accelerator: knows the ranks.
        on_nonfinite: what becomes of a step whose numbers are not finite.
        skipped: steps rejected so far in this run; a checkpoint remembers it.
    """

    accelerator: Accelerator
    on_nonfinite: Literal["stop", "skip"] = "stop"
    skipped: int = 0
    _in_a_row: int = field(default=0, init=False)

    def admit(self, step: Step, loss: Tensor | float, norm: Tensor, signum: int) -> tuple[bool, int]:
        """Judge a step, the same on all ranks.

        Args:
            step: that was computed.
            loss: this rank's share of it.
            norm: of the gradient, over all ranks.
            signum: the signal that this rank has seen; 0 for none.

        Returns:
            Whether the update may happen, and the signal that any rank has seen.

        Raises:
            RunError: the numbers are not finite and the recipe says stop, or too many such steps came in a row; or the
                ranks are not at the same step.
        """
        seen = self._exchange(step, float(loss), float(norm), signum)
        signum = int(max(row[0] for row in seen))
        odd = next((rank for rank, row in enumerate(seen) if row[1:3] != seen[0][1:3]), None)
        if odd is not None:
            raise RunError(
                f"step {step.number + 1}: rank {odd} is not at the same step as rank 0, or its plan is another",
                hint="give every rank the same recipe, data and version; then go on with --resume",
            )
        bad = self._nonfinite(seen)
        if bad is None:
            self._refuse_parted(step, [row[4] for row in seen])
            self._in_a_row = 0
            return True, signum
        self._reject(step, bad)
        return False, signum

    def _exchange(self, step: Step, loss: float, norm: float, signum: int) -> list[list[float]]:
        """A row of every rank: signal, step number, checksum of the plan, loss, norm."""
        own = [float(signum), float(step.number), float(zlib.crc32(repr(step).encode())), loss, norm]
        if self.accelerator.num_processes == 1:
            return [own]
        rows: Tensor = self.accelerator.gather(torch.tensor([own], dtype=torch.float64, device=self.accelerator.device))
        return [list(row) for row in rows.tolist()]

    def _nonfinite(self, seen: list[list[float]]) -> str | None:
        """What is not finite, in words; None where all is well."""
        for rank, (*_, loss, norm) in enumerate(seen):
            where = f" of rank {rank}" if len(seen) > 1 else ""
            if not _finite(loss):
                return f"the loss{where} is not finite ({loss})"
            # With a loss scale (fp16) an overflow is expected now and then: the scaler skips that update itself.
            if not _finite(norm) and self.accelerator.scaler is None:
                return f"the gradient{where} is not finite ({norm})"
        return None

    def _reject(self, step: Step, bad: str) -> None:
        self.skipped += 1
        self._in_a_row += 1
        rows = ", ".join(map(str, step.records[:8])) + (", ..." if len(step.records) > 8 else "")
        if self.on_nonfinite == "stop" or self._in_a_row > MOST_IN_A_ROW:
            times = f" for the {self._in_a_row}th time in a row" if self._in_a_row > MOST_IN_A_ROW else ""
            raise RunError(
                f"step {step.number + 1}: {bad}{times}; its records are {rows}",
                hint="the weights were not updated; lower training.learning_rate, look at these records, "
                "or set training.on_nonfinite: skip",
            )
        console.warn(f"step {step.number + 1}: {bad}; it is skipped ({self.skipped} so far); its records are {rows}")

    def _refuse_parted(self, step: Step, norms: list[float]) -> None:
        for rank, norm in enumerate(norms):
            if abs(norm - norms[0]) <= TOLERANCE * abs(norms[0]):
                continue
            raise RunError(
                f"step {step.number + 1}: rank {rank} has another gradient than rank 0 (norm {norm} for {norms[0]})",
                hint="the ranks have parted; go on from the last checkpoint with --resume",
            )


def refuse_different(accelerator: Accelerator, what: str, value: int) -> None:
    """See that every rank has the same of something.

    Args:
        accelerator: knows the ranks.
        what: in a user's words.
        value: a checksum of it, below 2**63.

    Raises:
        RunError: a rank has another; on all ranks.
    """
    if accelerator.num_processes == 1:
        return
    values: list[int] = accelerator.gather(torch.tensor([value], device=accelerator.device)).tolist()
    odd = [rank for rank, other in enumerate(values) if other != values[0]]
    if odd:
        raise RunError(
            f"rank {odd[0]} has other {what} than rank 0",
            hint="give every rank the same recipe, data and version; then go on with --resume",
        )


def checksum(tensors: Iterable[Tensor]) -> int:
    """Return a number that changes with any bit of the tensors, cheaply on any device."""
    total = 0
    for tensor in tensors:
        plain = tensor.detach().contiguous().flatten()
        if plain.element_size() > 1:
            plain = plain.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[plain.element_size()])
        # An odd factor for each tensor: two that swap their values are told apart.
        total = (total * 31 + int(plain.sum(dtype=torch.int64))) % (1 << 62)
    return total


def _finite(number: float) -> bool:
    return abs(number) < float("inf")

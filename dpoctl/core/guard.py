"""The check before an update: the numbers are finite, and every rank is at the same step with the same gradient.

All ranks decide together, in one exchange that also carries a request to stop.
"""

import platform
import time
import zlib
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from dpoctl import console
from dpoctl.core.planner import Step
from dpoctl.errors import RunError, SetupError
from dpoctl.files import temporary_file

MAX_SKIPS_IN_A_ROW = 5
"""The run stops at the next step that must be skipped, as skipping evidently does not help."""
TOLERANCE = 1e-3
"""Relative difference of gradient norms that is allowed between ranks that hold the same gradient."""
SHARED_SECONDS = 30.0
"""A rank looks for a file of another machine so long: network file systems show it late."""

SAME_START = "start every rank with the same recipe, data and version of dpoctl, then continue with --resume"


@dataclass
class Guard:
    """Checks steps before their update, and counts those that were skipped.

    Attributes:
        accelerator: knows the ranks.
        on_nonfinite: stop the run at a step whose numbers are not finite, or skip its update.
        skipped: steps skipped so far in this run; checkpoints keep it.
    """

    accelerator: Accelerator
    on_nonfinite: Literal["stop", "skip"] = "stop"
    skipped: int = 0
    _in_a_row: int = field(default=0, init=False)

    def check(self, step: Step, loss: Tensor | float, norm: Tensor, signum: int) -> tuple[bool, int]:
        """Check a computed step; the result is the same on all ranks.

        Args:
            step: the step.
            loss: this rank's share of its loss.
            norm: the norm of its gradient over all ranks.
            signum: the signal that this rank has received; 0 for none.

        Returns:
            True if the update may happen, and the signal that any rank has received.

        Raises:
            RunError: the numbers are not finite and the recipe says stop, or too many such steps came in a row; or the
                ranks are at different steps or have different gradients.
        """
        seen = self._exchange(step, float(loss), float(norm), signum)
        signum = int(max(row[0] for row in seen))
        odd = next((rank for rank, row in enumerate(seen) if row[1:3] != seen[0][1:3]), None)
        if odd is not None:
            raise RunError(
                f"step {step.number + 1}: rank {odd} is not at the same step as rank 0, or has a different plan",
                hint=SAME_START,
            )
        problem = self._nonfinite(seen)
        if problem is None:
            _check_same_gradient(step, [row[4] for row in seen])
            self._in_a_row = 0
            return True, signum
        self._skip(step, problem)
        return False, signum

    def _exchange(self, step: Step, loss: float, norm: float, signum: int) -> list[list[float]]:
        """Return a row from every rank: signal, step number, checksum of the step, loss, norm."""
        own = [float(signum), float(step.number), float(zlib.crc32(repr(step).encode())), loss, norm]
        if self.accelerator.num_processes == 1:
            return [own]
        rows: Tensor = self.accelerator.gather(torch.tensor([own], dtype=torch.float64, device=self.accelerator.device))
        return [list(row) for row in rows.tolist()]

    def _nonfinite(self, seen: list[list[float]]) -> str | None:
        """Describe the first number that is not finite; None if all are."""
        for rank, (*_, loss, norm) in enumerate(seen):
            where = f" of rank {rank}" if len(seen) > 1 else ""
            if not _finite(loss):
                return f"the loss{where} is not finite ({loss})"
            # With a loss scale (fp16) an overflow is expected now and then: the scaler itself skips that update.
            if not _finite(norm) and self.accelerator.scaler is None:
                return f"the gradient{where} is not finite ({norm})"
        return None

    def _skip(self, step: Step, problem: str) -> None:
        """Count a step that is not applied, or stop the run."""
        self.skipped += 1
        self._in_a_row += 1
        records = ", ".join(map(str, step.records[:8])) + (", ..." if len(step.records) > 8 else "")
        too_many = self._in_a_row > MAX_SKIPS_IN_A_ROW
        if self.on_nonfinite == "stop" or too_many:
            times = f" for the {self._in_a_row}th time in a row" if too_many else ""
            raise RunError(
                f"step {step.number + 1}: {problem}{times}, in records {records}",
                hint="the weights were not updated; lower training.learning_rate, look at these records, "
                "or set training.on_nonfinite: skip",
            )
        console.warn(f"step {step.number + 1}: {problem}, in records {records}; step skipped ({self.skipped} so far)")


def _check_same_gradient(step: Step, norms: list[float]) -> None:
    for rank, norm in enumerate(norms):
        if abs(norm - norms[0]) > TOLERANCE * abs(norms[0]):
            raise RunError(
                f"step {step.number + 1}: rank {rank} has different gradients than rank 0 "
                f"(norm {norm} instead of {norms[0]})",
                hint="continue from the last checkpoint with --resume",
            )


def require_same(accelerator: Accelerator, what: str, value: int) -> None:
    """Check that something is the same on every rank.

    Args:
        accelerator: knows the ranks.
        what: its name in the error message.
        value: a checksum of it, below 2**63.

    Raises:
        RunError: a rank has another value; on all ranks.
    """
    if accelerator.num_processes == 1:
        return
    values: list[int] = accelerator.gather(torch.tensor([value], device=accelerator.device)).tolist()
    odd = [rank for rank, other in enumerate(values) if other != values[0]]
    if odd:
        raise RunError(f"rank {odd[0]} differs from rank 0 in its {what}", hint=SAME_START)


def require_shared(accelerator: Accelerator, folder: Path) -> None:
    """Check that every rank can read what the first rank writes to a folder, and write to it: each writes checkpoints.

    Args:
        accelerator: knows the ranks.
        folder: the first rank makes it if it does not exist, and removes it again if a rank cannot read it.

    Raises:
        SetupError: a rank cannot; on all ranks.
    """
    if accelerator.num_processes == 1:
        return
    made = [place for place in (folder, *folder.parents) if not place.exists()] if accelerator.is_main_process else []
    with ExitStack() as stack:
        name = ""
        # Whoever opens the folder says what is wrong with it.
        with suppress(OSError):
            if accelerator.is_main_process:
                folder.mkdir(parents=True, exist_ok=True)
                path, file = stack.enter_context(temporary_file(folder / "shared"))
                file.write(path.name.encode())
                file.flush()
                name = path.name
        # The others learn the name when the file is there: a network file system remembers for long what it missed.
        (name,) = broadcast_object_list([name])
        rank = accelerator.process_index
        problem = _access_problem(folder / name, rank) if name else ""
        seen = gather_object([(problem, rank, platform.node(), str(folder.absolute()))])
        blind = [place for place in seen if place[0]]
    if blind:
        for place in made:
            with suppress(OSError):
                place.rmdir()
        problem, rank, host, path = blind[0]
        raise SetupError(
            f"rank {rank} on {host} cannot {problem} the run directory {path}",
            hint="training.output_dir must be a folder that all machines share",
        )


def _access_problem(file: Path, rank: int) -> str:
    """Say what a rank cannot do beside a file of the first rank; empty if it can do all that it must."""
    if not _appears(file):
        return "read what rank 0 wrote to"
    own = file.with_name(f"{file.name}.{rank}.tmp")
    try:
        own.touch()
        own.unlink()
    except OSError:
        return "write to"
    return ""


def _appears(file: Path) -> bool:
    """Whether a file that holds its own name can be read, now or soon."""
    deadline = time.monotonic() + SHARED_SECONDS
    while time.monotonic() < deadline:
        with suppress(OSError):
            if file.read_text() == file.name:
                return True
        time.sleep(0.1)
    return False


def tensor_checksum(tensors: Iterable[Tensor]) -> int:
    """Return a checksum of the tensors' bits, computed where they are."""
    total = 0
    for tensor in tensors:
        plain = tensor.detach().contiguous().flatten()
        if plain.element_size() > 1:
            plain = plain.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[plain.element_size()])
        # The factor makes the order count, so that two tensors which swap their values are noticed.
        total = (total * 31 + int(plain.sum(dtype=torch.int64))) % (1 << 62)
    return total


def _finite(number: float) -> bool:
    return abs(number) < float("inf")

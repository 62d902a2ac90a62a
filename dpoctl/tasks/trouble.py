"""What the machine does to a run that no recipe can foresee: memory that runs out, ranks that fall silent."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist
from accelerate import Accelerator

from dpoctl import console
from dpoctl.core.planner import Plan
from dpoctl.errors import LostRanksError, RunError

NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
NO_ANSWER = ("Timed out", "timed out", "Timeout", "onnection closed by peer", "onnection reset by peer", "Broken pipe")
REMEDY = (
    "lower training.max_tokens_per_device, set training.gradient_checkpointing: true, or lower data.max_length; "
    "then go on with --resume"
)


class Relief:
    """Halves the token budget once, where the recipe leaves it to us and there is one process.

    Args:
        automatic: Whether the budget is `auto`.
        accelerator: Several processes cannot be led back to one point once one of them has failed.
        max_tokens: The budget that the run begins or goes on with.
        used: Whether an earlier part of this run has done so already.
    """

    def __init__(self, automatic: bool, accelerator: Accelerator, max_tokens: int, *, used: bool = False) -> None:
        self._automatic = automatic and accelerator.num_processes == 1
        self._device = accelerator.device
        self.max_tokens, self.used = max_tokens, used

    def __call__(self, error: Exception, plan: Plan, step: int) -> Plan:
        """Return a plan that needs less memory.

        Raises:
            RunError: Memory ran out, and no smaller plan may be tried.
            Exception: The error, where it is about something else.
        """
        if not is_out_of_memory(error):
            raise error
        message = f"step {step + 1}: out of memory with at most {plan.max_tokens:,} tokens in a micro-batch"
        if self.used or not self._automatic or plan.max_tokens < 2:
            raise RunError(message, hint=REMEDY) from error
        self.used, self.max_tokens = True, self._half(plan, step)
        smaller = replace(plan, max_tokens=self.max_tokens)
        console.warn(f"{message}; going on with {smaller.max_tokens:,}, once")
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return smaller

    def _half(self, plan: Plan, step: int) -> int:
        """Half of what the largest micro-batch of the step took, for a budget that was not filled takes no more."""
        largest = max(plan.tokens_of(records) for batches in plan.step(step).schedule for records in batches if records)
        return max(1, min(plan.max_tokens, largest) // 2)


@contextmanager
def named(accelerator: Accelerator) -> Iterator[None]:
    """Say in one line that memory ran out, or that the other ranks do not answer.

    Raises:
        RunError: Memory ran out.
        LostRanksError: The other ranks do not answer.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise RunError("out of memory", hint=REMEDY) from error
        if accelerator.num_processes > 1 and _is_silence(error):
            raise LostRanksError(
                f"rank {accelerator.process_index} got no answer from the other ranks: {_first_line(error)}",
                hint="look for what they said; then go on with --resume",
            ) from error
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whatever device."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or (isinstance(error, RuntimeError) and any(word in str(error) for word in NO_MEMORY))


def _is_silence(error: BaseException) -> bool:
    return isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError) or any(
        word in str(error) for word in NO_ANSWER
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300].rstrip(".") if lines else type(error).__name__

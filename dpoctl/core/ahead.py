"""The next step is planned, its tokens gathered and its batches built while the present one is computed."""

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from dpoctl.core.batch import Batch
from dpoctl.core.planner import Plan, Step
from dpoctl.core.reader import Reader

Prepared = tuple[Step, list[Batch]]


class Ahead:
    """Gives the steps of a plan, each with the micro-batches of a rank, from a thread that is one step ahead."""

    def __init__(self, reader: Reader, rank: int) -> None:
        """Begin with nothing prepared.

        Args:
            reader: builds the batches.
            rank: whose they are.
        """
        self._reader, self._rank = reader, rank
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._waiting: tuple[Plan, int, Future[Prepared]] | None = None

    def __enter__(self) -> "Ahead":
        """Start."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the thread."""
        self._worker.shutdown(cancel_futures=True)

    def take(self, plan: Plan, number: int) -> Prepared:
        """Return a step of a plan with its batches, and begin with the step after it.

        What was prepared of another plan is thrown away.
        """
        waiting, self._waiting = self._waiting, None
        if waiting is not None and waiting[0] is plan and waiting[1] == number:
            ready = waiting[2].result()
        else:
            ready = self._prepare(plan, number)
        if number + 1 < plan.num_steps:
            self._waiting = plan, number + 1, self._worker.submit(self._prepare, plan, number + 1)
        return ready

    def _prepare(self, plan: Plan, number: int) -> Prepared:
        step = plan.step(number)
        return step, self._reader.batches(step.schedule[self._rank])

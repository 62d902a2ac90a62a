"""The next step is planned, its tokens gathered and its batches built while the present one is computed."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from dpoctl.core.batch import Batch
from dpoctl.core.planner import Plan, Step
from dpoctl.core.reader import Reader

Prepared = tuple[Step, list[Batch]]


@contextmanager
def prepared(plan: Plan, reader: Reader, rank: int, start: int) -> Iterator[Iterator[Prepared]]:
    """Give the steps of a plan, each with the micro-batches of a rank, from a thread that is one step ahead.

    Args:
        plan: of the run.
        reader: builds the batches.
        rank: whose they are.
        start: number of the first step.
    """

    def prepare(number: int) -> Prepared:
        step = plan.step(number)
        return step, reader.batches(step.schedule[rank])

    def steps() -> Iterator[Prepared]:
        ahead = worker.submit(prepare, start) if start < plan.num_steps else None
        for number in range(start, plan.num_steps):
            assert ahead is not None
            ready = ahead.result()
            if number + 1 < plan.num_steps:
                ahead = worker.submit(prepare, number + 1)
            yield ready

    worker = ThreadPoolExecutor(1, thread_name_prefix="batches")
    try:
        yield steps()
    finally:
        worker.shutdown(cancel_futures=True)

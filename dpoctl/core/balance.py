"""Longest first, each into the bin with the least so far: the classic schedule, many items at a time."""

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def fill_bins(cost: NDArray[np.float32], count: int) -> tuple[Ints, Ints]:
    """Return the items, the largest cost first, and the bin of each by the rule above; of equal bins the first.

    While bins are within one item of each other, the next items go into the lightest bins one after another. That holds
    up to the first bin that is no longer lighter than one that was just filled; until there all are placed at once.

    Args:
        cost: `[n]`, above zero.
        count: of bins.
    """
    order = _descending(cost)
    descending, load = cost[order].astype(np.float64), np.zeros(count)
    chosen = np.empty(len(cost), dtype=np.int64)
    done = 0
    while done < len(cost):
        lightest = np.argsort(load, kind="stable")[: len(cost) - done]
        filled = load[lightest] + descending[done : done + len(lightest)]
        late = load[lightest[1:]] >= np.minimum.accumulate(filled[:-1])
        taken = int(late.argmax()) + 1 if late.any() else len(lightest)
        load[lightest[:taken]] = filled[:taken]
        chosen[done : done + taken] = lightest[:taken]
        done += taken
    return order, chosen


def _descending(cost: NDArray[np.float32]) -> Ints:
    """The order of costs above zero, equal ones as they come."""
    # The bits of such numbers count like the numbers. With their places below them no two are alike, so that the
    # fastest sort, which is not stable, gives the order of a stable one on every machine.
    bits = np.asarray(cost, dtype=np.float32).view(np.uint32)
    keys = np.sort(((~bits).astype(np.uint64) << np.uint64(32)) | np.arange(len(cost), dtype=np.uint64))
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)

"""Longest first, each into the bin with the least so far: the classic schedule, many items at a time."""

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def fill_bins(cost: NDArray[np.floating], count: int) -> Ints:
    """Return the bin of each item, by the rule above; of equal bins the first.

    While bins are within one item of each other, the next items go into the lightest bins one after another. That holds
    up to the first bin that is no longer lighter than one that was just filled; until there all are placed at once.

    Args:
        cost: `[n]`, above zero.
        count: of bins.
    """
    order = np.argsort(-cost, kind="stable")
    descending, load = cost[order].astype(np.float64), np.zeros(count)
    chosen = np.empty(len(cost), dtype=np.int64)
    done = 0
    while done < len(cost):
        lightest = np.argsort(load, kind="stable")[: len(cost) - done]
        filled = load[lightest] + descending[done : done + len(lightest)]
        late = load[lightest[1:]] >= np.minimum.accumulate(filled[:-1])
        taken = int(late.argmax()) + 1 if late.any() else len(lightest)
        load[lightest[:taken]] = filled[:taken]
        chosen[order[done : done + taken]] = lightest[:taken]
        done += taken
    return chosen

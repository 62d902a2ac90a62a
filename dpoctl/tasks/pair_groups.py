"""The accuracy of implicit rewards by source, and by each column of the rows' `meta`."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpoctl.data.store import TokenStore
from dpoctl.runs.record_values import RecordValues
from dpoctl.runs.statistics import Estimate, ratio, share, summary

MOST_VALUES = 50
"""A column with more values than this is no grouping: it is a number, a name or an id."""
ACCURACY, MARGIN = "rewards/accuracies", "rewards/margins"


def accuracy_by_group(values: RecordValues, store: TokenStore, sources: Sequence[str]) -> dict[str, Any]:
    """Return accuracy and mean margin by source and by each column of `meta` with a few values.

    Args:
        values: of the first records of the store.
        store: the records.
        sources: the paths of the sources, by number.

    Returns:
        By column, then by value; nothing for a column with one value, or if the loss compares no pairs.
    """
    if ACCURACY not in values.names:
        return {}
    columns: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for record in range(len(values.prompts)):
        facts: dict[str, Any] = {f"meta.{name}": value for name, value in store.texts(record).meta.items()}
        facts["source"] = sources[store.source[record]] if len(sources) > 1 else None
        for name, value in facts.items():
            if isinstance(value, str | bool | int) and len(columns[name]) <= MOST_VALUES:
                columns[name][str(value)].append(record)
    return {
        name: {value: _describe(values, np.array(group)) for value, group in sorted(groups.items())}
        for name, groups in sorted(columns.items())
        if 1 < len(groups) <= MOST_VALUES
    }


def _describe(values: RecordValues, records: NDArray[np.int64]) -> dict[str, Any]:
    prompts = values.prompts[records].tolist()

    def estimate(name: str, how: Any) -> Estimate:
        at = values.names.index(name)
        found: Estimate = how(values.sums[at][records], values.counts[at][records], prompts)
        return found

    accuracy = estimate(ACCURACY, lambda sums, counts, keys: share(sums, keys, counts))
    num = int(values.counts[values.names.index(ACCURACY)][records].sum())
    return {**summary({ACCURACY: accuracy, MARGIN: estimate(MARGIN, ratio)}), "num_pairs": num}

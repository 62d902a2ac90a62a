"""The accuracy of implicit rewards with its interval: of all records, by source, and by each column of `meta`."""

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
ALL = slice(None)


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


def accuracy_of(values: RecordValues, records: NDArray[np.int64] | slice = ALL) -> Estimate:
    """Estimate the accuracy of some records; pairs of the same prompt are no independent evidence."""
    at = values.names.index(ACCURACY)
    return share(values.sums[at][records], values.prompts[records].tolist(), values.counts[at][records])


def _describe(values: RecordValues, records: NDArray[np.int64]) -> dict[str, Any]:
    at = values.names.index(MARGIN)
    margin = ratio(values.sums[at][records], values.counts[at][records], values.prompts[records].tolist())
    num = int(values.counts[values.names.index(ACCURACY)][records].sum())
    return {**summary({ACCURACY: accuracy_of(values, records), MARGIN: margin}), "num_pairs": num}

"""The metrics of every record of an evaluation set, by which two evaluations are compared record by record."""

from collections.abc import Sequence

import numpy as np
import torch
from accelerate.utils import gather_object

from dpoctl.data.store import TokenStore
from dpoctl.losses import Scores
from dpoctl.runs.record_values import RecordValues
from dpoctl.tasks.task import Task, record_metrics


class RecordWatch:
    """Collects the metrics of records while a set is evaluated, on every rank.

    Args:
        task: of the recipe.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self._names: list[str] = []
        self._found: list[tuple[list[int], np.ndarray]] = []

    def __call__(self, records: Sequence[int], scores: Scores) -> None:
        """Take the scores of some records."""
        metrics = record_metrics(self._task, scores)
        self._names = list(metrics)
        totals = scores.logps.new_zeros(2, len(metrics), len(records), dtype=torch.float64)
        for into, metric in zip(totals.unbind(1), metrics.values(), strict=True):
            into[0].index_add_(0, metric.records, metric.sums.double())
            into[1].index_add_(0, metric.records, metric.counts.double())
        self._found.append((list(records), totals.cpu().numpy()))

    def values(self, store: TokenStore) -> RecordValues:
        """Return the metrics of all records that were evaluated, in the order of the store; all ranks call this."""
        parts = gather_object(self._found)
        names: list[str] = next(filter(None, gather_object([self._names])), [])
        numbers = np.array([record for records, _ in parts for record in records], dtype=np.int64)
        order = np.argsort(numbers)
        totals = np.concatenate([part for _, part in parts], axis=2)[:, :, order]
        return RecordValues(tuple(names), store.prompt_hash[numbers[order]], totals[0], totals[1])

"""The accuracy of implicit rewards by source, and by each column of the rows' `meta`."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from accelerate.utils import gather_object

from dpoctl.core.meters import Total
from dpoctl.core.objective import Objective, Report, TermValues
from dpoctl.core.planner import Plan
from dpoctl.data.store import TokenStore
from dpoctl.losses import PreferenceLoss, Scores
from dpoctl.runs.statistics import mean, share, summary

MOST_VALUES = 50
"""A column with more values than this is no grouping: it is a number, a name or an id."""

Margin = tuple[int, float]
"""The number of a record, and the reward margin of one of its pairs."""


@dataclass
class Margins:
    """Takes the place of an objective's report, and keeps the reward margin of each pair.

    Attributes:
        report: the report that it stands for.
        loss: defines the rewards.
        records: the records of each call to come, of this rank; no records for a filler.
        found: the margins so far.
    """

    report: Report
    loss: PreferenceLoss
    records: list[Sequence[int]]
    found: list[Margin] = field(default_factory=list)

    @classmethod
    def watch(cls, objective: Objective, plan: Plan) -> "Margins | None":
        """Watch an evaluation; None if its loss compares no pairs."""
        losses = [term.loss for term in objective.terms if isinstance(term.loss, PreferenceLoss)]
        if not losses or losses[0].rows == "labels":
            return None
        if any(term.loss.at_eval().couples_batch for term in objective.terms):
            calls = [list(step.records) for step in plan]
        else:
            rank = objective.accelerator.process_index
            calls = [list(records) for step in plan for records in step.schedule[rank]]
        return cls(objective.report, losses[0].at_eval(), calls)  # type: ignore[arg-type]

    def __call__(self, scores: Scores, values: Sequence[TermValues], names: Mapping[int, str]) -> Mapping[str, Total]:
        """Keep the margins of some scores, and return what the report does."""
        records = self.records.pop(0)
        if records:
            margins = scores.differences(self.loss.reward(scores)).tolist()
            owners = scores.outline.records[scores.pairs[:, 0]].tolist()
            self.found += [(int(records[owner]), margin) for owner, margin in zip(owners, margins, strict=True)]
        return self.report(scores, values, names)

    def gathered(self) -> list[Margin]:
        """Return the margins of all ranks, by record; every rank calls this."""
        # A loss that couples the records of a step has given every rank all of them.
        whole: list[Margin] = sorted(set(gather_object(list(enumerate_same(self.found)))))
        return [(record, margin) for record, _, margin in whole]  # type: ignore[misc]


def enumerate_same(margins: Sequence[Margin]) -> list[tuple[int, int, float]]:
    """Number the pairs of each record."""
    seen: dict[int, int] = defaultdict(int)
    rows = []
    for record, margin in margins:
        rows.append((record, seen[record], margin))
        seen[record] += 1
    return rows


def accuracy_by_group(margins: Sequence[Margin], store: TokenStore, sources: Sequence[str]) -> dict[str, Any]:
    """Return accuracy and mean margin by source and by each column of `meta` with a few values.

    Args:
        margins: of each pair.
        store: the records.
        sources: the paths of the sources, by number.

    Returns:
        By column, then by value; nothing for a column with one value.
    """
    columns: dict[str, dict[str, list[Margin]]] = defaultdict(lambda: defaultdict(list))
    for record, margin in margins:
        facts: dict[str, Any] = {f"meta.{name}": value for name, value in store.texts(record).meta.items()}
        facts["source"] = sources[store.source[record]] if len(sources) > 1 else None
        for name, value in facts.items():
            if isinstance(value, str | bool | int) and len(columns[name]) <= MOST_VALUES:
                columns[name][str(value)].append((record, margin))
    return {
        name: {value: _describe(group, store) for value, group in sorted(groups.items())}
        for name, groups in sorted(columns.items())
        if 1 < len(groups) <= MOST_VALUES
    }


def _describe(group: Sequence[Margin], store: TokenStore) -> dict[str, Any]:
    prompts = [int(store.prompt_hash[record]) for record, _ in group]
    estimates = {
        "rewards/accuracies": share([float(margin > 0) for _, margin in group], prompts),
        "rewards/margins": mean([margin for _, margin in group], prompts),
    }
    return {**summary(estimates), "num_pairs": len(group)}

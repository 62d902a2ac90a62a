"""What a record is wanted for: a demonstration, pairs, a ranking or a label."""

from collections import Counter
from typing import TYPE_CHECKING, Literal

from dpoctl.data.pairing import Pairing, pair_up
from dpoctl.data.records import Record, Reject
from dpoctl.data.selection import prompt_digest
from dpoctl.errors import DataError

if TYPE_CHECKING:
    from dpoctl.recipe.schema_data import Source

Wants = Literal["demonstrations", "pairs", "rankings", "labels"]
"""What a loss learns from."""


def pairing_of(source: "Source", wants: Wants | None, seed: int) -> Pairing | None:
    """Say how the rated answers of a source become pairs; None where nothing is compared."""
    if wants in ("demonstrations", "labels"):
        return None
    return Pairing(
        mode=source.pairs or ("all" if wants == "rankings" else "best-worst"),
        min_margin=source.min_margin or 0.0,
        max_pairs=source.max_pairs_per_prompt,
        ties=source.ties or "drop",
        seed=seed,
    )


class Shaper:
    """Makes of the records of a source what is wanted of them, and notices which of its keys have an effect.

    Args:
        source: Where they come from.
        wants: None takes every record as it is, once rated answers are paired.
        pairing: None leaves ratings as they are.
    """

    def __init__(self, source: "Source", wants: Wants | None, pairing: Pairing | None) -> None:
        self._source = source
        self._wants = wants
        self._pairing = pairing
        self._pairs_of: Counter[bytes] = Counter()
        self._records = 0
        self._scored = 0
        self._rated_several = 0

    def settle(self, outcome: Record | Reject) -> tuple[Record | Reject, int]:
        """Make of a record what is wanted, or reject it; say how many of its pairs were dropped as ties."""
        if isinstance(outcome, Reject):
            return outcome, 0
        self._records += 1
        try:
            return self._shaped(outcome)
        except Reject as reject:
            return reject, 0

    def refuse_idle_keys(self, format_name: str) -> None:
        """Make sure, once all rows are read, that each key about pairs had something to decide.

        Raises:
            DataError: One had not.
        """
        idle = self._idle_key()
        if idle is not None:
            why = "rates more than two answers without naming pairs" if idle == "pairs" else "rates its answers"
            raise DataError(
                f"{self._source.path}: {idle} would do nothing: no row of format {format_name} {why}",
                hint=f"leave {idle} out",
            )

    def _idle_key(self) -> str | None:
        if not self._records:
            return None
        if self._source.pairs is not None and not self._rated_several:
            return "pairs"
        given = (key for key in ("min_margin", "ties") if getattr(self._source, key) is not None)
        return None if self._scored else next(given, None)

    def _shaped(self, record: Record) -> tuple[Record, int]:
        if self._wants == "demonstrations":
            return record.preferred(), 0
        if self._wants == "labels":
            if record.label is None:
                raise Reject("no_label", "the row does not say whether its answer is good")
            return record, 0
        if self._pairing is None:
            return record, 0
        self._scored += bool(record.scores)
        self._rated_several += len(record.scores) > 2 and not record.pairs
        record, tied_pairs = pair_up(record, self._pairing)
        if not record.pairs and (self._wants is not None or record.scores):
            raise Reject("no_pair", "the row holds one answer, and a preference needs two")
        if self._wants == "rankings":
            check_ranking(record)
        self._limit(record)
        return record, tied_pairs

    def _limit(self, record: Record) -> None:
        """Count the pairs of each prompt, over all rows that have it."""
        limit = self._source.max_pairs_per_prompt
        if limit is None:
            return
        prompt = prompt_digest(record.prompt)
        if self._pairs_of[prompt] + len(record.pairs) > limit:
            raise Reject("enough_pairs", f"the prompt would have more than {limit} pairs")
        self._pairs_of[prompt] += len(record.pairs)


def check_ranking(record: Record) -> None:
    """Make sure that the pairs put all responses in one order.

    Raises:
        Reject: They do not.
    """
    count = len(record.responses)
    beaten = [{loser for winner, loser in record.pairs if winner == one} for one in range(count)]
    for through in range(count):
        for one in range(count):
            if through in beaten[one]:
                beaten[one] |= beaten[through]
    if sorted(map(len, beaten)) != list(range(count)):
        raise Reject("not_a_ranking", f"the pairs do not put {count} answers in one order")

"""One pass from records to a store: render, tokenize, fit, write; every row counted."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from dpoctl.data.gaps import GapFinder, Gaps, GapTally
from dpoctl.data.grouping import Votes
from dpoctl.data.records import Record, Reject
from dpoctl.data.rows import Found, Place, RowCount, Selection, find_rows
from dpoctl.data.selection import record_digest
from dpoctl.data.shaping import check_ranking
from dpoctl.data.spread import Lengths
from dpoctl.data.store import StoreWriter
from dpoctl.data.template import Rendered, Renderer
from dpoctl.data.tokenize import Answer, Encoder, Example, Ids, Limits, build_example, fit

BATCH = 512
"""Records; their texts and tokens fit in a processor's cache."""


class Encoded(NamedTuple):
    """The tokens of a record, and what was done to it on the way."""

    example: Example
    prompt_tokens: int
    answer_tokens: tuple[int, ...]
    prompt_cut: bool
    answers_cut: int
    eos_added: bool
    notes: tuple[str, ...]
    gaps: Gaps


class RecordEncoder:
    """Records to examples.

    Args:
        renderer: Messages to text.
        encoder: Text to tokens.
        limits: How long a record may be, one a source.
    """

    def __init__(self, renderer: Renderer, encoder: Encoder, limits: Sequence[Limits]) -> None:
        self._renderer = renderer
        self._encoder = encoder
        self._limits = limits
        self._gaps = GapFinder(encoder)
        self.dtype = encoder.dtype

    def encode(self, records: Sequence[Record], sources: Sequence[int]) -> list[Encoded | Reject]:
        """Encode a batch, each record on its own account.

        Args:
            records: What is encoded.
            sources: The number of the source that each comes from.

        Raises:
            DataError: The chat template is missing, or moves boundaries in a way that is not known.
        """
        rendered = [self._render(record) for record in records]
        tokens = iter(self._encoder.encode([item for item in rendered if isinstance(item, Rendered)]))
        return [
            item if isinstance(item, Reject) else self._lay_out(record, item, self._limits[source], *next(tokens))
            for record, source, item in zip(records, sources, rendered, strict=True)
        ]

    def _render(self, record: Record) -> Rendered | Reject:
        try:
            return self._renderer.render(record)
        except Reject as reject:
            return reject

    def _lay_out(
        self, record: Record, item: Rendered, limits: Limits, prompt: Ids, answers: list[Answer]
    ) -> Encoded | Reject:
        try:
            prompt, prompt_cut, answers_cut = fit(prompt, answers, limits, self._encoder.bos)
            example = build_example(prompt, answers, record, self.dtype)
        except Reject as reject:
            return reject
        return Encoded(
            example=example,
            prompt_tokens=len(prompt),
            answer_tokens=tuple(len(answer.ids) for answer in answers),
            prompt_cut=prompt_cut,
            answers_cut=answers_cut,
            eos_added=not isinstance(record.prompt, str) and any(text.needs_eos for text in item.completions),
            notes=item.notes,
            gaps=self._gaps.find(example, record),
        )


@dataclass
class Tally:
    """What became of the rows that were found, and how long they are."""

    used: Counter[int] = field(default_factory=Counter)
    """Rows of each source, by its number."""
    rejected: dict[int, Counter[str]] = field(default_factory=dict)
    """Rows by the reason, by the number of their source."""
    first_rejected: dict[str, tuple[Place, str]] = field(default_factory=dict)
    duplicates: int = 0
    tied_pairs: int = 0
    outvoted_pairs: int = 0
    prompts_cut: int = 0
    answers_cut: int = 0
    rows_without_eos: int = 0
    eos_added: int = 0
    most_answers: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    gaps: GapTally = field(default_factory=GapTally)
    lengths: Lengths = field(default_factory=Lengths)

    def reject(self, reject: Reject, places: Sequence[Place]) -> None:
        """Count rows that are not used."""
        self.rejected.setdefault(places[0][0], Counter())[reject.reason] += len(places)
        self.first_rejected.setdefault(reject.reason, (places[0], reject.detail))

    def use(self, encoded: Encoded, found: Found, record: Record) -> None:
        """Count a record that is used."""
        self.used[found.places[0][0]] += len(found.places)
        self.tied_pairs += found.tied_pairs
        self.prompts_cut += encoded.prompt_cut
        self.answers_cut += encoded.answers_cut
        self.rows_without_eos += encoded.answers_cut > 0
        self.eos_added += encoded.eos_added
        self.most_answers = max(self.most_answers, len(record.responses))
        for note in encoded.notes:
            self.notes[note] += 1
        self.gaps.count(encoded.gaps)
        self.lengths.add(encoded.prompt_tokens, encoded.answer_tokens, record.pairs)


def build(
    selection: Selection,
    encoder: RecordEncoder,
    writer: StoreWriter,
    *,
    drop_duplicates: bool,
    votes: Votes,
    settle: bool,
) -> dict[str, Any]:
    """Write every selected row, or its rejection, and return the report.

    Args:
        selection: What is read.
        encoder: To tokens.
        writer: Where they go.
        drop_duplicates: Reject records that stand further up.
        votes: Of several verdicts on one pair: filled, or used where `settle` is true.
        settle: Drop pairs that the majority of the votes speaks against.

    Raises:
        UsageError: A source has an option that its format does not have.
        DataError: The sources cannot be read, or a boundary between prompt and answer cannot be verified.
        SetupError: The hub cannot be reached.
    """
    count, tally = RowCount(), Tally()
    found = find_rows(selection, count)
    voted = _settled(found, votes, tally, selection) if settle else _counted(found, votes)
    rows = _without_duplicates(voted, tally, drop=drop_duplicates)
    while batch := list(islice(rows, BATCH)):
        sound = [one for one in batch if isinstance(one.outcome, Record)]
        records = [one.outcome for one in sound if isinstance(one.outcome, Record)]
        encoded = iter(encoder.encode(records, [one.places[0][0] for one in sound]))
        for one in batch:
            _write(one, one.outcome if isinstance(one.outcome, Reject) else next(encoded), writer, tally)
    return _report(count, tally, writer)


def _write(found: Found, encoded: Encoded | Reject, writer: StoreWriter, tally: Tally) -> None:
    if isinstance(encoded, Reject):
        tally.reject(encoded, found.places)
        for place in found.places:
            writer.reject(encoded, place)
        return
    assert isinstance(found.outcome, Record)
    tally.use(encoded, found, found.outcome)
    for _ in range(found.copies):
        writer.add(encoded.example, found.outcome, found.places[0])


def _counted(rows: Iterable[Found], votes: Votes) -> Iterator[Found]:
    for found in rows:
        if isinstance(found.outcome, Record):
            votes.add(found.outcome)
        yield found


def _settled(rows: Iterable[Found], votes: Votes, tally: Tally, selection: Selection) -> Iterator[Found]:
    for found in rows:
        if isinstance(found.outcome, Reject):
            yield found
            continue
        try:
            record = votes.settle(found.outcome)
            if selection.wants == "rankings":
                check_ranking(record)
        except Reject as reject:
            yield found._replace(outcome=reject)
            continue
        tally.outvoted_pairs += len(found.outcome.pairs) - len(record.pairs)
        yield found._replace(outcome=record)


def _without_duplicates(rows: Iterator[Found], tally: Tally, *, drop: bool) -> Iterator[Found]:
    seen = set[bytes]()
    for found in rows:
        if isinstance(found.outcome, Record):
            digest = record_digest(found.outcome)
            tally.duplicates += digest in seen
            if drop and digest in seen:
                yield found._replace(outcome=Reject("duplicate", "the same record stands further up"))
                continue
            seen.add(digest)
        yield found


def _report(count: RowCount, tally: Tally, writer: StoreWriter) -> dict[str, Any]:
    num_tokens = writer.column("num_tokens")
    rejected = sum(tally.rejected.values(), Counter[str]())
    return {
        "rows": count.rows,
        "used": tally.used.total(),
        "rejected": dict(sorted(rejected.items())),
        "held_out": count.held_out,
        "unsampled": count.unsampled,
        "duplicates": tally.duplicates,
        "records": len(writer.column("shared_len")),
        "pairs": len(writer.column("pairs")),
        "tied_pairs": tally.tied_pairs,
        "outvoted_pairs": tally.outvoted_pairs,
        "most_answers": tally.most_answers,
        "prompts_truncated": tally.prompts_cut,
        "answers_truncated": tally.answers_cut,
        "rows_without_eos": tally.rows_without_eos,
        "eos_added": tally.eos_added,
        "template": dict(sorted(tally.notes.items())),
        "gaps": tally.gaps.report(),
        "tokens": {
            "total": int(writer.column("token_start")[-1]),
            "scored": int(num_tokens.sum()),
            **tally.lengths.summary(),
        },
        "sources": [
            facts | {"used": tally.used[number], "rejected": dict(sorted(tally.rejected.get(number, {}).items()))}
            for number, facts in enumerate(count.sources)
        ],
        "first_rejected": {reason: [at, detail] for reason, (at, detail) in tally.first_rejected.items()},
    }

"""One pass from records to a store: render, tokenize, fit, write; every row counted."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from dpoctl.data.records import Record, Reject
from dpoctl.data.rows import Found, Place, RowCount, Selection, find_rows
from dpoctl.data.selection import record_digest
from dpoctl.data.store import StoreWriter
from dpoctl.data.template import Rendered, Renderer
from dpoctl.data.tokenize import Answer, Encoder, Example, Ids, Limits, build_example, fit

BATCH = 2048
PERCENTILES = (50, 90, 99)


class Encoded(NamedTuple):
    """The tokens of a record, and what was done to it on the way."""

    example: Example
    prompt_tokens: int
    answer_tokens: tuple[int, ...]
    prompt_cut: bool
    answers_cut: int
    eos_added: bool
    notes: tuple[str, ...]


class RecordEncoder:
    """Records to examples.

    Args:
        renderer: Messages to text.
        encoder: Text to tokens.
        limits: How long a record may be.
    """

    def __init__(self, renderer: Renderer, encoder: Encoder, limits: Limits) -> None:
        self._renderer = renderer
        self._encoder = encoder
        self._limits = limits
        self.dtype = encoder.dtype

    def encode(self, records: Sequence[Record]) -> list[Encoded | Reject]:
        """Encode a batch, each record on its own account.

        Raises:
            DataError: The chat template is missing, or moves boundaries in a way that is not known.
        """
        rendered = [self._render(record) for record in records]
        tokens = iter(self._encoder.encode([item for item in rendered if isinstance(item, Rendered)]))
        return [
            item if isinstance(item, Reject) else self._lay_out(record, item, *next(tokens))
            for record, item in zip(records, rendered, strict=True)
        ]

    def _render(self, record: Record) -> Rendered | Reject:
        try:
            return self._renderer.render(record)
        except Reject as reject:
            return reject

    def _lay_out(self, record: Record, item: Rendered, prompt: Ids, answers: list[Answer]) -> Encoded | Reject:
        try:
            prompt, prompt_cut, answers_cut = fit(prompt, answers, self._limits, self._encoder.bos)
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
        )


@dataclass
class Tally:
    """What became of the rows that were found, and how long they are."""

    used: int = 0
    duplicates: int = 0
    prompts_cut: int = 0
    answers_cut: int = 0
    rows_without_eos: int = 0
    eos_added: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    first_rejected: dict[str, tuple[Place, str]] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)
    prompt_tokens: list[int] = field(default_factory=list)
    answer_tokens: dict[str, list[int]] = field(default_factory=dict)

    def reject(self, reject: Reject, at: Place) -> None:
        """Count a row that is not used."""
        self.rejected[reject.reason] += 1
        self.first_rejected.setdefault(reject.reason, (at, reject.detail))

    def use(self, encoded: Encoded) -> None:
        """Count a row that is used."""
        self.used += 1
        self.prompts_cut += encoded.prompt_cut
        self.answers_cut += encoded.answers_cut
        self.rows_without_eos += encoded.answers_cut > 0
        self.eos_added += encoded.eos_added
        self.notes.update(encoded.notes)
        self.prompt_tokens.append(encoded.prompt_tokens)
        names = ("chosen", "rejected") if len(encoded.answer_tokens) == 2 else ("answer",) * len(encoded.answer_tokens)
        for name, length in zip(names, encoded.answer_tokens, strict=True):
            self.answer_tokens.setdefault(name, []).append(length)


def build(
    selection: Selection, encoder: RecordEncoder, writer: StoreWriter, *, drop_duplicates: bool
) -> dict[str, Any]:
    """Write every selected row, or its rejection, and return the report.

    Raises:
        DataError: The sources cannot be read, or a boundary between prompt and answer cannot be verified.
        SetupError: The hub cannot be reached.
    """
    count, tally = RowCount(), Tally()
    rows = _without_duplicates(find_rows(selection, count), tally, drop=drop_duplicates)
    while batch := list(islice(rows, BATCH)):
        encoded = iter(encoder.encode([found.outcome for found in batch if isinstance(found.outcome, Record)]))
        for found in batch:
            _write(found, found.outcome if isinstance(found.outcome, Reject) else next(encoded), writer, tally)
    return _report(count, tally, writer)


def _write(found: Found, encoded: Encoded | Reject, writer: StoreWriter, tally: Tally) -> None:
    if isinstance(encoded, Reject):
        tally.reject(encoded, found.at)
        writer.reject(encoded, found.at)
        return
    assert isinstance(found.outcome, Record)
    tally.use(encoded)
    for _ in range(found.copies):
        writer.add(encoded.example, found.outcome, found.at)


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
    return {
        "rows": count.rows,
        "used": tally.used,
        "rejected": dict(sorted(tally.rejected.items())),
        "held_out": count.held_out,
        "unsampled": count.unsampled,
        "duplicates": tally.duplicates,
        "records": len(writer.column("shared_len")),
        "prompts_truncated": tally.prompts_cut,
        "answers_truncated": tally.answers_cut,
        "rows_without_eos": tally.rows_without_eos,
        "eos_added": tally.eos_added,
        "template": dict(sorted(tally.notes.items())),
        "tokens": {
            "total": int(writer.column("token_start")[-1]),
            "scored": int(num_tokens.sum()),
            "prompt": _lengths(tally.prompt_tokens),
            **{name: _lengths(lengths) for name, lengths in tally.answer_tokens.items()},
        },
        "sources": count.formats,
        "first_rejected": {reason: [at, detail] for reason, (at, detail) in tally.first_rejected.items()},
    }


def _lengths(values: list[int]) -> dict[str, float]:
    if not values:
        return {}
    percentiles = np.percentile(values, PERCENTILES, method="lower")
    return {
        "mean": round(float(np.mean(values)), 1),
        **{f"p{percent}": int(value) for percent, value in zip(PERCENTILES, percentiles, strict=True)},
        "max": max(values),
    }

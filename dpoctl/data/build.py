"""The training side of the pipeline: records are rendered, tokenized, cut to length and written to a token store."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dpoctl import console
from dpoctl.data.chat_template import SlowTemplateError, refuse_too_long
from dpoctl.data.grouping import Majority
from dpoctl.data.pipeline import RowResult, RowStats, Selection, SourceStats, open_source, read_records
from dpoctl.data.records import Record, Reject, strings_of
from dpoctl.data.rendering import Rendered, Renderer
from dpoctl.data.row_report import TOO_SLOW
from dpoctl.data.sampling import Tries, sample_size
from dpoctl.data.store import StoreWriter
from dpoctl.data.tokenize import Answer, Encoder, Example, Ids, Limits, build_example, fit
from dpoctl.data.turn_markers import MarkerCounts, MarkerFinder

BYTES = [f"<0x{byte:02X}>" for byte in range(128, 256)]
"""Tokens of bytes beyond ASCII; in ASCII a byte may be the only token of a character, such as a line feed."""
MOST_CHARACTERS = 20
"""The number of unknown characters that a report names, the most frequent ones."""
MOST_SLOW = 3
"""Rows for which the chat template may take too long before a run ends."""
BATCH = 512
"""Records that are encoded together; their texts and tokens fit in a processor's cache."""


@dataclass(slots=True)
class UnknownTokens:
    """Counts of tokens that stand for characters without a token of their own, in one record or in many."""

    rows_unknown: int = 0
    unknown: int = 0
    """Unknown tokens: the text is lost."""
    characters: Counter[str] = field(default_factory=Counter)
    """The characters that are lost, and how often the texts hold them."""
    rows_in_bytes: int = 0
    in_bytes: int = 0
    """Tokens of single bytes: the text is kept."""

    def add(self, other: "UnknownTokens") -> None:
        """Add the counts of a record."""
        self.rows_unknown += other.rows_unknown
        self.unknown += other.unknown
        self.characters += other.characters
        self.rows_in_bytes += other.rows_in_bytes
        self.in_bytes += other.in_bytes

    def report(self) -> dict[str, Any]:
        """Return the counts as JSON values."""
        return {
            "rows_unknown": self.rows_unknown,
            "unknown": self.unknown,
            "characters": dict(self.characters.most_common(MOST_CHARACTERS)),
            "rows_in_bytes": self.rows_in_bytes,
            "in_bytes": self.in_bytes,
        }


class UnknownTokenFinder:
    """Finds tokens of an encoder that stand for characters without a token of their own."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._has_token: dict[str, bool] = {}

    def find(self, example: Example, record: Record) -> UnknownTokens | None:
        """Count the unknown tokens of a record, those that responses share once; None where there are none."""
        marks = self._marks
        if marks is None:
            return None
        marked = marks[np.concatenate((example.shared, *example.suffixes))]
        if not marked.any():
            return None
        _, unknown, in_bytes = (int(count) for count in np.bincount(marked, minlength=3))
        found = UnknownTokens(
            rows_unknown=int(unknown > 0), unknown=unknown, rows_in_bytes=int(in_bytes > 0), in_bytes=in_bytes
        )
        if unknown:
            texts = "".join(strings_of(record.prompt, *record.responses))
            found.characters = Counter(character for character in texts if not self._knows(character))
        return found

    @cached_property
    def _marks(self) -> npt.NDArray[np.uint8] | None:
        """One value a token: 1 is unknown, 2 is a byte, 0 is any other; None where the tokenizer has neither."""
        vocabulary = self._encoder.vocabulary
        in_bytes = [vocabulary[token] for token in BYTES if token in vocabulary]
        if self._encoder.unk is None and not in_bytes:
            return None
        marks = np.zeros(max(vocabulary.values()) + 1, dtype=np.uint8)
        marks[in_bytes] = 2
        if self._encoder.unk is not None:
            marks[self._encoder.unk] = 1
        return marks

    def _knows(self, character: str) -> bool:
        if character not in self._has_token:
            self._has_token[character] = self._encoder.unk not in self._encoder.plain(character)
        return self._has_token[character]


class Encoded(NamedTuple):
    """The tokens of a record, and the changes that were made to it on the way."""

    example: Example
    prompt_tokens: int
    answer_tokens: tuple[int, ...]
    prompt_cut: bool
    answers_cut: int
    eos_added: bool
    notes: tuple[str, ...]
    unknown: UnknownTokens | None
    markers: set[str]


class RecordEncoder:
    """Renders and tokenizes records, and cuts each to the limits of its source."""

    def __init__(self, renderer: Renderer, encoder: Encoder, limits: Sequence[Limits]) -> None:
        self._renderer = renderer
        self._encoder = encoder
        self._limits = limits
        self._unknown_tokens = UnknownTokenFinder(encoder)
        self.markers = MarkerFinder(renderer, encoder)
        self._slow = 0
        self.dtype = encoder.dtype

    def encode(self, records: Sequence[Record], sources: Sequence[int]) -> list[Encoded | Reject]:
        """Encode a batch of records from sources of these numbers; one that cannot be used becomes a rejection.

        Raises:
            DataError: The chat template is missing, or too slow for several rows.
        """
        rendered = [self._render(record) for record in records]
        tokens = iter(self._encoder.encode([item for item in rendered if isinstance(item, Rendered)]))
        return [
            item if isinstance(item, Reject) else self._encode_one(record, item, self._limits[source], *next(tokens))
            for record, source, item in zip(records, sources, rendered, strict=True)
        ]

    def _render(self, record: Record) -> Rendered | Reject:
        try:
            refuse_too_long(record)
            return self._renderer.render(record)
        except Reject as reject:
            return reject
        except SlowTemplateError as error:
            # The next rows may take as long.
            self._slow += 1
            if self._slow > MOST_SLOW:
                raise
            return Reject(TOO_SLOW, error.message)

    def _encode_one(
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
            unknown=self._unknown_tokens.find(example, record),
            markers=self.markers.find(record),
        )


@dataclass
class EncodingStats:
    """The changes that encoding made to the records of a store, by their names in the report."""

    most_answers: int = 0
    prompts_truncated: int = 0
    answers_truncated: int = 0
    rows_without_eos: int = 0
    eos_added: int = 0
    template: Counter[str] = field(default_factory=Counter)
    """Records by the deviation of the template, a key of `TEMPLATE_NOTES`."""
    gaps: UnknownTokens = field(default_factory=UnknownTokens)
    markers: MarkerCounts = field(default_factory=MarkerCounts)

    def add(self, encoded: Encoded, record: Record) -> None:
        """Count a record."""
        self.most_answers = max(self.most_answers, len(encoded.answer_tokens))
        self.prompts_truncated += encoded.prompt_cut
        self.answers_truncated += encoded.answers_cut
        self.rows_without_eos += encoded.answers_cut > 0
        self.eos_added += encoded.eos_added
        for note in encoded.notes:
            self.template[note] += 1
        if encoded.unknown is not None:
            self.gaps.add(encoded.unknown)
        self.markers.add(record, encoded.markers)

    def report(self, finder: MarkerFinder) -> dict[str, Any]:
        """Return the counts as JSON values."""
        template, markers = dict(sorted(self.template.items())), self.markers.report(finder)
        return vars(self) | {"template": template, "gaps": self.gaps.report(), "markers": markers}


def build(
    selection: Selection,
    encoder: RecordEncoder,
    writer: StoreWriter,
    majority: Majority,
    progress: console.WorkProgress,
) -> tuple[dict[str, Any], Counter[int]]:
    """Write every record of a set, or its rejection.

    Args:
        selection: The rows of the set.
        encoder: Turns records into tokens.
        writer: Takes the records.
        majority: As in `read_records`.
        progress: Shows the rows that are done.

    Returns:
        The report, and the number of records that are used, by the number of the source.

    Raises:
        UsageError: A source sets an option that its format does not have.
        DataError: The sources cannot be read, or a boundary between prompt and answer cannot be verified.
        SetupError: The hub cannot be reached.
    """
    stats, encoding, used = RowStats(), EncodingStats(), Counter[int]()
    for result, outcome in _encode(read_records(selection, stats, majority), encoder, progress):
        if isinstance(outcome, Reject):
            stats.reject(outcome, result.places)
            for place in result.places:
                writer.reject(outcome, place)
        else:
            assert isinstance(result.outcome, Record)
            encoding.add(outcome, result.outcome)
            stats.use(result, outcome.prompt_tokens, outcome.answer_tokens)
            used[result.places[0][0]] += 1
            _write(result, outcome.example, writer)
    return _report(stats, encoding.report(encoder.markers), writer), used


def draw(
    selection: Selection, encoder: RecordEncoder, progress: console.WorkProgress, used: Counter[int]
) -> dict[int, Tries]:
    """Try rows of sources with `max_samples`, until as many as are wanted can be used, or all are tried.

    Args:
        selection: The rows that are tried so far, in its `tries`.
        encoder: Turns records into tokens, and rejects those that are too long.
        progress: Shows the rows that are done.
        used: The number of records that can be used among these, by the number of the source.

    Returns:
        The rows to try, by the number of the source: no fewer than would do.
    """
    tries, found = dict(selection.tries), Counter(used)
    while missing := _missing(selection, tries, found):
        more = {number: _further(tries[number], found[number], missing[number]) for number in missing}
        ranks = _usable(selection, more, encoder, progress)
        for number, count in missing.items():
            enough = len(ranks[number]) >= count
            stop = sorted(ranks[number])[count - 1] + 1 if enough else more[number].stop
            tries[number] = tries[number]._replace(stop=stop)
            found[number] += min(len(ranks[number]), count)
    return tries


def _missing(selection: Selection, tries: Mapping[int, Tries], found: Counter[int]) -> dict[int, int]:
    """Return how many records are missing, by the number of the source, of those that have rows left to try."""
    wanted = {number: sample_size(selection.sources[number], one.rows) for number, one in tries.items()}
    return {
        number: wanted[number] - found[number]
        for number, one in tries.items()
        if one.stop < one.rows and found[number] < wanted[number]
    }


def _further(tried: Tries, found: int, missing: int) -> Tries:
    """Return the next rows to try; each turn reads the source once, so a few more than are likely to do."""
    rows = math.ceil(1.2 * missing * tried.stop / found) if found else max(2 * tried.stop, missing)
    return Tries(tried.rows, min(tried.stop + rows + 10, tried.rows), start=tried.stop)


def _usable(
    selection: Selection, tries: Mapping[int, Tries], encoder: RecordEncoder, progress: console.WorkProgress
) -> dict[int, list[int]]:
    """Return the ranks of those rows that can be used, by the number of the source."""
    opened = (
        open_source(source, method=selection.method)
        if number in tries
        else (SourceStats(source.path, "", ""), iter(()))
        for number, source in enumerate(selection.sources)
    )
    alone = replace(selection, tries=tries, eval_size=None, held_out=None, side="train")
    ranks: dict[int, list[int]] = {number: [] for number in tries}
    for result, outcome in _encode(read_records(alone, RowStats(), Majority(), opened), encoder, progress):
        if not isinstance(outcome, Reject):
            ranks[result.places[0][0]].append(result.rank)
    return ranks


def _encode(
    results: Iterator[RowResult], encoder: RecordEncoder, progress: console.WorkProgress
) -> Iterator[tuple[RowResult, Encoded | Reject]]:
    while batch := list(islice(results, BATCH)):
        sound = [(result, result.outcome) for result in batch if isinstance(result.outcome, Record)]
        numbers = [result.places[0][0] for result, _ in sound]
        encoded = iter(encoder.encode([record for _, record in sound], numbers))
        for result in batch:
            yield result, result.outcome if isinstance(result.outcome, Reject) else next(encoded)
        progress.advance(len(batch))


def _write(result: RowResult, example: Example, writer: StoreWriter) -> None:
    assert isinstance(result.outcome, Record)
    for _ in range(result.copies):
        writer.add(example, result.outcome, result.places[0])


def _report(stats: RowStats, encoding: dict[str, Any], writer: StoreWriter) -> dict[str, Any]:
    return {
        "rows": stats.rows,
        "used": stats.used,
        "rejected": dict(sorted(stats.rejected.items())),
        "held_out": stats.held_out,
        "unsampled": stats.unsampled,
        "duplicates": stats.duplicates,
        "records": len(writer.column("shared_len")),
        "pairs": len(writer.column("pairs")),
        "tied_pairs": stats.tied_pairs,
        "outvoted_pairs": stats.outvoted_pairs,
        **encoding,
        "tokens": {
            "total": int(writer.column("token_start")[-1]),
            "scored": int(writer.column("num_tokens").sum()),
            **stats.lengths.summary(),
        },
        "sources": [vars(source) | {"rejected": dict(sorted(source.rejected.items()))} for source in stats.sources],
        "first_rejected": {reason: [place, detail] for reason, (place, detail) in stats.first_rejected.items()},
    }

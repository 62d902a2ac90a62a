"""Examples to batches: laid out flat with shared prefixes, or as padded rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpoctl.core.batch import Batch
from dpoctl.data.tokenize import Example
from dpoctl.model.attention import Segments
from dpoctl.model.probe import Layout

Ints = NDArray[np.int64]
Collate = Callable[..., Batch]
"""What `collate` is, or a function of the caller's that takes the same arguments."""


def collate(
    examples: Sequence[Example],
    layout: Layout,
    *,
    pad_token_id: int = 0,
    ref_logps: NDArray[np.float32] | None = None,
    is_filler: bool = False,
) -> Batch:
    """Put examples into one batch.

    Args:
        examples: the records of a micro-batch.
        layout: `shared` for one flat row, `padded` for a row a response.
        pad_token_id: fills rows in the padded layout; masked, so its value changes nothing.
        ref_logps: `[R]`, reference log-probabilities of all responses in order.
        is_filler: the batch only keeps ranks in step.
    """
    build = _Flat() if layout == "shared" else _Padded(pad_token_id)
    for example in examples:
        build.add(example)
    return build.finish(None if ref_logps is None else torch.from_numpy(ref_logps), is_filler)


@dataclass
class _Targets:
    """Which row predicts which token, to which response that token belongs, and what is known of the responses."""

    score_pos: list[Ints] = field(default_factory=list)
    score_tgt: list[Ints] = field(default_factory=list)
    token_index: list[Ints] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    pairs: list[Ints] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    predicted: int = 0

    def predict(self, rows: Ints, tokens: Ints) -> Ints:
        """Add tokens to predict, and return their numbers among the N."""
        self.score_pos.append(rows)
        self.score_tgt.append(tokens)
        numbers = np.arange(self.predicted, self.predicted + len(rows))
        self.predicted += len(rows)
        return numbers

    def add_response(self, numbers: Ints) -> None:
        """Say which predicted tokens make up the next response."""
        self.token_index.append(numbers)
        self.num_tokens.append(len(numbers))

    def add_record(self, example: Example) -> None:
        """Add what a record says of its responses, before these."""
        first = len(self.num_tokens)
        self.pairs.append(example.pairs.reshape(-1, 2) + first)
        self.starts.append(first)
        self.labels.append(example.label)
        self.targets.append(first + example.target if example.target >= 0 else -1)
        self.sources.append(example.source)

    def tensors(self) -> dict[str, Tensor]:
        """Return the fields that a batch has of these."""
        return {
            "score_pos": _join(self.score_pos),
            "score_tgt": _join(self.score_tgt),
            "token_index": _join(self.token_index),
            "num_tokens": torch.tensor(self.num_tokens),
            "pairs": _join(self.pairs).reshape(-1, 2),
            "starts": torch.tensor([*self.starts, len(self.num_tokens)]),
            "labels": torch.tensor(self.labels),
            "targets": torch.tensor(self.targets),
            "sources": torch.tensor(self.sources),
        }


class _Flat:
    def __init__(self) -> None:
        self.ids: list[Ints] = []
        self.positions: list[Ints] = []
        self.segments: list[tuple[int, int, tuple[int, ...]]] = []
        self.targets = _Targets()
        self.rows = 0

    def add(self, example: Example) -> None:
        start, shared = self.rows, len(example.shared)
        lengths = tuple(len(suffix) for suffix in example.suffixes)
        self.ids += [example.shared, *example.suffixes]
        self.positions.append(np.arange(shared))
        self.positions += [np.arange(shared, shared + length) for length in lengths]
        self.segments.append((start, shared, lengths))
        self.rows += shared + sum(lengths)

        self.targets.add_record(example)
        scored = np.flatnonzero(example.shared_scored)
        common = self.targets.predict(start + scored - 1, example.shared[scored])
        first = start + shared
        for suffix, flags in zip(example.suffixes, example.suffixes_scored, strict=True):
            scored = np.flatnonzero(flags)
            # The first token of any suffix is predicted by the last shared row, wherever the suffix stands.
            rows = np.where(scored == 0, start + shared - 1, first + scored - 1)
            own = self.targets.predict(rows, suffix[scored])
            self.targets.add_response(np.concatenate([common, own]))
            first += len(suffix)

    def finish(self, ref_logps: Tensor | None, is_filler: bool) -> Batch:
        return Batch(
            input_ids=_join(self.ids)[None],
            position_ids=_join(self.positions)[None],
            attention_mask=None,
            segments=Segments(tuple(self.segments)),
            ref_logps=ref_logps,
            is_filler=is_filler,
            **self.targets.tensors(),
        )


class _Padded:
    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id
        self.rows: list[Ints] = []
        self.targets = _Targets()

    def add(self, example: Example) -> None:
        self.targets.add_record(example)
        for suffix, flags in zip(example.suffixes, example.suffixes_scored, strict=True):
            row, scored = np.concatenate([example.shared, suffix]), np.concatenate([example.shared_scored, flags])
            at = np.flatnonzero(scored)
            # The width is not known yet: rows are numbered when the batch is finished.
            self.targets.add_response(self.targets.predict(at - 1, row[at]))
            self.rows.append(row)

    def finish(self, ref_logps: Tensor | None, is_filler: bool) -> Batch:
        width = max(len(row) for row in self.rows)
        ids = np.full((len(self.rows), width), self.pad_token_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for number, row in enumerate(self.rows):
            ids[number, : len(row)] = row
            mask[number, : len(row)] = 1
        self.targets.score_pos = [number * width + at for number, at in enumerate(self.targets.score_pos)]
        return Batch(
            input_ids=torch.from_numpy(ids),
            position_ids=torch.arange(width).expand(len(self.rows), width),
            attention_mask=torch.from_numpy(mask),
            segments=None,
            ref_logps=ref_logps,
            is_filler=is_filler,
            **self.targets.tensors(),
        )


def _join(arrays: Sequence[Ints]) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays).astype(np.int64, copy=False))

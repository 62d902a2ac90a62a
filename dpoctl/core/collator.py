"""Examples to batches, in each of the layouts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpoctl.core.batch import Batch
from dpoctl.data.tokenize import Example
from dpoctl.model.attention import Segments
from dpoctl.model.layouts import PADDING, PROMPT, Layout

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
        layout: how they lie; see `dpoctl.model.layouts`.
        pad_token_id: fills rows of a padded layout; masked, so its value changes nothing.
        ref_logps: `[R]`, reference log-probabilities of all responses in order.
        is_filler: the batch only keeps ranks in step.
    """
    build = _BUILDERS[layout]()
    for example in examples:
        build.add(example)
    return build.finish(pad_token_id, None if ref_logps is None else torch.from_numpy(ref_logps), is_filler)


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

    def add_shared(self, example: Example, start: int) -> None:
        """Add a record whose responses stand after one prompt, which starts at a row."""
        self.add_record(example)
        scored = np.flatnonzero(example.shared_scored)
        common = self.predict(start + scored - 1, example.shared[scored])
        last = start + len(example.shared) - 1
        first = last + 1
        for suffix, flags in zip(example.suffixes, example.suffixes_scored, strict=True):
            scored = np.flatnonzero(flags)
            # The first token of any suffix is predicted by the last shared row, wherever the suffix stands.
            own = self.predict(np.where(scored == 0, last, first + scored - 1), suffix[scored])
            self.add_response(np.concatenate([common, own]))
            first += len(suffix)

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
    """One row without padding."""

    def __init__(self) -> None:
        self.ids: list[Ints] = []
        self.positions: list[Ints] = []
        self.segments: list[tuple[int, int, tuple[int, ...]]] = []
        self.targets = _Targets()
        self.rows = 0

    def append(self, shared: Ints, suffixes: Sequence[Ints]) -> None:
        """Add a prefix and what stands after it."""
        lengths = tuple(len(suffix) for suffix in suffixes)
        self.ids += [shared, *suffixes]
        self.positions.append(_positions(len(shared), lengths))
        self.segments.append((self.rows, len(shared), lengths))
        self.rows += len(shared) + sum(lengths)

    def finish(self, pad_token_id: int, ref_logps: Tensor | None, is_filler: bool) -> Batch:
        del pad_token_id
        return Batch(
            input_ids=_join(self.ids)[None],
            position_ids=_join(self.positions)[None],
            attention_mask=None,
            segments=Segments(tuple(self.segments)),
            ref_logps=ref_logps,
            is_filler=is_filler,
            **self.targets.tensors(),
        )


class _Shared(_Flat):
    def add(self, example: Example) -> None:
        self.targets.add_shared(example, self.rows)
        self.append(example.shared, example.suffixes)


class _Packed(_Flat):
    def add(self, example: Example) -> None:
        self.targets.add_record(example)
        for row, scored in _separate(example):
            self.targets.add_response(self.targets.predict(self.rows + scored - 1, row[scored]))
            self.append(row[:0], [row])


class _Rows:
    """Rows of tokens, filled up to the longest."""

    def __init__(self) -> None:
        self.rows: list[tuple[Ints, Ints, Ints]] = []
        self.row_of: list[int] = []
        self.targets = _Targets()

    def append(self, ids: Ints, positions: Ints, parts: Ints) -> None:
        """Add a row, in which everything is predicted that was added to the targets since the last one."""
        # The width is not known yet: where rows start is added when the batch is finished.
        self.row_of += [len(self.rows)] * (len(self.targets.score_pos) - len(self.row_of))
        self.rows.append((ids, positions, parts))

    def finish(self, pad_token_id: int, ref_logps: Tensor | None, is_filler: bool) -> Batch:
        shape = len(self.rows), max(len(ids) for ids, _, _ in self.rows)
        filled = [np.full(shape, fill, dtype=np.int64) for fill in (pad_token_id, 0, PADDING)]
        for number, row in enumerate(self.rows):
            for table, values in zip(filled, row, strict=True):
                table[number, : len(values)] = values
        starts = [number * shape[1] for number in self.row_of]
        self.targets.score_pos = [start + at for start, at in zip(starts, self.targets.score_pos, strict=True)]
        ids, positions, parts = (torch.from_numpy(table) for table in filled)
        return Batch(
            input_ids=ids,
            position_ids=positions,
            attention_mask=parts,
            segments=None,
            ref_logps=ref_logps,
            is_filler=is_filler,
            **self.targets.tensors(),
        )


class _Masked(_Rows):
    def add(self, example: Example) -> None:
        self.targets.add_shared(example, 0)
        lengths = [len(suffix) for suffix in example.suffixes]
        parts = np.repeat(np.arange(PROMPT, PROMPT + 1 + len(lengths)), [len(example.shared), *lengths])
        ids = np.concatenate([example.shared, *example.suffixes])
        self.append(ids, _positions(len(example.shared), lengths), parts)


class _Padded(_Rows):
    def add(self, example: Example) -> None:
        self.targets.add_record(example)
        for row, scored in _separate(example):
            self.targets.add_response(self.targets.predict(scored - 1, row[scored]))
            self.append(row, np.arange(len(row)), np.full(len(row), PROMPT))


_BUILDERS: dict[Layout, Callable[[], _Shared | _Masked | _Packed | _Padded]] = {
    "shared": _Shared,
    "masked": _Masked,
    "packed": _Packed,
    "padded": _Padded,
}


def _separate(example: Example) -> Iterator[tuple[Ints, Ints]]:
    """Each response after a prompt of its own, and where its scored tokens stand."""
    for suffix, flags in zip(example.suffixes, example.suffixes_scored, strict=True):
        yield np.concatenate([example.shared, suffix]), np.flatnonzero(np.concatenate([example.shared_scored, flags]))


def _positions(shared: int, lengths: Sequence[int]) -> Ints:
    return np.concatenate([np.arange(shared), *(np.arange(shared, shared + length) for length in lengths)])


def _join(arrays: Sequence[Ints]) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays).astype(np.int64, copy=False))

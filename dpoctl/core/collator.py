"""Collating examples into a batch, in each of the layouts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpoctl.core.batch import Batch, outline_of
from dpoctl.data.tokenize import Example
from dpoctl.model.attention import FLAT, PADDING, PROMPT, Layout, Segments

Ints = NDArray[np.int64]
Collate = Callable[..., Batch]
"""`collate`, or a user's function of the same arguments."""


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
        layout: the arrangement of their tokens; see `dpoctl.model.attention`.
        pad_token_id: fills rows of a padded layout; masked, so its value changes nothing.
        ref_logps: `[R]`, reference log-probabilities of all responses in order.
        is_filler: the batch only keeps ranks in step.
    """
    # A row is a prefix, and the suffixes that each continue it: a record, or each of its responses by itself.
    shares = layout in ("shared", "masked")
    rows = list(examples) if shares else [row for example in examples for row in _separate(example)]
    lengths = np.array([len(row.shared) + sum(map(len, row.suffixes)) for row in rows])
    if layout in FLAT:
        starts = lengths.cumsum() - lengths
        tokens = _one_row(rows, starts)
    else:
        starts = np.arange(len(rows)) * lengths.max()
        tokens = _padded_rows(rows, lengths, layout, pad_token_id)
    score_pos, score_tgt, token_index = _targets(rows, starts)
    return Batch(
        **tokens,
        score_pos=_join(score_pos),
        score_tgt=_join(score_tgt),
        token_index=_join(token_index),
        outline=outline_of(
            num_tokens=[len(numbers) for numbers in token_index],
            sizes=[len(example.suffixes) for example in examples],
            pairs=[example.pairs for example in examples],
            labels=[example.label for example in examples],
            targets=[example.target for example in examples],
            sources=[example.source for example in examples],
        ),
        ref_logps=None if ref_logps is None else torch.from_numpy(ref_logps),
        is_filler=is_filler,
    )


def _separate(example: Example) -> Iterator[Example]:
    """Each response with a copy of its prompt, as a row without a shared prefix."""
    for suffix, flags in zip(example.suffixes, example.suffixes_scored, strict=True):
        ids, scored = np.concatenate([example.shared, suffix]), np.concatenate([example.shared_scored, flags])
        yield replace(example, shared=ids[:0], shared_scored=scored[:0], suffixes=(ids,), suffixes_scored=(scored,))


def _one_row(rows: Sequence[Example], starts: Ints) -> dict[str, Any]:
    """The model's inputs in a flat layout."""
    segments = [
        (start, len(row.shared), tuple(map(len, row.suffixes)))
        for start, row in zip(starts.tolist(), rows, strict=True)
    ]
    return {
        "input_ids": _join([part for row in rows for part in (row.shared, *row.suffixes)])[None],
        "position_ids": _join([_positions(row) for row in rows])[None],
        "attention_mask": None,
        "segments": Segments(tuple(segments)),
    }


def _padded_rows(rows: Sequence[Example], lengths: Ints, layout: Layout, pad_token_id: int) -> dict[str, Any]:
    """The model's inputs in a layout of rows that are padded to the longest."""
    shape = len(rows), int(lengths.max())
    ids, positions, mask = (np.full(shape, fill, dtype=np.int64) for fill in (pad_token_id, 0, PADDING))
    for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        parts = [len(row.shared), *map(len, row.suffixes)]
        ids[number, :length] = np.concatenate([row.shared, *row.suffixes])
        positions[number, :length] = _positions(row)
        mask[number, :length] = (
            np.repeat(np.arange(PROMPT, PROMPT + len(parts)), parts) if layout == "masked" else PROMPT
        )
    return {
        "input_ids": torch.from_numpy(ids),
        "position_ids": torch.from_numpy(positions),
        "attention_mask": torch.from_numpy(mask),
        "segments": None,
    }


def _positions(row: Example) -> Ints:
    first = len(row.shared)
    return np.concatenate([np.arange(first), *(np.arange(first, first + len(suffix)) for suffix in row.suffixes)])


def _targets(rows: Sequence[Example], starts: Ints) -> tuple[list[Ints], list[Ints], list[Ints]]:
    """The places that predict a token and the tokens they must predict, both in pieces, and `token_index` by response.

    Args:
        rows: the rows.
        starts: the place of each row's first token in the flattened batch.
    """
    places: list[Ints] = []
    tokens: list[Ints] = []
    responses: list[Ints] = []
    count = 0

    def predict(at: Ints, ids: Ints) -> Ints:
        nonlocal count
        places.append(at)
        tokens.append(ids)
        count += len(at)
        return np.arange(count - len(at), count)

    for row, start in zip(rows, starts, strict=True):
        scored = np.flatnonzero(row.shared_scored)
        common = predict(start + scored - 1, row.shared[scored])
        last = start + len(row.shared) - 1
        first = last + 1
        for suffix, flags in zip(row.suffixes, row.suffixes_scored, strict=True):
            scored = np.flatnonzero(flags)
            # The last shared token predicts the first token of every suffix, wherever that suffix is.
            own = predict(np.where(scored == 0, last, first + scored - 1), suffix[scored])
            responses.append(np.concatenate([common, own]))
            first += len(suffix)
    return places, tokens, responses


def _join(arrays: Sequence[Ints]) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays).astype(np.int64, copy=False))

"""A batch: the tokens of one forward, and the rows that predict the scored tokens of its responses."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from dpoctl.losses import Outline
from dpoctl.model.attention import PADDING, Segments
from dpoctl.model.memory import to_device


@dataclass(frozen=True)
class Batch:
    """One micro-batch on one rank.

    A flat layout holds everything in one row of T tokens without padding: `shared` is `S A B | S A B ...`, `packed` is
    `S A | S B | ...`. The others have rows of L tokens: `masked` one, `S A B`, for each of the G records, `padded` one
    for each of the R responses. N rows predict a scored token. In a layout that shares prompts, a token common to all
    responses of a record is predicted once and counts for each of them, so the responses together have N' >= N
    entries, one response after another.

    Attributes:
        input_ids: `[1, T]`, `[G, L]` or `[R, L]`.
        position_ids: like `input_ids`.
        attention_mask: like `input_ids`, 0 for padding and 1 for tokens, or `None` in a flat layout; in the masked one
            answers count on from 2, see `dpoctl.model.attention`.
        segments: the place of each record in a flat layout, else `None`.
        score_pos: `[N]`, rows that predict, counted over the flattened batch.
        score_tgt: `[N]`, the token that each of them must predict.
        token_index: `[N']`, into the N predicted tokens, response by response.
        outline: lengths, pairs and records of the responses.
        ref_logps: `[R]` float32, or `None`.
        ref_head_logps: `[R]` float32, or `None`; see `Scores`.
        is_filler: the batch keeps ranks in step and counts for nothing.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    segments: Segments | None
    score_pos: Tensor
    score_tgt: Tensor
    token_index: Tensor
    outline: Outline
    ref_logps: Tensor | None = None
    ref_head_logps: Tensor | None = None
    is_filler: bool = False

    def to(self, device: torch.device) -> Self:
        """Return the batch with its tensors on a device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {
            name: to_device(value, device) for name, value in values.items() if isinstance(value, Tensor)
        }
        segments = None if self.segments is None else self.segments.to(device)
        outline = self.outline.map(lambda column: to_device(column, device))
        return replace(self, outline=outline, segments=segments, **moved)

    def row_lengths(self) -> Tensor:
        """Return the number of tokens of the record or response that each token belongs to, float32.

        Its shape is that of `input_ids`, or `[rows, 1]` in a layout with padding.
        """
        if self.segments is None:
            assert self.attention_mask is not None
            return (self.attention_mask != PADDING).sum(1, keepdim=True).float()
        sizes = torch.tensor([shared + sum(suffixes) for _, shared, suffixes in self.segments.records])
        return to_device(sizes.repeat_interleave(sizes)[None].float(), self.input_ids.device)

    def row_numbers(self) -> tuple[Tensor, int]:
        """Return `[T]`, the number of the record or response of each token of the flattened batch, and their count.

        Padding has the count as its number.
        """
        if self.segments is None:
            assert self.attention_mask is not None
            count = len(self.attention_mask)
            numbers = torch.arange(count, device=self.input_ids.device)[:, None].expand_as(self.attention_mask)
            return torch.where(self.attention_mask != PADDING, numbers, count).flatten(), count
        sizes = torch.tensor([shared + sum(suffixes) for _, shared, suffixes in self.segments.records])
        return to_device(torch.arange(len(sizes)).repeat_interleave(sizes), self.input_ids.device), len(sizes)

    def sum_per_response(self, token_logps: Tensor, kept: Tensor | None = None) -> Tensor:
        """Return `[R]` summed log-probabilities from those of the N predicted tokens.

        Args:
            token_logps: `[N]`.
            kept: `[N']`, whether an entry of the responses counts; all by default.
        """
        entries = token_logps[self.token_index]
        if kept is not None:
            entries = torch.where(kept, entries, 0.0)
        # The tokens of a response are consecutive, so no scattered additions are needed: their order is fixed.
        return torch.segment_reduce(entries, "sum", lengths=self.outline.num_tokens, unsafe=True)


def outline_of(
    *,
    num_tokens: ArrayLike,
    sizes: ArrayLike,
    pairs: Sequence[NDArray[Any]],
    labels: ArrayLike,
    targets: ArrayLike,
    sources: ArrayLike,
) -> Outline:
    """Join the columns of several records, whose pairs and targets are counted within each record.

    Args:
        num_tokens: `[R]`, scored tokens of each response.
        sizes: `[G]`, responses of each record.
        pairs: `[M_g, 2]` for each record.
        labels: `[G]`.
        targets: `[G]`, -1 for none.
        sources: `[G]`.
    """
    starts = np.concatenate([[0], np.cumsum(sizes)])
    absolute = np.where(np.less(targets, 0), -1, np.add(targets, starts[:-1]))
    columns = {
        "num_tokens": num_tokens,
        "pairs": np.concatenate([own.reshape(-1, 2) + start for own, start in zip(pairs, starts[:-1], strict=True)]),
        "starts": starts,
        "labels": labels,
        "targets": absolute,
        "sources": sources,
        "imitated": absolute[absolute >= 0],
    }
    return Outline(**{name: torch.from_numpy(np.asarray(values, dtype=np.int64)) for name, values in columns.items()})

"""A batch: what one forward needs, and which of its rows predict which tokens of which responses."""

from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from dpoctl.model.attention import Segments


@dataclass(frozen=True)
class Batch:
    """One micro-batch on one rank.

    A flat layout holds everything in one row of T tokens without padding: `shared` is `S A B | S A B ...`, `packed` is
    `S A | S B | ...`. The others have rows of L tokens: `masked` one, `S A B`, for each of the G records, `padded` one
    for each of the R responses. N rows predict a scored token. Where prompts are shared, a token that all responses of
    a record share is predicted once and counts for each of them, so N' >= N entries make up the responses, one after
    another.

    Attributes:
        input_ids: `[1, T]`, `[G, L]` or `[R, L]`.
        position_ids: like `input_ids`.
        attention_mask: like `input_ids`, 0 for padding and 1 for tokens, or `None` in a flat layout; in the masked one
            answers count on from 2, see `dpoctl.model.layouts`.
        segments: where the records stand in a flat layout, else `None`.
        score_pos: `[N]`, rows that predict, counted over the flattened batch.
        score_tgt: `[N]`, the token each of them must predict.
        token_index: `[N']`, into the N predicted tokens, response by response.
        num_tokens: `[R]`, scored tokens of each response.
        pairs: `[M, 2]`, (winner, loser) among the responses.
        starts: `[G + 1]`, where the responses of each record start, and R.
        labels: `[G]`, 1 where a record's response is desirable, 0 where it is not, -1 where nobody said.
        targets: `[G]`, the response that a record wants imitated, among all R; -1 for none.
        sources: `[G]`, number of the data source of each record.
        ref_logps: `[R]` float32, or `None`.
        ref_head_logps: `[R]` float32, or `None`; see `Scores`.
        is_filler: a batch that keeps ranks in step and counts for nothing.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    segments: Segments | None
    score_pos: Tensor
    score_tgt: Tensor
    token_index: Tensor
    num_tokens: Tensor
    pairs: Tensor
    starts: Tensor
    labels: Tensor
    targets: Tensor
    sources: Tensor
    ref_logps: Tensor | None = None
    ref_head_logps: Tensor | None = None
    is_filler: bool = False

    def to(self, device: torch.device) -> Self:
        """Return the batch with its tensors on a device."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in values.items() if isinstance(value, Tensor)
        }
        segments = None if self.segments is None else self.segments.to(device)
        return replace(self, segments=segments, **moved)

    def sum_per_response(self, token_logps: Tensor) -> Tensor:
        """Return `[R]` summed log-probabilities from those of the N predicted tokens."""
        # The tokens of a response stand together, so no scattered additions are needed: their order is fixed.
        return torch.segment_reduce(token_logps[self.token_index], "sum", lengths=self.num_tokens, unsafe=True)

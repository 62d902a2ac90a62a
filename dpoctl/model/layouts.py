"""The ways a micro-batch lies in memory, and what a model's forward must be told of each.

`shared`: one row of tokens, a prompt once for all its answers, under our own attention.
`masked`: a row for each record, its prompt once, under a dense mask; for attention that cannot be replaced.
`packed`: one row of tokens, each answer after a prompt of its own; for layers that carry state and whose kernels
start afresh where they are told to.
`padded`: a row for each answer, as any model takes it.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dpoctl.model.attention import Segments

Layout = Literal["shared", "masked", "packed", "padded"]
# Layouts that stand in one row and go through our own attention.
FLAT: frozenset[Layout] = frozenset({"shared", "packed"})
# Numbers of the parts of a row; answers count on from the second.
PADDING, PROMPT = 0, 1


def placement(
    layout: Layout, segments: Segments | None, parts: Tensor | None, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Return the arguments of a forward that say who sees whom.

    Args:
        layout: of the batch.
        segments: of the records, in a layout of one row.
        parts: `[rows, L]`, which part of its record each column is, in the others.
        device: of the batch.
        dtype: of the model.
    """
    if segments is not None:
        return {"layout": segments} | (_restarts(segments, device) if layout == "packed" else {})
    assert parts is not None
    return {"attention_mask": _dense_mask(parts, dtype) if layout == "masked" else parts}


def _dense_mask(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """`[rows, 1, L, L]`, what is added to attention scores: each answer sees its prompt and itself, causally."""
    seen = (parts[:, :, None] == parts[:, None, :]) | (parts[:, None, :] == PROMPT)
    hidden = ~seen.tril()[:, None]
    return torch.zeros(hidden.shape, dtype=dtype, device=parts.device).masked_fill_(hidden, torch.finfo(dtype).min)


def _restarts(segments: Segments, device: torch.device) -> dict[str, Any]:
    """What tells kernels that carry state where they start afresh, in the two spellings that there are."""
    lengths = torch.tensor(segments.query_lengths)
    numbers = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), lengths)
    starts = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    return {
        "cu_seq_lens_q": starts.to(device, non_blocking=True),
        "seq_idx": numbers[None].to(device, non_blocking=True),
    }

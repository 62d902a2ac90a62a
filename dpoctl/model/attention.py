"""Shared-prefix attention, and the layouts of a micro-batch.

The keys and values of a prompt are computed once and used by all its responses. A flat batch holds its tokens record by
record, `S A B ...`: a shared prefix, then one suffix for each response. A suffix attends causally to the prefix and to
itself, never to another suffix or another record. `shared_prefix_attention` is registered with transformers'
`AttentionInterface`, so no model code changes; the segments are passed as a keyword argument of the forward.

`shared`: one row of tokens, each prompt once for all its responses, under `shared_prefix_attention`.
`masked`: one row for each record, its prompt once, under a dense mask; for models whose attention cannot be replaced.
`packed`: one row of tokens, each response after a copy of its prompt; for layers that carry state, if their kernels
reset it at the start of each sequence.
`padded`: one row for each response, as every model takes it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from dpoctl.model import attention_cpu, attention_cuda
from dpoctl.model.attention_cuda import GatheredKeys, find_kernel, repeat_kv
from dpoctl.model.memory import device_kind, to_device

SHARED_PREFIX = "dpoctl_shared_prefix"
Layout = Literal["shared", "masked", "packed", "padded"]
# Layouts of one row, which run under `shared_prefix_attention`.
FLAT: frozenset[Layout] = frozenset({"shared", "packed"})
# Numbers of the parts of a row; the responses are numbered from 2.
PADDING, PROMPT = 0, 1


@dataclass(frozen=True)
class Segments:
    """Positions of the records in a flat batch.

    Attributes:
        records: for each record its first token, the length of its shared prefix, the lengths of its suffixes.
        keys: index of the keys of each response, on the device of the kernel; `None` without a kernel.
    """

    records: tuple[tuple[int, int, tuple[int, ...]], ...]
    keys: GatheredKeys | None = None

    @cached_property
    def query_lengths(self) -> list[int]:
        """Number of queries of each response; the first response of a record includes the shared prefix."""
        return [
            shared * (number == 0) + suffix
            for _, shared, suffixes in self.records
            for number, suffix in enumerate(suffixes)
        ]

    @cached_property
    def key_lengths(self) -> list[int]:
        """Length of each shared prefix, if there is one, and of each suffix."""
        return [size for _, shared, suffixes in self.records for size in ((shared, *suffixes) if shared else suffixes)]

    def fits_window(self, window: int | None) -> bool:
        """Whether no response is longer than a sliding window."""
        return window is None or all(shared + max(suffixes) <= window for _, shared, suffixes in self.records)

    def to(self, device: torch.device) -> "Segments":
        """Return the segments with the index that the kernels of a device need."""
        if device_kind(device) != "cuda" or self.keys is not None:
            return self
        return replace(self, keys=GatheredKeys.of(self.records).to(device))


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    layout: Segments | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within records: with a variable-length kernel, with the CPU implementation, or response by response.

    Args:
        module: the attention layer that calls.
        query: `[1, heads, T, d]`.
        key: `[1, kv_heads, T, d]`.
        value: `[1, kv_heads, T, d]`.
        attention_mask: must be `None`; `layout` takes its place.
        scaling: factor on the scores; 1 / sqrt(d) by default.
        dropout: probability that an attention weight is dropped.
        sliding_window: number of positions that a token attends to, itself included.
        softcap: scores become `softcap * tanh(score / softcap)`.
        s_aux: `[heads]`, attention sinks.
        layout: the records of this batch.
        kwargs: further arguments of transformers, ignored.

    Returns:
        `[1, T, heads, d]`, and no attention weights.
    """
    if layout is None or attention_mask is not None:
        raise RuntimeError("shared-prefix attention needs the segments of a flat batch and no attention mask")
    if torch.is_autocast_enabled(query.device.type):
        # Rotary embeddings in float32 make queries and keys wider than values; kernels need one dtype.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    attend = _SegmentAttention(scaling, dropout, sliding_window, softcap, s_aux)
    kernel = find_kernel(query, value, attend.is_plain)
    if kernel is not None and layout.keys is not None:
        out = attention_cuda.attend(query, key, value, layout.keys, kernel, scaling=scaling, window=sliding_window)
        return out, None
    if attend.is_plain and attention_cpu.supports(query, key, value) and layout.fits_window(sliding_window):
        return attention_cpu.attend(query, key, value, layout.records, scaling), None
    key, value = repeat_kv(key, query), repeat_kv(value, query)
    # Split once: the backward of each slice would fill and add a tensor of full size.
    queries = iter(query.split(layout.query_lengths, dim=2))
    keys, values = (iter(t.split(layout.key_lengths, dim=2)) for t in (key, value))
    outputs = []
    for _, shared, suffixes in layout.records:
        prefix = (next(keys), next(values)) if shared else None
        for _ in suffixes:
            own = (next(keys), next(values))
            both = own if prefix is None else tuple(torch.cat(parts, dim=2) for parts in zip(prefix, own, strict=True))
            outputs.append(attend(next(queries), *both).transpose(1, 2))
    return torch.cat(outputs, dim=1), None


@contextmanager
def use_attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Run a model with another attention implementation, and restore its own afterwards."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def attention_arguments(
    layout: Layout, segments: Segments | None, parts: Tensor | None, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Return the arguments of a model's forward that define which tokens attend to which.

    Args:
        layout: of the batch.
        segments: of the batch, in a layout of one row.
        parts: `[rows, L]`, the part of its record that each token belongs to, in the other layouts.
        device: of the batch.
        dtype: of the model.
    """
    if segments is not None:
        return {"layout": segments} | (_sequence_starts(segments, device) if layout == "packed" else {})
    assert parts is not None
    return {"attention_mask": _dense_mask(parts, dtype) if layout == "masked" else parts}


@dataclass(frozen=True)
class _SegmentAttention:
    """Causal attention of the last tokens of one sequence over the whole sequence."""

    scaling: float | None
    dropout: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None

    @property
    def is_plain(self) -> bool:
        """Whether this is a softmax of the scores alone: no soft cap, no sinks, no dropout."""
        return self.softcap is None and self.sinks is None and self.dropout == 0.0

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        queries, keys = query.shape[2], key.shape[2]
        windowed = self.window is not None and keys > self.window
        if self.softcap is not None or self.sinks is not None:
            return self._explicit(query, key, value, self._mask(queries, keys, query.device))
        if queries == keys and not windowed:
            return F.scaled_dot_product_attention(
                query, key, value, dropout_p=self.dropout, is_causal=True, scale=self.scaling
            )
        mask = self._mask(queries, keys, query.device)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=self.dropout, scale=self.scaling
        )

    def _mask(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """Return `[queries, keys]`, true where a query attends to a key; both end at the same position."""
        distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
        mask = distance >= 0
        return mask if self.window is None else mask & (distance < self.window)

    def _explicit(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """Compute the softmax explicitly, for transforms of the scores that SDPA lacks."""
        scores = query @ key.transpose(2, 3) * (self.scaling or query.shape[-1] ** -0.5)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        scores = scores.float().masked_fill(~mask, float("-inf"))
        if self.sinks is not None:
            sinks = self.sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        weights = F.dropout(weights.to(query.dtype), self.dropout)
        return weights @ value


# transformers looks attention up by name in this registry, and a model is given the name only, so registration is part
# of the import. No mask function is registered: transformers then builds no mask.
AttentionInterface.register(SHARED_PREFIX, shared_prefix_attention)


def _dense_mask(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the additive mask `[rows, 1, L, L]`: each response attends causally to its prompt and to itself."""
    visible = (parts[:, :, None] == parts[:, None, :]) | (parts[:, None, :] == PROMPT)
    hidden = ~visible.tril()[:, None]
    return torch.zeros(hidden.shape, dtype=dtype, device=parts.device).masked_fill_(hidden, torch.finfo(dtype).min)


def _sequence_starts(segments: Segments, device: torch.device) -> dict[str, Any]:
    """Return the two arguments by which kernels that carry state learn where a sequence starts."""
    lengths = torch.tensor(segments.query_lengths)
    numbers = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), lengths)
    starts = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    return {
        "cu_seq_lens_q": to_device(starts, device),
        "seq_idx": to_device(numbers[None], device),
    }

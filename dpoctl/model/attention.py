"""Shared-prefix attention: a prompt's keys and values are computed once and seen by all of its answers.

Rows of a flat batch stand in records, `S A B ...`: a shared prefix and one suffix for each response. A suffix sees
the shared rows and its own, causally, and never its siblings or another record. The function below enters through
transformers' `AttentionInterface`, so no model code is touched; the layout travels as a keyword of the forward.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from dpoctl.model import cpu_attention
from dpoctl.model.grouped import for_all_heads
from dpoctl.model.varlen import GatheredKeys, find_varlen

SHARED_PREFIX = "dpoctl_shared_prefix"


@dataclass(frozen=True)
class Segments:
    """Where the records of a flat batch stand.

    Attributes:
        records: for each record its first row, the length of its shared prefix, the lengths of its suffixes.
        keys: where a kernel finds the keys of each response, on its device; `None` where segments are looped over.
    """

    records: tuple[tuple[int, int, tuple[int, ...]], ...]
    keys: GatheredKeys | None = None

    @cached_property
    def query_lengths(self) -> list[int]:
        """Rows of each response in turn; those of the first one begin with the shared prefix."""
        return [
            shared * (number == 0) + suffix
            for _, shared, suffixes in self.records
            for number, suffix in enumerate(suffixes)
        ]

    @cached_property
    def key_lengths(self) -> list[int]:
        """Rows of each prefix, where there is one, and each suffix in turn."""
        return [rows for _, shared, suffixes in self.records for rows in ((shared, *suffixes) if shared else suffixes)]

    def fits(self, window: int | None) -> bool:
        """Whether a sliding window hides nothing of any response."""
        return window is None or all(shared + max(suffixes) <= window for _, shared, suffixes in self.records)

    def to(self, device: torch.device) -> "Segments":
        """Return the segments with what the kernels of a device need."""
        if device.type != "cuda" or self.keys is not None:
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
    """Attend within records: in one call of a kernel for uneven lengths, in one step on a CPU, or response by response.

    Args:
        module: the attention layer that calls.
        query: `[1, heads, T, d]`.
        key: `[1, kv_heads, T, d]`.
        value: `[1, kv_heads, T, d]`.
        attention_mask: must be `None`: the layout says who sees whom.
        scaling: factor on the scores; one over the root of d when absent.
        dropout: probability that an attention weight is dropped.
        sliding_window: how many positions back a token sees, itself included.
        softcap: scores pass `softcap * tanh(score / softcap)`.
        s_aux: `[heads]`, attention sinks.
        layout: the records of this batch.
        kwargs: what transformers passes besides, not needed here.

    Returns:
        `[1, T, heads, d]`, and no attention weights.
    """
    if layout is None or attention_mask is not None:
        raise RuntimeError("shared-prefix attention needs the layout of a flat batch, and no mask")
    attend = _Attend(scaling, dropout, sliding_window, softcap, s_aux)
    varlen = find_varlen(query, attend.plain, sliding_window)
    if varlen is not None and layout.keys is not None:
        return varlen(query, key, value, layout.keys, scaling=scaling, window=sliding_window), None
    if attend.plain and cpu_attention.takes(query, key, value) and layout.fits(sliding_window):
        return cpu_attention.attend(query, key, value, layout.records, scaling), None
    key, value = for_all_heads(key, query), for_all_heads(value, query)
    # Cut in one go: the backward of many slices would fill and add a whole tensor for each of them.
    queries = iter(query.split(layout.query_lengths, dim=2))
    keys, values = (iter(t.split(layout.key_lengths, dim=2)) for t in (key, value))
    outputs = []
    for _, shared, suffixes in layout.records:
        prefix = (next(keys), next(values)) if shared else None
        for _ in suffixes:
            own = (next(keys), next(values))
            seen = own if prefix is None else tuple(torch.cat(parts, dim=2) for parts in zip(prefix, own, strict=True))
            outputs.append(attend(next(queries), *seen).transpose(1, 2))
    return torch.cat(outputs, dim=1), None


@dataclass(frozen=True)
class _Attend:
    """Causal attention of the last rows of one sequence over all of it."""

    scaling: float | None
    dropout: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None

    @property
    def plain(self) -> bool:
        """Whether scores go into the softmax as they are, and all weights out of it."""
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
        """`[queries, keys]`, true where a query sees a key; both end at the same position."""
        distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
        mask = distance >= 0
        return mask if self.window is None else mask & (distance < self.window)

    def _explicit(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """Spell the softmax out, for score transforms that SDPA does not offer."""
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


# Registered as an attention but not as a mask: for an unknown name transformers builds no mask at all.
AttentionInterface.register(SHARED_PREFIX, shared_prefix_attention)


@contextmanager
def attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Run a model with another attention implementation, and set its own back afterwards."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)

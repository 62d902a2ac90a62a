"""Shared-prefix attention on a CPU, as one autograd function over all records of a batch.

torch's flash kernel for CPUs computes causal attention and full attention. A prompt with its first response is one
causal block, and each further response is another. Further responses attend to the whole prompt: that is a second
call, whose output o' and log-sum-exp l' of the scores are merged with those of the block,

    w = e^l' / (e^l + e^l'),    o <- (1 - w) o + w o',    l <- log(e^l + e^l').

Given the merged o and l, the kernel's backward returns each call's part of the gradients. So nothing is masked, no key
is copied, and no score is computed that is not used.
"""

from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
from torch import Tensor

from dpoctl.model.attention_cuda import Records, repeat_kv, sum_kv_groups
from dpoctl.model.memory import device_kind

Index = tuple[slice, slice, slice]

# Private operators of torch: a release may lack them.
_forward: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_backward: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


def supports(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernel exists and takes these tensors without a cast."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    alike = query.dtype == key.dtype == value.dtype == dtype and query.shape[-1] == value.shape[-1]
    return alike and device_kind(query.device) == "cpu" and _forward is not None and _backward is not None


def attend(query: Tensor, key: Tensor, value: Tensor, records: Records, scaling: float | None) -> Tensor:
    """Attend within records.

    Args:
        query: `[1, heads, T, d]`.
        key: `[1, kv_heads, T, d]`.
        value: like `key`.
        records: see `dpoctl.model.attention.Segments`.
        scaling: factor on the scores; 1 / sqrt(d) by default.

    Returns:
        `[1, T, heads, d]`.
    """
    out: Tensor = cast(Any, _Attention).apply(query, key, value, records, scaling)
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, records: Records, scaling: float | None) -> Tensor:
        out, keys, values = _empty_like(query), repeat_kv(key, query), repeat_kv(value, query)
        logsumexp = query.new_empty(query.shape[:-1], dtype=torch.promote_types(query.dtype, torch.float32))
        for block in _causal_blocks(records):
            out[block], logsumexp[block] = _forward(query[block], keys[block], values[block], 0.0, True, scale=scaling)
        for rest, prefix in _prefix_blocks(records):
            other, scores = _forward(query[rest], keys[prefix], values[prefix], 0.0, False, scale=scaling)
            weight = torch.sigmoid(scores - logsumexp[rest])[..., None]
            out[rest] = torch.lerp(out[rest].to(weight.dtype), other.to(weight.dtype), weight)
            logsumexp[rest] = torch.logaddexp(logsumexp[rest], scores)
        ctx.records, ctx.scaling = records, scaling
        ctx.save_for_backward(query, key, value, out, logsumexp)
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, logsumexp = ctx.saved_tensors
        keys, values, upstream = repeat_kv(key, query), repeat_kv(value, query), upstream.transpose(1, 2)
        totals = [_empty_like(query) for _ in range(3)]
        # The causal blocks come first: they cover every token, so they fill the totals, and the others add to them.
        for own, seen, causal in (
            *((block, block, True) for block in _causal_blocks(ctx.records)),
            *((rest, prefix, False) for rest, prefix in _prefix_blocks(ctx.records)),
        ):
            gradients = _backward(
                *(upstream[own], query[own], keys[seen], values[seen], out[own], logsumexp[own], 0.0, causal),
                scale=ctx.scaling,
            )
            for total, index, gradient in zip(totals, (own, seen, seen), gradients, strict=True):
                total[index] = gradient if causal else total[index] + gradient
        return totals[0], sum_kv_groups(totals[1], key), sum_kv_groups(totals[2], value), None, None


def _causal_blocks(records: Records) -> Iterator[Index]:
    """Yield the causal blocks: each prompt with its first response, and each further response."""
    for start, shared, suffixes in records:
        ends = accumulate(suffixes, initial=start + shared)
        for number, (first, end) in enumerate(pairwise(ends)):
            yield _index(first if number else start, end)


def _prefix_blocks(records: Records) -> Iterator[tuple[Index, Index]]:
    """Yield the tokens of further responses, and those of the prompt that they attend to."""
    for start, shared, suffixes in records:
        if shared and len(suffixes) > 1:
            first = start + shared
            yield _index(first + suffixes[0], first + sum(suffixes)), _index(start, first)


def _index(first: int, end: int) -> Index:
    return slice(None), slice(None), slice(first, end)


def _empty_like(query: Tensor) -> Tensor:
    """Return `[1, heads, T, d]` with the memory order of `[1, T, heads, d]`, as the layers around attention have it."""
    _, heads, tokens, width = query.shape
    return query.new_empty(1, tokens, heads, width).transpose(1, 2)

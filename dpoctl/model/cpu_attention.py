"""Shared-prefix attention on a CPU, as one step of autograd over all records of a batch.

torch's flash kernel for CPUs knows causal attention and full attention. A prompt with its first answer is one causal
block, every further answer another. What a further answer sees of the prompt it sees in full: that is a second call,
whose output o' and l' = log sum exp of its scores join those of the block,

    w = e^l' / (e^l + e^l'),    o <- (1 - w) o + w o',    l <- log(e^l + e^l'),

and the kernel's backward, given this o and this l, returns the share that each call has in the gradients. So nothing is
masked, no key is copied, and nothing is computed that no query sees.
"""

from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
from torch import Tensor

from dpoctl.model.grouped import for_all_heads, of_each_head
from dpoctl.model.varlen import Records

Rows = tuple[slice, slice, slice]

# torch promises neither name.
_forward: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_backward: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


def takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether there is a kernel, and it takes these tensors as they are."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    alike = query.dtype == key.dtype == value.dtype == dtype and query.shape[-1] == value.shape[-1]
    return alike and query.device.type == "cpu" and _forward is not None and _backward is not None


def attend(query: Tensor, key: Tensor, value: Tensor, records: Records, scaling: float | None) -> Tensor:
    """Attend within records.

    Args:
        query: `[1, heads, T, d]`.
        key: `[1, kv_heads, T, d]`.
        value: like `key`.
        records: for each its first row, the length of its shared prefix, the lengths of its suffixes.
        scaling: factor on the scores; one over the root of d when absent.

    Returns:
        `[1, T, heads, d]`.
    """
    out: Tensor = cast(Any, _Attention).apply(query, key, value, records, scaling)
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, records: Records, scaling: float | None) -> Tensor:
        out, keys, values = _empty_like(query), for_all_heads(key, query), for_all_heads(value, query)
        sums = query.new_empty(query.shape[:-1], dtype=torch.promote_types(query.dtype, torch.float32))
        for block in _blocks(records):
            out[block], sums[block] = _forward(query[block], keys[block], values[block], 0.0, True, scale=scaling)
        for rows, prefix in _crossings(records):
            found, scores = _forward(query[rows], keys[prefix], values[prefix], 0.0, False, scale=scaling)
            weight = torch.sigmoid(scores - sums[rows])[..., None]
            out[rows] = torch.lerp(out[rows].to(weight.dtype), found.to(weight.dtype), weight)
            sums[rows] = torch.logaddexp(sums[rows], scores)
        ctx.records, ctx.scaling = records, scaling
        ctx.save_for_backward(query, key, value, out, sums)
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, sums = ctx.saved_tensors
        keys, values, pulled = for_all_heads(key, query), for_all_heads(value, query), upstream.transpose(1, 2)
        to_query, to_keys, to_values = (_empty_like(query) for _ in range(3))
        for own, seen, causal in (
            *((block, block, True) for block in _blocks(ctx.records)),
            *((rows, prefix, False) for rows, prefix in _crossings(ctx.records)),
        ):
            shares = _backward(
                *(pulled[own], query[own], keys[seen], values[seen], out[own], sums[own], 0.0, causal),
                scale=ctx.scaling,
            )
            for total, at, share in zip((to_query, to_keys, to_values), (own, seen, seen), shares, strict=True):
                # The blocks come first, and every row is in one of them.
                total[at] = share if causal else total[at] + share
        return to_query, of_each_head(to_keys, key), of_each_head(to_values, value), None, None


def _blocks(records: Records) -> Iterator[Rows]:
    """Rows that attend to themselves causally: each prompt with its first answer, each further answer."""
    for start, shared, suffixes in records:
        ends = accumulate(suffixes, initial=start + shared)
        for number, (first, end) in enumerate(pairwise(ends)):
            yield _rows(first if number else start, end)


def _crossings(records: Records) -> Iterator[tuple[Rows, Rows]]:
    """Rows of further answers, and those of the prompt that they see besides."""
    for start, shared, suffixes in records:
        if shared and len(suffixes) > 1:
            answers = start + shared
            yield _rows(answers + suffixes[0], answers + sum(suffixes)), _rows(start, answers)


def _rows(first: int, end: int) -> Rows:
    return slice(None), slice(None), slice(first, end)


def _empty_like(query: Tensor) -> Tensor:
    """`[1, heads, T, d]` with the heads inside the rows, as the layers around the attention have it."""
    _, heads, rows, width = query.shape
    return query.new_empty(1, rows, heads, width).transpose(1, 2)

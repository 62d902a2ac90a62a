"""Attention over sequences of different lengths with one variable-length (varlen) kernel call on a GPU.

Queries stay in place. Keys and values are gathered so that each response has the shared prefix before its own tokens.
A causal kernel aligns the last query with the last key, so distances between gathered keys are distances between
positions, and sliding windows need no mask. Heads are dimension 1; in grouped-query attention several query heads share
one head of keys and values.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from inspect import signature
from typing import Any, Self, cast

import numpy as np
import torch
from torch import Tensor

from dpoctl import console
from dpoctl.model.memory import device_kind, to_device

# For each record its first token, the length of its shared prefix, the lengths of its suffixes.
Records = Sequence[tuple[int, int, tuple[int, ...]]]
# Limits of the kernels: the head size, its divisor, and the compute capability (Ampere).
MAX_HEAD_SIZE = 256
HEAD_SIZE_MULTIPLE = 8
MIN_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class GatheredKeys:
    """Index of the keys of each response in a flat batch of T tokens.

    Attributes:
        query_starts: int32 `[responses + 1]`, first query of each response, and T.
        key_starts: int32 `[responses + 1]`, first gathered key of each response, and their number.
        longest_query: largest number of queries of a response.
        longest_key: largest number of keys of a response.
        tokens: int64 `[keys]`, the token of each gathered key.
        first: int64 `[T]`, the first gathered key of each token.
        repeats: one entry for all second responses of the batch, one for all third ones and so on: tokens of the shared
            prefixes, and the gathered keys that are copies of them.
    """

    query_starts: Tensor
    key_starts: Tensor
    longest_query: int
    longest_key: int
    tokens: Tensor
    first: Tensor
    repeats: tuple[tuple[Tensor, Tensor], ...]

    @classmethod
    def of(cls, records: Records) -> Self:
        """Build the index for the records of a batch."""
        queries: list[int] = []
        tokens: list[np.ndarray[Any, Any]] = []
        repeats: dict[int, list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]] = {}
        gathered = 0
        for start, shared, suffixes in records:
            prefix, own = np.arange(start, start + shared), start + shared
            for number, length in enumerate(suffixes):
                queries.append(length if number else shared + length)
                if number:
                    repeats.setdefault(number, []).append((prefix, np.arange(gathered, gathered + shared)))
                tokens.append(np.concatenate([prefix, np.arange(own, own + length)]))
                own, gathered = own + length, gathered + shared + length
        keys = [len(part) for part in tokens]
        index = np.concatenate(tokens)
        return cls(
            query_starts=_starts(queries),
            key_starts=_starts(keys),
            longest_query=max(queries),
            longest_key=max(keys),
            tokens=torch.from_numpy(index),
            first=torch.from_numpy(np.unique(index, return_index=True)[1]),
            repeats=tuple(
                (torch.from_numpy(np.concatenate(prefixes)), torch.from_numpy(np.concatenate(copies)))
                for prefixes, copies in (zip(*parts, strict=True) for _, parts in sorted(repeats.items()))
            ),
        )

    def to(self, device: torch.device) -> Self:
        """Return the index with its tensors on a device."""
        return replace(
            self,
            query_starts=to_device(self.query_starts, device),
            key_starts=to_device(self.key_starts, device),
            tokens=to_device(self.tokens, device),
            first=to_device(self.first, device),
            repeats=tuple((to_device(tokens, device), to_device(copies, device)) for tokens, copies in self.repeats),
        )


# `(q [T, heads, d], k [keys, kv_heads, d], v, keys, scale, window)` to `[T, heads, d]`: causal attention with the last
# query of each sequence aligned with its last key, grouped-query attention included.
Kernel = Callable[[Tensor, Tensor, Tensor, GatheredKeys, float, int | None], Tensor]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: GatheredKeys,
    kernel: Kernel,
    *,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Attend within records.

    Args:
        query: `[1, heads, T, d]`.
        key: `[1, kv_heads, T, d]`.
        value: like `key`.
        keys: of the batch.
        kernel: see `find_kernel`.
        scaling: factor on the scores; 1 / sqrt(d) by default.
        window: number of positions that a token attends to, itself included.

    Returns:
        `[1, T, heads, d]`.
    """
    # Not `query[0]`: its backward would fill and add a tensor of full size.
    q = query.squeeze(0).transpose(0, 1)
    k, v = (gather(tensor.squeeze(0).transpose(0, 1), keys) for tensor in (key, value))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    return kernel(q, k, v, keys, scale, window)[None]


def gather(source: Tensor, keys: GatheredKeys) -> Tensor:
    """Return `[keys, ...]`, the gathered keys of `source` `[T, ...]`."""
    gathered: Tensor = cast(Any, _Gather).apply(source, keys)
    return gathered


class _Flash(torch.autograd.Function):
    """Torch's flash kernel, with a deterministic backward: a resumed run must give the same bits."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, keys: GatheredKeys, scale: float, window: int | None
    ) -> Tensor:
        ctx.keys, ctx.scale, ctx.window = keys, scale, window
        out, lse, rng_state, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, *_lengths(keys), 0.0, window is None, False, **_options(scale, window)
        )
        ctx.save_for_backward(q, k, v, out, lse, rng_state)
        return cast(Tensor, out)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, rng_state = ctx.saved_tensors
        options = _options(ctx.scale, ctx.window)
        with _deterministic():
            gradients: tuple[Tensor, ...] = torch.ops.aten._flash_attention_backward(
                upstream, q, k, v, out, lse, *_lengths(ctx.keys), 0.0, ctx.window is None, rng_state,
                torch.empty(0, device=q.device), **options,
            )  # fmt: skip
        return *gradients, None, None, None


def _torch_kernel(q: Tensor, k: Tensor, v: Tensor, keys: GatheredKeys, scale: float, window: int | None) -> Tensor:
    out: Tensor = cast(Any, _Flash).apply(q, k, v, keys, scale, window)
    return out


def flash_attn_kernel(function: Callable[..., Any]) -> Kernel:
    """Wrap the flash-attn package's function for sequences of different lengths."""
    deterministic = {"deterministic": True} if "deterministic" in signature(function).parameters else {}

    def kernel(q: Tensor, k: Tensor, v: Tensor, keys: GatheredKeys, scale: float, window: int | None) -> Tensor:
        out: Tensor = function(
            q, k, v, *_lengths(keys), softmax_scale=scale, causal=True, window_size=_window(window), **deterministic
        )
        return out

    return kernel


def _lengths(keys: GatheredKeys) -> tuple[Tensor, Tensor, int, int]:
    return keys.query_starts, keys.key_starts, keys.longest_query, keys.longest_key


def _options(scale: float, window: int | None) -> dict[str, Any]:
    left, right = _window(window)
    return {"scale": scale, "window_size_left": left, "window_size_right": right}


def _window(window: int | None) -> tuple[int, int]:
    """Return the number of keys that a query attends to before and after its own position; -1 is all."""
    return -1 if window is None else window - 1, 0


@contextmanager
def _deterministic() -> Iterator[None]:
    """Use deterministic kernels inside."""
    # torch's public switch takes milliseconds at every call.
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch._C._get_deterministic_fill_uninitialized_memory()
    torch._C._set_deterministic_algorithms(True, warn_only=False)
    torch._C._set_deterministic_fill_uninitialized_memory(False)
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(before[0], warn_only=before[1])
        torch._C._set_deterministic_fill_uninitialized_memory(fill)


def find_kernel(query: Tensor, value: Tensor, plain: bool) -> Kernel | None:
    """Return the kernel for these tensors, or `None` if no kernel supports them.

    Args:
        query: `[1, heads, T, d]`.
        value: `[1, kv_heads, T, d]`; in latent attention values have another head size than queries.
        plain: whether attention is a softmax of the scores alone: no soft cap, no sinks, no dropout.
    """
    on_cuda = query.is_cuda or device_kind(query.device) == "cuda"
    if not (on_cuda and plain and query.dtype in (torch.float16, torch.bfloat16)):
        return None
    size = query.shape[-1]
    if size > MAX_HEAD_SIZE or size % HEAD_SIZE_MULTIPLE or value.shape[-1] != size or value.dtype != query.dtype:
        return None
    if not query.is_cuda:
        return _torch_kernel
    if torch.cuda.get_device_capability(query.device) < MIN_CAPABILITY:
        return None
    return installed_kernel()


@lru_cache(maxsize=1)
def installed_kernel() -> Kernel | None:
    """Return the kernel of flash-attn if that package can be imported, else torch's, or `None` if torch has none."""
    if find_spec("flash_attn") is not None:
        try:
            from flash_attn import flash_attn_varlen_func  # noqa: PLC0415 - an optional package
        except (ImportError, OSError) as error:
            # The package was built for another torch, or is incomplete.
            console.warn(
                f"flash_attn is installed but cannot be imported ({error}): using torch's own flash kernel; "
                "install a flash_attn built for this torch, or remove it"
            )
        else:
            return flash_attn_kernel(flash_attn_varlen_func)
    return _torch_kernel if torch.backends.cuda.is_flash_attention_available() else None


def repeat_kv(tensor: Tensor, query: Tensor) -> Tensor:
    """Repeat the heads of keys or values to the number of query heads."""
    groups = query.shape[1] // tensor.shape[1]
    return tensor if groups == 1 else tensor.repeat_interleave(groups, dim=1)


def sum_kv_groups(gradient: Tensor, tensor: Tensor) -> Tensor:
    """Sum the gradients of repeated keys or values over the query heads that share them; the adjoint of `repeat_kv`."""
    groups = gradient.shape[1] // tensor.shape[1]
    return gradient if groups == 1 else gradient.unflatten(1, (-1, groups)).sum(2)


class _Gather(torch.autograd.Function):
    """Select tokens by index; the backward sums the gradients of copies in float32 and in a fixed order."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, keys: GatheredKeys) -> Tensor:
        ctx.keys = keys
        return source[keys.tokens]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        keys: GatheredKeys = ctx.keys
        total = gradient[keys.first]
        if keys.repeats:
            total = total.to(torch.promote_types(total.dtype, torch.float32))
        for tokens, copies in keys.repeats:
            # No token occurs twice in one entry, so the sum does not depend on the order of threads.
            total[tokens] += gradient[copies]
        return total.to(gradient.dtype), None


def _starts(lengths: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))

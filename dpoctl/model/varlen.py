"""Attention over sequences of uneven lengths in one kernel, on a GPU.

Queries stay where they are; keys and values are gathered so that each response finds the shared prefix before its own
rows. A causal kernel aligns the last query with the last key, so distances in the gathered rows are distances in
positions, and sliding windows need no mask either. Not every release of torch has the kernel, and its arguments change:
what it takes is read off its signature.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Self, cast

import numpy as np
import torch
from torch import Tensor

from dpoctl.model.grouped import for_all_heads

Records = Sequence[tuple[int, int, tuple[int, ...]]]
LARGEST_HEAD = 256
# The first generation with the tensor cores that these kernels are written for.
FIRST_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class GatheredKeys:
    """Which rows of a flat batch are the keys of which response.

    Attributes:
        query_starts: int32 `[responses + 1]`, where the queries of each response start.
        key_starts: int32 `[responses + 1]`, where its keys start among the gathered ones.
        longest_query: most queries of a response.
        longest_key: most keys of a response.
        rows: int64 `[keys]`, the row of each gathered key.
        first: int64 `[T]`, where each row first stands among the gathered keys.
        again: for the second response of all records, the third and so on: rows that its records share, and where
            these stand among its gathered keys.
    """

    query_starts: Tensor
    key_starts: Tensor
    longest_query: int
    longest_key: int
    rows: Tensor
    first: Tensor
    again: tuple[tuple[Tensor, Tensor], ...]

    @classmethod
    def of(cls, records: Records) -> Self:
        """Work them out from where the records of a batch stand; see `Segments`."""
        queries: list[int] = []
        rows: list[np.ndarray[Any, Any]] = []
        again: dict[int, list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]] = {}
        gathered = 0
        for start, shared, suffixes in records:
            prefix, own = np.arange(start, start + shared), start + shared
            for number, length in enumerate(suffixes):
                queries.append(length if number else shared + length)
                if number:
                    again.setdefault(number, []).append((prefix, np.arange(gathered, gathered + shared)))
                rows.append(np.concatenate([prefix, np.arange(own, own + length)]))
                own, gathered = own + length, gathered + shared + length
        keys = [len(part) for part in rows]
        index = np.concatenate(rows)
        return cls(
            query_starts=_starts(queries),
            key_starts=_starts(keys),
            longest_query=max(queries),
            longest_key=max(keys),
            rows=torch.from_numpy(index),
            first=torch.from_numpy(np.unique(index, return_index=True)[1]),
            again=tuple(
                (torch.from_numpy(np.concatenate(to)), torch.from_numpy(np.concatenate(at)))
                for to, at in (zip(*parts, strict=True) for _, parts in sorted(again.items()))
            ),
        )

    def to(self, device: torch.device) -> Self:
        """Return them with their tensors on a device."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {name: _move(value, device) for name, value in values.items()}
        return type(self)(**moved)


class _Gather(torch.autograd.Function):
    """Rows by index; backward adds what a shared row got from each response in float32 and in a fixed order."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, keys: GatheredKeys) -> Tensor:
        ctx.keys = keys
        return source[keys.rows]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        keys: GatheredKeys = ctx.keys
        total = gradient[keys.first]
        if keys.again:
            total = total.to(torch.promote_types(total.dtype, torch.float32))
        for rows, at in keys.again:
            # No row comes twice in one round, so nothing depends on the order of threads.
            total[rows] += gradient[at]
        return total.to(gradient.dtype), None


def gather(source: Tensor, keys: GatheredKeys) -> Tensor:
    """Return the rows of `source` `[T, ...]` in the order of the gathered keys."""
    gathered: Tensor = cast(Any, _Gather).apply(source, keys)
    return gathered


@dataclass(frozen=True)
class Varlen:
    """A kernel, and what it understands.

    Attributes:
        kernel: the function.
        arguments: names of its arguments.
        is_flash: whether it is the flash-attn package's, which has its own names for them.
    """

    kernel: Callable[..., Any]
    arguments: frozenset[str]
    is_flash: bool

    @classmethod
    def around(cls, kernel: Callable[..., Any], *, is_flash: bool = False) -> Self:
        """Read off a kernel's signature what it understands."""
        return cls(kernel, frozenset(inspect.signature(kernel).parameters), is_flash)

    @property
    def has_windows(self) -> bool:
        """Whether it knows sliding windows."""
        return "window_size" in self.arguments

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        keys: GatheredKeys,
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
            scaling: factor on the scores; one over the root of d when absent.
            window: how many positions back a token sees, itself included.

        Returns:
            `[1, T, heads, d]`.
        """
        q = query[0].transpose(0, 1)
        k, v = (gather(tensor[0].transpose(0, 1), keys) for tensor in (key, value))
        options, usual = self._causal(window), q.shape[-1] ** -0.5
        if scaling is not None and scaling != usual:
            name = "softmax_scale" if self.is_flash else "scale"
            if name in self.arguments:
                options[name] = scaling
            else:
                q = q * (scaling / usual)
        if q.shape[1] != k.shape[1] and not self.is_flash:
            if "enable_gqa" in self.arguments:
                options["enable_gqa"] = True
            else:
                k, v = for_all_heads(k, q), for_all_heads(v, q)
        out: Tensor = self.kernel(
            q, k, v, keys.query_starts, keys.key_starts, keys.longest_query, keys.longest_key, **options
        )
        return out[None]

    def _causal(self, window: int | None) -> dict[str, Any]:
        back = -1 if window is None else window - 1
        if self.is_flash:
            return {"causal": True, "window_size": (back, 0)}
        return {"window_size": (back, 0)} if self.has_windows else {"is_causal": True}


def find_varlen(query: Tensor, plain: bool, window: int | None) -> Varlen | None:
    """Return the kernel for some queries; `None` where there is none.

    Args:
        query: `[1, heads, T, d]`.
        plain: whether the scores are those of the softmax, without caps, sinks and dropout.
        window: how many positions back a token sees.
    """
    if not (query.is_cuda and plain and query.dtype in (torch.float16, torch.bfloat16)):
        return None
    if query.shape[-1] > LARGEST_HEAD or torch.cuda.get_device_capability(query.device) < FIRST_CAPABILITY:
        return None
    kernel = installed()
    return None if kernel is None or (window is not None and not kernel.has_windows) else kernel


@lru_cache(maxsize=1)
def installed() -> Varlen | None:
    """Return the kernel of this installation: flash-attn's if that package is there, else torch's, if it has one."""
    if find_spec("flash_attn") is not None:
        from flash_attn import flash_attn_varlen_func  # noqa: PLC0415 - an optional package

        return Varlen.around(flash_attn_varlen_func, is_flash=True)
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415 - not in every release
    except ImportError:
        return None
    return Varlen.around(varlen_attn)


def _starts(lengths: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple):
        return tuple(_move(part, device) for part in value)
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

"""What operators do on a fake GPU, watched one by one: calls, FLOPs, live bytes, and where the host would wait.

Bytes are those of storages that operators make on the GPU, for as long as these live, each rounded up as torch's
allocator does; storages that stand before the first operator are shown to `note`. `MemTracker` of torch finds the same
peak, but hooks every parameter for it, which a frozen one does not allow, and sees neither FLOPs nor waits.
"""

import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import finalize

import torch
from flops import seen_keys
from shim import PINNED
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dpoctl.core.trace import working_bytes

aten = torch.ops.aten
ROUNDING = 512
# Operators whose answer has a size, or is a number, that only the device knows.
WAITS = {
    aten._local_scalar_dense,
    aten.item,
    aten.nonzero,
    aten.masked_select,
    aten.is_nonzero,
    aten.equal,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
}
INDEXING, MASKS = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}, {torch.bool, torch.uint8}
# Operators that send even a single number of the host to the device first.
SENDS = {aten.where, aten.index_put, aten.index_put_, aten.cat, aten.stack}
MATRICES = {aten.mm: 2, aten.bmm: 2, aten.addmm: 3, aten.baddbmm: 3}
# Operators that touch no byte, and are not marked as views.
VIEWS = {f"aten::{name}" for name in ("_unsafe_view", "empty_like", "empty", "new_empty", "empty_strided", "set_")}
FORWARD, BACKWARD = "aten::_flash_attention_forward", "aten::_flash_attention_backward"
GEMM, INT8 = "bitsandbytes::gemm_4bit", "bitsandbytes::int8_mixed_scaled_mm"
# With a threshold it looks for columns of outliers, and its caller must know how many there are.
OUTLIERS = "bitsandbytes::int8_vectorwise_quant"


@dataclass(frozen=True)
class Call:
    """One call of an operator that is no view.

    Attributes:
        name: of the operator.
        phase: what was going on.
        read: bytes of the tensors on the GPU that it was given.
        made: shape and dtype of each tensor that it made, and its bytes; nothing for what it wrote in place.
    """

    name: str
    phase: str
    read: int
    made: tuple[tuple[tuple[int, ...], str, int], ...]


@dataclass(frozen=True)
class Attention:
    """A call of the kernel for uneven lengths: dtypes and shapes of its queries, keys and values."""

    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    window: tuple[int, ...]


@dataclass(eq=False)
class Tracker(TorchDispatchMode):
    """Watches what runs inside it, above a `FakeTensorMode`.

    Attributes:
        areas: for a window, pairs of a query and a key that attention within records multiplies.
        keep_calls: remember every call, not only their number.
        phase: what is going on.
        flops: two for a multiplication and an addition.
        live: bytes at this moment.
        peak: most bytes at once, with what kernels allocate inside.
        peak_of_tensors: the same without that.
        peak_at: phase and operator of the peak.
        launches: calls of operators on the GPU that are no views, by phase.
        calls: these calls, if they are kept.
        waits: operators that the host would wait at, and where these were called.
        forward: calls of the kernel for uneven lengths.
        backward: calls of its backward.
        squares: sizes that a tensor had in two dimensions at once.
    """

    areas: Callable[[int | None], int] = lambda window: 0
    keep_calls: bool = False
    phase: str = "start"
    flops: int = 0
    live: int = 0
    peak: int = 0
    peak_of_tensors: int = 0
    peak_at: str = ""
    launches: Counter[str] = field(default_factory=Counter)
    calls: list[Call] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)
    forward: list[Attention] = field(default_factory=list)
    backward: list[Attention] = field(default_factory=list)
    squares: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Begin."""
        super().__init__()
        self._known: dict[int, int] = {}

    def note(self, *tensors: Tensor) -> None:
        """Count storages that stand already."""
        for tensor in tensors:
            self._note(tensor)

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Count a storage anew, which has another size now."""
        if (before := self._known.get(storage._cdata)) is not None:
            self._known[storage._cdata] = size = _rounded(storage)
            self.live += size - before
            self.peak, self.peak_of_tensors = max(self.peak, self.live), max(self.peak_of_tensors, self.live)

    def restart(self) -> None:
        """Begin the peak, the FLOPs and the rest anew; what lives goes on living."""
        self.flops, self.peak, self.peak_of_tensors = 0, self.live, self.live
        for found in (self.launches, self.calls, self.waits, self.forward, self.backward, self.squares):
            found.clear()

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Give what runs inside a name."""
        before, self.phase = self.phase, phase
        yield
        self.phase = before

    def named(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function during which the phase has a name."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            with self.during(phase):
                return function(*args, **kwargs)

        return watched

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name = str(func._schema.name)
        if self._waits(func, name, args, kwargs, given):
            self.waits.append(f"{name} at {_place()}")
        self._attend(name, args, kwargs)
        before = self.live
        out = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        fresh = [tensor for tensor in made if self._note(tensor)]
        self._record(func, name, given, fresh, args, kwargs, out)
        self.peak_of_tensors = max(self.peak_of_tensors, self.live)
        inside = max(self.live, before + sum(_size(tensor) for tensor in fresh) + working_bytes(name, args))
        if inside > self.peak:
            self.peak, self.peak_at = inside, f"{self.phase}: {name}"
        return out

    def _record(self, func: Any, name: str, given: Any, fresh: Any, args: Any, kwargs: Any, out: Any) -> None:
        packet = func._overloadpacket
        if name == GEMM:
            self.flops += 2 * args[0].numel() * args[2][0]
        elif name == INT8:
            self.flops += 2 * args[0].numel() * args[2].shape[0]
        elif packet in flop_registry and name not in (FORWARD, BACKWARD):
            # Some overloads have a dtype behind their matrices, which the formula takes for a shape.
            self.flops += flop_registry[packet](*args[: MATRICES.get(packet)], **kwargs, out_val=out)
        on_device = [tensor for tensor in given if tensor.device.type == "cuda"]
        if func.is_view or name in VIEWS or name.startswith("prim::") or not (on_device or fresh):
            return
        self.launches[self.phase] += 1
        for tensor in fresh:
            self.squares |= _squares(tensor.shape)
        if self.keep_calls:
            parts = tuple((tuple(t.shape), str(t.dtype).removeprefix("torch."), _size(t)) for t in fresh)
            self.calls.append(Call(name, self.phase, sum(t.numel() * t.element_size() for t in on_device), parts))

    def _attend(self, name: str, args: Any, kwargs: Any) -> None:
        if name not in (FORWARD, BACKWARD):
            return
        at = 1 if name == BACKWARD else 0
        tensors = args[at : at + 3]
        window = (kwargs["window_size_left"], kwargs["window_size_right"])
        call = Attention(
            tuple(str(t.dtype).removeprefix("torch.") for t in tensors), tuple(tuple(t.shape) for t in tensors), window
        )
        (self.backward if at else self.forward).append(call)
        (_, heads, width), value_width = tensors[0].shape, tensors[2].shape[-1]
        area = self.areas(window[0] + 1 if window[0] >= 0 else None)
        # Backward computes the scores once more, then the gradients of values, weights, queries and keys.
        self.flops += 2 * heads * area * (3 * width + 2 * value_width if at else width + value_width)

    def _waits(self, func: Any, name: str, args: Any, kwargs: Any, given: Sequence[Tensor]) -> bool:
        """Whether the host would wait for the device."""
        packet, on_device = func._overloadpacket, any(tensor.device.type == "cuda" for tensor in given)
        if packet in WAITS or name == OUTLIERS:
            return on_device and (name != OUTLIERS or bool(kwargs.get("threshold") or any(args[1:])))
        if packet is aten.repeat_interleave:
            return on_device and kwargs.get("output_size") is None
        if packet in INDEXING and any(index is not None and index.dtype in MASKS for index in args[1]):
            # A mask is turned into numbers first, whose count the host must know.
            return True
        if packet is aten._to_copy:
            return self._copy_waits(given[0], kwargs.get("device"), bool(kwargs.get("non_blocking")))
        if packet is aten.copy_:
            return self._copy_waits(args[1], args[0].device, bool(kwargs.get("non_blocking") or len(args) > 2))
        if packet is aten.segment_reduce:
            return on_device and not kwargs.get("unsafe")
        # A number on the host can be an argument of most kernels; what else lies there must be sent first.
        return on_device and any(t.device.type == "cpu" and (t.dim() > 0 or packet in SENDS) for t in given)

    def _copy_waits(self, source: Tensor, device: Any, non_blocking: bool) -> bool:
        target = source.device.type if device is None else torch.device(device).type
        if source.device.type == target:
            return False
        # Even a copy that need not be waited for is, unless its end on the host is pinned.
        return not (target == "cuda" and non_blocking and source.untyped_storage() in PINNED)

    def _note(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        identity = storage._cdata
        if tensor.device.type != "cuda" or identity in self._known:
            return False
        self._known[identity] = size = _size(tensor)
        self.live += size
        finalize(storage, self._forget, identity)
        return True

    def _forget(self, identity: int) -> None:
        self.live -= self._known.pop(identity)


def areas(lengths: Sequence[tuple[int, Sequence[int]]]) -> Callable[[int | None], int]:
    """Return the pairs of a query and a key within records, of prefixes and suffixes of these lengths, by window."""

    def area(window: int | None) -> int:
        total = 0
        for shared, suffixes in lengths:
            for number, suffix in enumerate(suffixes):
                queries, keys = suffix + shared * (number == 0), shared + suffix
                seen = seen_keys(queries, keys, causal=True)
                hidden = 0
                if window is not None and keys > window:
                    # Of the query at position p all but the last `window` of p + 1 keys.
                    first = max(keys - queries, window)
                    hidden = sum(position + 1 - window for position in range(first, keys))
                total += seen - hidden
        return total

    return area


def _squares(shape: Sequence[Any]) -> set[int]:
    """Sizes above one that come twice."""
    known = Counter(size for size in shape if isinstance(size, int) and size > 1)
    return {size for size, times in known.items() if times > 1}


def _size(tensor: Tensor) -> int:
    return _rounded(tensor.untyped_storage())


def _rounded(storage: torch.UntypedStorage) -> int:
    size: Any = storage.nbytes()
    # A size that only the device knows: of a few columns, or none.
    return 0 if isinstance(size, torch.SymInt) else -(-size // ROUNDING) * ROUNDING


def _place() -> str:
    """The innermost line of dpoctl, or else of anything but torch, that led here."""
    frames = traceback.extract_stack()
    inner = [f for f in frames if "/torch/" not in f.filename and not f.filename.endswith("tracker.py")]
    own = [f for f in inner if "/dpoctl/" in f.filename] or inner
    return f"{'/'.join(own[-1].filename.split('/')[-3:])}:{own[-1].lineno}"

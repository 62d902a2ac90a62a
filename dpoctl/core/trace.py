"""A training step that is traced and not computed: its peak of live bytes in each phase, and its FLOPs.

The real scorer, objective, report and optimizer run on fake tensors under a dispatch mode that sees every operator.
Bytes are those of storages that operators make, for as long as these live, each rounded up as the allocator does, and
what attention and 4-bit kernels allocate inside. The backward is split at the decoder layers: while it goes down from
the last to the first, activations go and gradients come, so the peak is at one of its ends, and each end grows linearly
with the number of layers.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from dpoctl.core.batch import Batch
from dpoctl.core.logps import Scorer
from dpoctl.core.meters import Meter
from dpoctl.core.objective import Objective, Report
from dpoctl.core.planner import Step
from dpoctl.core.reader import Reader
from dpoctl.losses import Term
from dpoctl.model.memory import device_kind
from dpoctl.model.sharding import layers_of

aten = torch.ops.aten
ROUNDING = {"cuda": 512, "cpu": 64}
FLOAT = 4
# bitsandbytes dequantises the whole weight for more rows than these, and multiplies with that.
DEQUANTISED_ROWS = 1536
MATRICES = {aten.mm: 2, aten.bmm: 2, aten.addmm: 3, aten.baddbmm: 3}
FLASH, FLASH_BACKWARD = "aten::_flash_attention_forward", "aten::_flash_attention_backward"
ATTENTION = "attention"
GEMM = "bitsandbytes::gemm_4bit"
# Products of queries and keys, or of weights and values, in each kernel.
_FOR_CPU = "aten::_scaled_dot_product_flash_attention_for_cpu"
_KERNELS = {FLASH: 2, FLASH_BACKWARD: 5, _FOR_CPU: 2, f"{_FOR_CPU}_backward": 5}


@dataclass(frozen=True)
class Phase:
    """The fullest moment of a phase.

    Attributes:
        peak: bytes of everything that is alive.
        gradients: those of them that are gradients of trained weights, at the end of the phase.
        workspace: those of them that a kernel allocates inside.
    """

    peak: int
    gradients: int
    workspace: int


@dataclass(frozen=True)
class Trace:
    """The bytes and FLOPs of a step.

    Attributes:
        weights: bytes of weights and buffers.
        optimizer: bytes of the optimizer's state.
        extra: bytes of a copy of the trained weights that runs as the reference.
        kept: bytes that the forward leaves for the backward.
        phases: of the step, by name.
        flops: of matrix products, in layers, in the head and in attention; and those of the forward alone.
    """

    weights: int
    optimizer: int
    extra: int
    kept: int
    phases: dict[str, Phase]
    flops: dict[str, int]


@dataclass(frozen=True)
class TracedStep:
    """The parts of a step to trace.

    Attributes:
        scorer: of the policy of fakes.
        terms: of the objective.
        report: its metrics.
        optimizer: builds the optimizer of some parameters.
        step: of a plan.
        reader: of its records.
        batches: the micro-batch.
        dtype: the precision of the computation.
        area: pairs of a query and a key within its records.
        accumulates: whether gradients of earlier micro-batches are there when this one begins.
        group: number of layers at each end of the model that are alike to the recomputation.
        copies: number of copies of the trained weights that are kept beside the model.
    """

    scorer: Scorer
    terms: tuple[Term, ...]
    report: Report
    optimizer: Callable[[Iterator[tuple[str, nn.Parameter]]], Any]
    step: Step
    reader: Reader
    batches: Sequence[Batch]
    dtype: torch.dtype
    area: int
    accumulates: bool
    group: int = 1
    copies: int = 0


def trace_step(traced: TracedStep, fakes: FakeTensorMode) -> Trace:
    """Trace one micro-batch, and the update after it.

    Raises:
        Exception: an operator has no fake, or its answer depends on numbers.
    """
    scorer = traced.scorer
    model = scorer.model
    with fakes:
        copies = [p.detach().clone() for p in model.parameters() if p.requires_grad for _ in range(traced.copies)]
        optimizer = traced.optimizer(model.named_parameters())
        batches = [_faked(batch, fakes) for batch in traced.batches]
    tracker = Tracker(area=traced.area)
    tracker.note(*model.parameters(), *model.buffers(), *packed_scales(model))
    weights = tracker.live
    tracker.note(*copies)
    extra = tracker.live - weights
    trained = [p for p in model.parameters() if p.requires_grad]
    with fakes:
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    tracker.note(*(t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)))
    state = tracker.live - weights - extra
    if not traced.accumulates:
        optimizer.zero_grad()
    tracker.note(*(p.grad for p in trained if p.grad is not None))
    tracker.gradients = lambda: sum(p.grad.untyped_storage().nbytes() for p in trained if p.grad is not None)
    before = tracker.live
    kept = 0

    def backward(loss: Tensor) -> None:
        nonlocal kept
        kept = tracker.live - before
        tracker.enter("backward of the head")
        loss.backward()
        tracker.enter("report")

    with fakes, tracker, _watched(scorer, tracker, traced.group):
        objective = Objective(_one_rank(backward), _Mixed(scorer, traced.dtype), traced.terms, traced.report)
        objective.backward(traced.step, traced.reader, Meter(torch.device("cpu")), batches)
        tracker.enter("update")
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        tracker.enter("")
        optimizer.zero_grad()
    return Trace(weights, state, extra, kept, tracker.phases(), dict(tracker.flops))


def trace_forward(scorer: Scorer, batch: Batch, dtype: torch.dtype, fakes: FakeTensorMode) -> int:
    """Return the peak of a forward without gradients, such as that of a reference, weights included."""
    tracker = Tracker()
    tracker.note(*scorer.model.parameters(), *scorer.model.buffers(), *packed_scales(scorer.model))
    with fakes:
        batch = _faked(batch, fakes)
        with tracker, torch.no_grad():
            tracker.enter("forward")
            _Mixed(scorer, dtype)(batch)
            tracker.enter("")
    return tracker.phases()["forward"].peak


class _Mixed(nn.Module):
    """The Scorer as accelerate hands it to the loop: forward under autocast."""

    def __init__(self, scorer: Scorer, dtype: torch.dtype) -> None:
        super().__init__()
        self.scorer, self.dtype = scorer, dtype

    def forward(self, batch: Batch) -> Tensor:
        """Score a batch."""
        mixed = torch.autocast("cpu", self.dtype) if self.dtype != torch.float32 else nullcontext()
        with mixed:
            scored: Tensor = self.scorer(batch)
        return scored


def _one_rank(backward: Callable[[Tensor], None]) -> Any:
    """Return as much of an accelerator as the objective asks for, where there is one rank."""
    return SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=1,
        process_index=0,
        is_main_process=True,
        backward=backward,
        no_sync=lambda _: nullcontext(),
        gather=lambda tensor: tensor,
    )


def _faked(batch: Batch, fakes: FakeTensorMode) -> Batch:
    """Return a batch of fakes."""

    def fake(value: Any) -> Any:
        return fakes.from_tensor(value) if isinstance(value, Tensor) and not isinstance(value, FakeTensor) else value

    faked: Batch = _mapped(batch.to(torch.device("cpu")), fake)
    return faked


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return a data class with its tensors changed, also those of data classes and tuples inside it."""
    if hasattr(value, "__dataclass_fields__"):
        made = object.__new__(type(value))
        for name, part in vars(value).items():
            object.__setattr__(made, name, _mapped(part, change))
        return made
    return tree_map(change, value) if isinstance(value, tuple) else change(value)


@contextmanager
def _watched(scorer: Scorer, tracker: "Tracker", group: int) -> Iterator[None]:
    """Name the phases of a step by what the model is at."""
    layers, head = layers_of(scorer.model), scorer._head
    handles = [layer.register_forward_hook(_named_backward(tracker, _end(n, len(layers), group)))
               for n, layer in enumerate(layers)]  # fmt: skip
    embedding: Any = scorer.causal.get_input_embeddings()
    handles.append(embedding.register_forward_hook(_named_backward(tracker, "backward of the embedding")))
    logps = head.logps

    def in_phase(hidden: Tensor, targets: Tensor) -> Tensor:
        tracker.enter("head")
        out = logps(hidden, targets)
        tracker.enter("report")
        return out

    vars(head)["logps"] = in_phase
    tracker.enter("forward")
    try:
        yield
    finally:
        del vars(head)["logps"]
        for handle in handles:
            handle.remove()


def _end(number: int, layers: int, group: int) -> str:
    """The name of the backward of a layer: only those at both ends of the model matter."""
    if number >= layers - group:
        return "backward of the last layers"
    return "backward of the first layers" if number < group else "backward between"


def _named_backward(tracker: "Tracker", phase: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, out: Any) -> None:
        hidden = out[0] if isinstance(out, tuple) else out
        # A layer that is computed again in the backward has no gradient hook of its own yet either.
        if isinstance(hidden, Tensor) and hidden.requires_grad and not tracker.phase.startswith("backward"):
            hidden.register_hook(lambda gradient: tracker.enter(phase))

    return hook


@dataclass(eq=False)
class Tracker(TorchDispatchMode):
    """Adds up live bytes and FLOPs of what runs inside it, above a `FakeTensorMode`.

    Attributes:
        phase: what is going on.
        live: bytes at this moment.
        area: pairs of a query and a key that attention multiplies, for kernels that do not show them.
        flops: of matrix products, by what they belong to.
        gradients: counts the bytes of gradients.
    """

    phase: str = ""
    live: int = 0
    area: int = 0
    flops: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    gradients: Callable[[], int] = lambda: 0

    def __post_init__(self) -> None:
        """Begin."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._known: dict[int, int] = {}
        self._found: dict[str, Phase] = {}
        self._peak = self._workspace = 0
        self._rounding = ROUNDING[device_kind(torch.device("cpu"))]

    def note(self, *tensors: Tensor) -> None:
        """Count storages that stand already."""
        for tensor in tensors:
            self._note(tensor)

    def enter(self, phase: str) -> None:
        """End a phase, and begin another."""
        if phase == self.phase:
            return
        if self.phase:
            before = self._found.get(self.phase)
            if before is None or self._peak > before.peak:
                self._found[self.phase] = Phase(self._peak, self.gradients(), self._workspace)
        self.phase, self._peak, self._workspace = phase, self.live, 0

    def phases(self) -> dict[str, Phase]:
        """Return the phases that have ended."""
        return dict(self._found)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = self.live
        out = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        fresh = sum(self._size(tensor) for tensor in made if self._note(tensor))
        name = str(func._schema.name)
        inside = working_bytes(name, args)
        if max(self.live, before + fresh + inside) > self._peak:
            self._peak, self._workspace = max(self.live, before + fresh + inside), inside
        self._count(func, name, args, kwargs, out)
        return out

    def _count(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> None:
        packet, part = func._overloadpacket, "head" if "head" in self.phase else "layers"
        if name == GEMM:
            count = 2 * args[0].numel() * args[2][0]
        elif name in _KERNELS:
            count, part = _attention_flops(name, args, self.area), ATTENTION
        elif packet in flop_registry:
            # Some overloads have a dtype behind their matrices, which the formula takes for a shape.
            count = flop_registry[packet](*args[: MATRICES.get(packet)], **kwargs, out_val=out)
        else:
            return
        self.flops[part] += count
        if self.phase == "forward":
            self.flops["forward attention" if part == ATTENTION else "forward"] += count

    def _note(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        identity = storage._cdata
        if identity in self._known or not isinstance(tensor, FakeTensor):
            return False
        self._known[identity] = size = self._size(tensor)
        self.live += size
        finalize(storage, self._forget, identity)
        return True

    def _forget(self, identity: int) -> None:
        self.live -= self._known.pop(identity)

    def _size(self, tensor: Tensor) -> int:
        size: Any = tensor.untyped_storage().nbytes()
        # A size that only the numbers tell: of a few columns, or none.
        return 0 if isinstance(size, torch.SymInt) else -(-size // self._rounding) * self._rounding


def _attention_flops(name: str, args: Any, area: int) -> int:
    """Return the FLOPs of an attention kernel: two products forward, five backward, of the seen pairs alone."""
    query, value = (args[1], args[3]) if "backward" in name else (args[0], args[2])
    heads, pairs = query.shape[-2], area
    if name.startswith(_FOR_CPU):
        # An argument that has its default value is left out.
        key, at = (args[2], 7) if "backward" in name else (args[1], 4)
        causal = len(args) > at and args[at]
        heads, rows, keys = query.shape[1], query.shape[2], key.shape[2]
        pairs = rows * keys - (min(rows, keys) * (min(rows, keys) - 1) // 2 if causal else 0)
    return int(heads * pairs * _KERNELS[name] * (query.shape[-1] + value.shape[-1]))


def working_bytes(name: str, args: Any) -> int:
    """Return what a kernel allocates inside and frees again, of the kernels where that is much."""
    if name == GEMM:
        # Of many rows bitsandbytes dequantises the whole weight, and multiplies with that.
        rows, (words, width) = args[0].numel() // args[0].shape[-1], args[2]
        # Its scales are unpacked and shifted first.
        whole = words * width * args[0].element_size() + 2 * FLOAT * words * width // args[4]
        return whole if rows > DEQUANTISED_ROWS else 0
    if name == FLASH_BACKWARD:
        # The gradient of the queries adds up in float32; keys and values get one for each query's head.
        query, key = args[1], args[2]
        (rows, heads, width), (keys, shared, _) = query.shape, key.shape
        padded = rows + 128 * (len(args[6]) - 1)
        apart = 2 * keys * heads * width * key.element_size() if shared != heads else 0
        return int(padded * heads * (width + 1) * FLOAT + apart)
    return 0


def packed_scales(model: nn.Module) -> list[Tensor]:
    """Return what stands beside quantised weights: scales, and those of the scales."""
    found: list[Tensor] = []
    for parameter in model.parameters():
        state: Any = getattr(parameter, "quant_state", None)
        if state is not None:
            found += [state.absmax, state.code]
            if state.nested:
                found += [state.offset, state.state2.absmax, state.state2.code]
        elif getattr(parameter, "SCB", None) is not None:
            found += [parameter.CB, parameter.SCB]  # type: ignore[attr-defined]
    return found

"""What an architecture can do, found out by trying: a start-up check of a second, instead of a list of model names.

Two records of two responses run as separate rows of the untouched model, and then in one layout after another, the
best first. One is chosen only if no response can change another row by a single bit, and if it agrees with separate
rows; our own head is used only if it agrees with the model's logits. Adapters are disturbed first, so that an ignored
one cannot pass.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from dpoctl.model.attention import SHARED_PREFIX, Segments, attention
from dpoctl.model.head import Head, select_logps
from dpoctl.model.layouts import FLAT, PROMPT, Layout, placement

# Error of log-probabilities, relative to their spread, that rounding explains.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# Layers that look at rows as our attention lets them, or at single rows only.
PLAIN_LAYERS = {"full_attention", "sliding_attention", "mlp", "moe"}
STATEFUL_LAYERS = {"linear_attention", "conv", "hybrid"}
# Configuration keys of attention that reaches so many tokens back.
WINDOWS = ("sliding_window", "window_size")
LADDER: tuple[Layout, ...] = ("shared", "masked", "packed")
GAINS: dict[Layout, str] = {
    "shared": "prompts are computed once for all their answers",
    "masked": "prompts are computed once for all their answers, under a dense mask",
    "packed": "nothing is padded, but prompts are not shared",
    "padded": "prompts are not shared",
}


@dataclass(frozen=True)
class Verdict:
    """How a model will be run.

    Attributes:
        layout: see `dpoctl.model.layouts`.
        own_head: whether the chunked head may stand in for the model's own logits.
        reason: why, in words for the user.
    """

    layout: Layout
    own_head: bool
    reason: str


@dataclass(frozen=True)
class _Record:
    shared: Tensor
    suffixes: tuple[Tensor, ...]

    @property
    def tokens(self) -> Tensor:
        return torch.cat([self.shared, *self.suffixes])

    @property
    def parts(self) -> Tensor:
        lengths = [len(self.shared), *map(len, self.suffixes)]
        return torch.cat([torch.full((length,), PROMPT + part) for part, length in enumerate(lengths)])

    @property
    def positions(self) -> Tensor:
        ends = [len(self.shared) + len(suffix) for suffix in self.suffixes]
        return torch.cat([torch.arange(len(self.shared)), *(torch.arange(len(self.shared), end) for end in ends)])

    def rows(self) -> list[Tensor]:
        return [torch.cat([self.shared, suffix]) for suffix in self.suffixes]


def backbone(causal: PreTrainedModel) -> nn.Module:
    """The part of a causal model below its head."""
    inner = getattr(causal, causal.base_model_prefix, None)
    # Text towers may carry the prefix that they have inside their multimodal model.
    inner = inner if isinstance(inner, nn.Module) else getattr(causal, "model", None)
    return inner if isinstance(inner, nn.Module) else causal.base_model


def accepts(module: nn.Module, argument: str) -> bool:
    """Whether a module's forward names an argument (or takes any)."""
    parameters = inspect.signature(module.forward).parameters
    return argument in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


@torch.no_grad()
def probe(causal: PreTrainedModel, *, max_length: int, seed: int = 0) -> Verdict:
    """Decide the layout and the head of a model.

    Args:
        causal: the model, adapters injected; left as it was found.
        max_length: tokens of the longest row that will come: a window longer than that needs no check.
        seed: of the probe's random tokens.
    """
    device = next(causal.parameters()).device
    records = _records(causal, max_length, torch.Generator().manual_seed(seed), device)
    was_training = causal.training
    causal.eval()
    try:
        with _disturbed_adapters(causal, seed):
            own_head, truth = _check_head(causal, records)
            if not own_head:
                return _verdict("padded", own_head, "its logits are not simply those of its head")
            refusals: list[str] = []
            for layout in LADDER:
                refusal = _static_refusal(causal, layout) or _check(causal, layout, records, truth)
                if refusal is None:
                    return _verdict(layout, own_head, *refusals[:1])
                refusals.append(refusal)
            return _verdict("padded", own_head, refusals[0])
    finally:
        causal.train(was_training)


def _verdict(layout: Layout, own_head: bool, *refusals: str) -> Verdict:
    return Verdict(layout, own_head, ": ".join([GAINS[layout], *refusals]))


def _records(
    causal: PreTrainedModel, max_length: int, generator: torch.Generator, device: torch.device
) -> list[_Record]:
    windows = [window for window in _windows(causal) if window < max_length]
    prefix = max(windows) + 5 if windows else 11

    def tokens(count: int) -> Tensor:
        return torch.randint(0, int(causal.config.vocab_size), (count,), generator=generator).to(device)

    return [_Record(tokens(prefix), (tokens(7), tokens(9))), _Record(tokens(6), (tokens(5), tokens(4)))]


@contextmanager
def _disturbed_adapters(causal: PreTrainedModel, seed: int) -> Iterator[None]:
    """Add noise to the trainable tensors of a model with adapters; a full model has no tensor that could be ignored."""
    trainable = [p for p in causal.parameters() if p.requires_grad]
    if len(trainable) == len(list(causal.parameters())):
        yield
        return
    saved = [p.detach().clone() for p in trainable]
    generator = torch.Generator().manual_seed(seed)
    for parameter in trainable:
        noise = torch.randn(parameter.shape, generator=generator) * 0.02
        parameter.add_(noise.to(parameter.device, parameter.dtype))
    try:
        yield
    finally:
        for parameter, before in zip(trainable, saved, strict=True):
            parameter.copy_(before)


def _check_head(causal: PreTrainedModel, records: Sequence[_Record]) -> tuple[bool, list[Tensor]]:
    """Return whether the own head agrees with the model's logits, and the true log-probabilities of every suffix."""
    head, agrees, truth = Head(causal), True, []
    for record in records:
        for row, suffix in zip(record.rows(), record.suffixes, strict=True):
            rows = slice(len(record.shared) - 1, len(row) - 1)
            logps = select_logps(causal(input_ids=row[None], use_cache=False).logits[0, rows], suffix)
            hidden = backbone(causal)(input_ids=row[None], use_cache=False).last_hidden_state[0, rows]
            agrees = agrees and _error(head.logps(hidden, suffix), logps) < _tolerance(causal)
            truth.append(logps)
    return agrees, truth


def _windows(causal: PreTrainedModel) -> list[int]:
    found = (getattr(causal.config, name, None) for name in WINDOWS)
    return [window for window in found if isinstance(window, int)]


def _static_refusal(causal: PreTrainedModel, layout: Layout) -> str | None:
    """What is known without a forward: the first reason against a layout, if any."""
    layers = set(getattr(causal.config, "layer_types", None) or ()) - PLAIN_LAYERS
    # Some choose among keys, or count them, only where rows are longer than those tried here.
    if unknown := layers - STATEFUL_LAYERS:
        return f"layers of type {', '.join(sorted(unknown))} have rules of their own"
    if layers and layout != "packed":
        return f"layers of type {', '.join(sorted(layers))} carry state from row to row"
    if layout in FLAT and not causal._can_set_attn_implementation():
        return f"{type(causal).__name__} does not let its attention be replaced"
    if layout == "masked" and _windows(causal):
        return "its windows would count columns of the mask"
    if not accepts(backbone(causal), "position_ids"):
        return f"{type(causal).__name__} takes no positions"
    return None


def _check(causal: PreTrainedModel, layout: Layout, records: Sequence[_Record], truth: Sequence[Tensor]) -> str | None:
    """Run a layout: the first reason against it, if any."""
    if layout == "packed":
        # A prefix with one suffix is a sequence that shares nothing.
        records = [_Record(row[:1], (row[1:],)) for record in records for row in record.rows()]
    try:
        with attention(causal, SHARED_PREFIX) if layout in FLAT else nullcontext():
            hidden = _run(causal, layout, records)
            if _leaks(causal, layout, records, hidden):
                return "an edit of one answer changed other rows"
            logps = list(_suffix_logps(Head(causal), hidden, records))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
        # Whatever the architecture stumbles over here, it would stumble over in training: separate rows are the way.
        return f"its forward refuses the {layout} layout ({type(error).__name__})"
    worst = max(_error(ours[-len(true) :], true) for ours, true in zip(logps, truth, strict=True))
    return None if worst < _tolerance(causal) else f"its log-probabilities differ by {worst:.1e} from separate rows"


def _run(causal: PreTrainedModel, layout: Layout, records: Sequence[_Record]) -> Tensor:
    """Return `[tokens, hidden]`, record by record, each shared prefix before its suffixes."""
    ids, positions, segments, parts = _flat(records) if layout in FLAT else _rows(records)
    output = backbone(causal)(
        input_ids=ids,
        position_ids=positions,
        use_cache=False,
        **placement(layout, segments, parts, ids.device, causal.dtype),
    )
    hidden: Tensor = output.last_hidden_state
    return hidden[0] if parts is None else hidden[parts > 0]


def _flat(records: Sequence[_Record]) -> tuple[Tensor, Tensor, Segments, None]:
    segments, start = [], 0
    for record in records:
        segments.append((start, len(record.shared), tuple(len(suffix) for suffix in record.suffixes)))
        start += len(record.tokens)
    ids, positions = (
        torch.cat(column)[None] for column in zip(*((r.tokens, r.positions) for r in records), strict=True)
    )
    return ids, positions.to(ids.device), Segments(tuple(segments)).to(ids.device), None


def _rows(records: Sequence[_Record]) -> tuple[Tensor, Tensor, None, Tensor]:
    columns = zip(*((r.tokens, r.positions, r.parts) for r in records), strict=True)
    ids, positions, parts = (pad_sequence(list(column), batch_first=True) for column in columns)
    return ids, positions.to(ids.device), None, parts.to(ids.device)


def _leaks(causal: PreTrainedModel, layout: Layout, records: Sequence[_Record], hidden: Tensor) -> bool:
    """Edit one response at a time; every other row must keep its bits.

    With experts an edit changes how many rows each expert gets, and so how the products of other rows are rounded.
    """
    allowed = 0.0 if _experts(causal) == 0 else _tolerance(causal) * float(hidden.abs().max())
    start = 0
    for index, record in enumerate(records):
        start += len(record.shared)
        for which, suffix in enumerate(record.suffixes):
            suffixes = list(record.suffixes)
            suffixes[which] = (suffix + 1) % int(causal.config.vocab_size)
            edited = [*records[:index], _Record(record.shared, tuple(suffixes)), *records[index + 1 :]]
            changed = ((_run(causal, layout, edited) - hidden).abs() > allowed).any(-1)
            changed[start : start + len(suffix)] = False
            if changed.any():
                return True
            start += len(suffix)
    return False


def _suffix_logps(head: Head, hidden: Tensor, records: Sequence[_Record]) -> Iterator[Tensor]:
    """Log-probabilities of every suffix in turn; its first token is predicted by the last shared row."""
    start = 0
    for record in records:
        start += len(record.shared)
        last_shared = hidden[start - 1 : start]
        for suffix in record.suffixes:
            yield head.logps(torch.cat([last_shared, hidden[start : start + len(suffix) - 1]]), suffix)
            start += len(suffix)


def _experts(causal: PreTrainedModel) -> int:
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return max(int(getattr(causal.config, name, None) or 0) for name in names)


def _tolerance(causal: PreTrainedModel) -> float:
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else causal.dtype
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
    return TOLERANCE.get(dtype, 1e-4)


def _error(ours: Tensor, true: Tensor) -> float:
    """Root mean square error, relative to the spread of the true values (of order one for a real vocabulary)."""
    spread = true.double().std().clamp(min=1.0)
    return float((ours.double() - true.double()).square().mean().sqrt() / spread)

"""What an architecture can do, found out by trying: a start-up check of a second, instead of a list of model names.

Two records of two responses run once in the shared layout and once as separate rows of the untouched model. Sharing
is chosen only if no response can change another row by a single bit, and if both ways agree; our own head is used
only if it agrees with the model's logits. Adapters are disturbed first, so that an ignored one cannot pass.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpoctl.model.attention import SHARED_PREFIX, Segments, attention
from dpoctl.model.head import Head, select_logps

Layout = Literal["shared", "padded"]
# Error of log-probabilities, relative to their spread, that rounding explains.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
ALLOWED_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class Verdict:
    """How a model will be run.

    Attributes:
        layout: `shared` computes a prompt once for all its answers; `padded` gives each answer its own row.
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

    def rows(self) -> list[Tensor]:
        return [torch.cat([self.shared, suffix]) for suffix in self.suffixes]


def backbone(causal: PreTrainedModel) -> nn.Module:
    """The part of a causal model below its head."""
    inner = getattr(causal, causal.base_model_prefix, None)
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
            refusal = _static_refusal(causal) if own_head else "its logits are not simply those of its head"
            refusal = refusal or _check_sharing(causal, records, truth)
    finally:
        causal.train(was_training)
    if refusal is None:
        return Verdict("shared", own_head, "prompts are computed once for all their answers")
    return Verdict("padded", own_head, f"prompts are not shared: {refusal}")


def _records(
    causal: PreTrainedModel, max_length: int, generator: torch.Generator, device: torch.device
) -> list[_Record]:
    window = getattr(causal.config, "sliding_window", None)
    prefix = window + 5 if isinstance(window, int) and window < max_length else 11

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


def _static_refusal(causal: PreTrainedModel) -> str | None:
    """What is known without a forward: the first reason against sharing, if any."""
    if not causal._can_set_attn_implementation():
        return f"{type(causal).__name__} does not let its attention be replaced"
    layers = set(getattr(causal.config, "layer_types", None) or ())
    if layers - ALLOWED_LAYERS:
        return f"layers of type {', '.join(sorted(layers - ALLOWED_LAYERS))} carry state from row to row"
    if not accepts(backbone(causal), "position_ids"):
        return f"{type(causal).__name__} takes no positions"
    return None


def _check_sharing(causal: PreTrainedModel, records: Sequence[_Record], truth: Sequence[Tensor]) -> str | None:
    """Run the shared layout: the first reason against it, if any."""
    try:
        with attention(causal, SHARED_PREFIX):
            hidden = _run_shared(causal, records)
            if _leaks(causal, records, hidden):
                return "an edit of one answer changed other rows"
            logps = list(_suffix_logps(Head(causal), hidden, records))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
        # Whatever the architecture stumbles over here, it would stumble over in training: separate rows are the way.
        return f"its forward refuses the flat layout ({type(error).__name__})"
    worst = max(_error(ours, true) for ours, true in zip(logps, truth, strict=True))
    return None if worst < _tolerance(causal) else f"its log-probabilities differ by {worst:.1e} from separate rows"


def _flat(records: Sequence[_Record]) -> tuple[Tensor, Tensor, Segments]:
    ids, positions, segments, start = [], [], [], 0
    for record in records:
        shared, device = len(record.shared), record.shared.device
        ids += [record.shared, *record.suffixes]
        positions.append(torch.arange(shared, device=device))
        positions += [torch.arange(shared, shared + len(suffix), device=device) for suffix in record.suffixes]
        segments.append((start, shared, tuple(len(suffix) for suffix in record.suffixes)))
        start += shared + sum(len(suffix) for suffix in record.suffixes)
    return torch.cat(ids)[None], torch.cat(positions)[None], Segments(tuple(segments)).to(ids[0].device)


def _run_shared(causal: PreTrainedModel, records: Sequence[_Record]) -> Tensor:
    ids, positions, segments = _flat(records)
    output = backbone(causal)(input_ids=ids, position_ids=positions, use_cache=False, layout=segments)
    hidden: Tensor = output.last_hidden_state[0]
    return hidden


def _leaks(causal: PreTrainedModel, records: Sequence[_Record], hidden: Tensor) -> bool:
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
            changed = ((_run_shared(causal, edited) - hidden).abs() > allowed).any(-1)
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

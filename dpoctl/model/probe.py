"""The probe: a check at start-up of the layouts and the head that a model supports, instead of a list of model names.

Two records of two responses run as separate rows through the unchanged model, then in one layout after another, the
most efficient first. A layout is chosen only if a change to one response changes no bit of the other tokens' output,
and if its log-probabilities agree with those of separate rows. The chunked head is used only if it agrees with the
model's logits. Noise is added to adapters first, so that an adapter that is ignored would be noticed.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from dpoctl.model.attention import FLAT, PROMPT, SHARED_PREFIX, Layout, Segments, attention_arguments, use_attention
from dpoctl.model.head import Head, select_logps
from dpoctl.model.sharding import part, part_of

# Error of log-probabilities that rounding explains, relative to their standard deviation.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# Allowed error of a layout, as a multiple of the difference between separate rows and a padded batch.
NOISE_FACTOR = 3.0
# Layers whose only view of other tokens is the attention function, or that have none.
PLAIN_LAYERS = {"full_attention", "sliding_attention", "mlp", "moe"}
STATEFUL_LAYERS = {"linear_attention", "conv", "hybrid"}
# Configuration keys of the length of an attention window.
WINDOW_KEYS = ("sliding_window", "window_size")
EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts")
# Layouts to try, the most efficient first; "padded" needs no check.
CANDIDATES: tuple[Layout, ...] = ("shared", "masked", "packed")
DESCRIPTIONS: dict[Layout, str] = {
    "shared": "each prompt is computed once for all its responses",
    "masked": "each prompt is computed once for all its responses, under a dense mask",
    "packed": "there is no padding, but each response has its own copy of the prompt",
    "padded": "each response is a padded row with its own copy of the prompt",
}


@dataclass(frozen=True)
class ProbeResult:
    """The layout and the head that a model is run with.

    Attributes:
        layout: see `dpoctl.model.attention`.
        own_head: whether `dpoctl.model.head.Head` replaces the model's own logits.
        reason: the reason for the layout, for the user.
    """

    layout: Layout
    own_head: bool
    reason: str


@dataclass(frozen=True)
class _Record:
    """Random tokens: a shared prefix and the suffixes of its responses."""

    shared: Tensor
    suffixes: tuple[Tensor, ...]

    @property
    def tokens(self) -> Tensor:
        return torch.cat([self.shared, *self.suffixes])

    @property
    def parts(self) -> Tensor:
        """The number of the part that each token belongs to; see `dpoctl.model.attention`."""
        lengths = [len(self.shared), *map(len, self.suffixes)]
        return torch.cat([torch.full((length,), PROMPT + part) for part, length in enumerate(lengths)])

    @property
    def positions(self) -> Tensor:
        ends = [len(self.shared) + len(suffix) for suffix in self.suffixes]
        return torch.cat([torch.arange(len(self.shared)), *(torch.arange(len(self.shared), end) for end in ends)])

    def rows(self) -> list[Tensor]:
        return [torch.cat([self.shared, suffix]) for suffix in self.suffixes]


def backbone(causal: PreTrainedModel) -> nn.Module:
    """Return the part of a causal model below its head."""
    inner = getattr(causal, causal.base_model_prefix, None)
    # The prefix of a text tower may be the one that it has in its multimodal model.
    inner = inner if isinstance(inner, nn.Module) else getattr(causal, "model", None)
    return inner if isinstance(inner, nn.Module) else causal.base_model


def accepts(module: nn.Module, argument: str) -> bool:
    """Whether a module's forward has an argument of this name, or takes any."""
    parameters = inspect.signature(module.forward).parameters
    return argument in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


@torch.no_grad()
def probe(causal: PreTrainedModel, *, max_length: int, seed: int = 0) -> ProbeResult:
    """Choose the layout and the head for a model.

    Args:
        causal: the model, adapters injected; its state is restored afterwards.
        max_length: largest number of tokens of a row; a longer attention window is not checked.
        seed: of the probe's random tokens.
    """
    device = next(causal.parameters()).device
    records = _records(causal, max_length, torch.Generator().manual_seed(seed), device)
    was_training = causal.training
    causal.eval()
    try:
        with _perturbed_adapters(causal, seed):
            own_head, truth = _check_head(causal, records)
            if not own_head:
                return _result("padded", own_head, "its logits are not those of its head")
            tolerance = max(_tolerance(causal), NOISE_FACTOR * _rounding_noise(causal, records, truth))
            objections: list[str] = []
            for layout in CANDIDATES:
                objection = _static_objection(causal, layout) or _check(causal, layout, records, truth, tolerance)
                if objection is None:
                    return _result(layout, own_head, *objections[:1])
                objections.append(objection)
            return _result("padded", own_head, objections[0])
    finally:
        causal.train(was_training)


def _result(layout: Layout, own_head: bool, *objections: str) -> ProbeResult:
    return ProbeResult(layout, own_head, ": ".join([DESCRIPTIONS[layout], *objections]))


def _records(
    causal: PreTrainedModel, max_length: int, generator: torch.Generator, device: torch.device
) -> list[_Record]:
    windows = [window for window in _windows(causal) if window < max_length]
    prefix = max(windows) + 5 if windows else 11

    def tokens(count: int) -> Tensor:
        return torch.randint(0, int(causal.config.vocab_size), (count,), generator=generator).to(device)

    return [_Record(tokens(prefix), (tokens(7), tokens(9))), _Record(tokens(6), (tokens(5), tokens(4)))]


@contextmanager
def _perturbed_adapters(causal: PreTrainedModel, seed: int) -> Iterator[None]:
    """Add noise to the trainable parameters of a model with adapters; in a fully trained model none can be ignored."""
    trainable = [p for p in causal.parameters() if p.requires_grad]
    if len(trainable) == len(list(causal.parameters())):
        yield
        return
    saved = [part(p).clone() for p in trainable]
    generator = torch.Generator().manual_seed(seed)
    for parameter in trainable:
        noise = part_of(torch.randn(parameter.shape, generator=generator) * 0.02, parameter)
        part(parameter).add_(noise.to(parameter.device, parameter.dtype))
    try:
        yield
    finally:
        for parameter, before in zip(trainable, saved, strict=True):
            part(parameter).copy_(before)


def _check_head(causal: PreTrainedModel, records: Sequence[_Record]) -> tuple[bool, list[Tensor]]:
    """Return whether `Head` agrees with the model's logits, and the model's log-probabilities of every suffix."""
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
    values = (getattr(causal.config, name, None) for name in WINDOW_KEYS)
    return [window for window in values if isinstance(window, int)]


def _static_objection(causal: PreTrainedModel, layout: Layout) -> str | None:
    """Return the first reason against a layout that is known without a forward, if any."""
    layers = set(getattr(causal.config, "layer_types", None) or ()) - PLAIN_LAYERS
    # Some of these layers select or count keys only in rows longer than the probe's, so a forward proves nothing.
    if unknown := layers - STATEFUL_LAYERS:
        return f"layers of type {', '.join(sorted(unknown))} are not known"
    if layers and layout != "packed":
        return f"layers of type {', '.join(sorted(layers))} carry state from token to token"
    if layout in FLAT and not causal._can_set_attn_implementation():
        return f"the attention of {type(causal).__name__} cannot be replaced"
    if layout == "masked" and _windows(causal):
        return "its attention window counts columns of the mask instead of positions"
    if not accepts(backbone(causal), "position_ids"):
        return f"{type(causal).__name__} does not take position_ids"
    return None


def _rounding_noise(causal: PreTrainedModel, records: Sequence[_Record], truth: Sequence[Tensor]) -> float:
    """Return the largest difference between separate rows and the same rows in one padded batch.

    Only rounding explains it. It grows with the depth of a model, and is larger for random weights.
    """
    rows = [(row, len(record.shared)) for record in records for row in record.rows()]
    ids = pad_sequence([row for row, _ in rows], batch_first=True)
    mask = pad_sequence([torch.ones_like(row) for row, _ in rows], batch_first=True)
    hidden = backbone(causal)(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    head, errors = Head(causal), []
    for own, (row, shared), true in zip(hidden, rows, truth, strict=True):
        logps = head.logps(own[shared - 1 : len(row) - 1], row[shared:])
        errors.append(_error(logps, true))
    return max(errors)


def _check(
    causal: PreTrainedModel, layout: Layout, records: Sequence[_Record], truth: Sequence[Tensor], tolerance: float
) -> str | None:
    """Run a layout, and return the first reason against it, if any."""
    if layout == "packed":
        # Nothing is shared: each response becomes a record with one suffix.
        records = [_Record(row[:1], (row[1:],)) for record in records for row in record.rows()]
    try:
        with use_attention(causal, SHARED_PREFIX) if layout in FLAT else nullcontext():
            hidden = _run(causal, layout, records)
            if _leaks(causal, layout, records, hidden):
                return "a change to one response changed the output of others"
            logps = list(_suffix_logps(Head(causal), hidden, records))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
        # The same error would end a training run in this layout.
        return f"its forward fails in the {layout} layout ({type(error).__name__})"
    worst = max(_error(ours[-len(true) :], true) for ours, true in zip(logps, truth, strict=True))
    return None if worst < tolerance else f"its log-probabilities differ by {worst:.1e} from those of separate rows"


def _run(causal: PreTrainedModel, layout: Layout, records: Sequence[_Record]) -> Tensor:
    """Return hidden states `[tokens, hidden]`, record by record, each shared prefix before its suffixes."""
    columns = zip(*((r.tokens, r.positions, r.parts) for r in records), strict=True)
    device, segments, parts = records[0].tokens.device, None, None
    if layout in FLAT:
        ids, positions, _ = (torch.cat(column)[None] for column in columns)
        segments = _segments(records).to(device)
    else:
        ids, positions, parts = (pad_sequence(list(column), batch_first=True) for column in columns)
        parts = parts.to(device)
    output = backbone(causal)(
        input_ids=ids,
        position_ids=positions.to(device),
        use_cache=False,
        **attention_arguments(layout, segments, parts, device, causal.dtype),
    )
    hidden: Tensor = output.last_hidden_state
    return hidden[0] if parts is None else hidden[parts > 0]


def _segments(records: Sequence[_Record]) -> Segments:
    starts = accumulate((len(record.tokens) for record in records[:-1]), initial=0)
    return Segments(
        tuple((start, len(r.shared), tuple(map(len, r.suffixes))) for start, r in zip(starts, records, strict=True))
    )


def _leaks(causal: PreTrainedModel, layout: Layout, records: Sequence[_Record], hidden: Tensor) -> bool:
    """Whether a change to the tokens of one response changes the output of any other token.

    Not a bit may change, except in a model with experts: there the change moves tokens between experts, which changes
    how the matrix products of other tokens are rounded.
    """
    has_experts = any(getattr(causal.config, name, None) for name in EXPERT_KEYS)
    allowed = _tolerance(causal) * float(hidden.abs().max()) if has_experts else 0.0
    start = 0
    for index, record in enumerate(records):
        start += len(record.shared)
        for number, suffix in enumerate(record.suffixes):
            suffixes = list(record.suffixes)
            suffixes[number] = (suffix + 1) % int(causal.config.vocab_size)
            edited = [*records[:index], _Record(record.shared, tuple(suffixes)), *records[index + 1 :]]
            changed = ((_run(causal, layout, edited) - hidden).abs() > allowed).any(-1)
            changed[start : start + len(suffix)] = False
            if changed.any():
                return True
            start += len(suffix)
    return False


def _suffix_logps(head: Head, hidden: Tensor, records: Sequence[_Record]) -> Iterator[Tensor]:
    """Yield the log-probabilities of every suffix; the last shared token predicts its first token."""
    start = 0
    for record in records:
        start += len(record.shared)
        last_shared = hidden[start - 1 : start]
        for suffix in record.suffixes:
            yield head.logps(torch.cat([last_shared, hidden[start : start + len(suffix) - 1]]), suffix)
            start += len(suffix)


def _tolerance(causal: PreTrainedModel) -> float:
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else causal.dtype
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
    return TOLERANCE.get(dtype, 1e-4)


def _error(ours: Tensor, true: Tensor) -> float:
    """Return the root mean square error, relative to the standard deviation of the true values, but at least to one."""
    deviation = true.double().std().clamp(min=1.0)
    return float((ours.double() - true.double()).square().mean().sqrt() / deviation)

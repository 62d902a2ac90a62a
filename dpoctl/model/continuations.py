"""The divergence of a model from another one where the texts of the first have led."""

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpoctl.model.generate import generation_mode

TOKENS = 512
"""The most tokens in a batch: both models' logits of all continuations are in memory, in float32."""

Row = tuple[Sequence[int], Sequence[int]]
Inside = Callable[[Callable[[], Tensor]], Tensor]


@dataclass(frozen=True)
class InStep:
    """The steps that all ranks of sharded models take together.

    Attributes:
        policy: runs an action that calls the policy.
        reference: runs an action that calls the other model.
        rounds: the number of batches that every rank runs; a rank with fewer repeats the filler.
        filler: any row.
    """

    policy: Inside
    reference: Inside
    rounds: int
    filler: Row


@torch.no_grad()
def continuation_divergences(
    policy: PreTrainedModel,
    reference: Callable[[], AbstractContextManager[PreTrainedModel]],
    rows: Sequence[Row],
    on_batch: Callable[[int], None] = lambda count: None,
    *,
    longest: int | None = None,
    in_step: InStep | None = None,
) -> list[float]:
    """Return sum_t KL(policy(. | x, y_<t) || reference(. | x, y_<t)) for each prompt x and its continuation y, in nats.

    Each term is over the whole vocabulary, at temperature 1: it is never negative, however y was drawn.

    Args:
        policy: the model that wrote the continuations; its state is restored afterwards.
        reference: a context with the other model, which may be the same one without its adapter.
        rows: token ids of a prompt and of its continuation.
        on_batch: called after each batch with the number of its rows.
        longest: the tokens of the longest row on any rank; None for that of these rows.
        in_step: of sharded models; None if each rank computes by itself.
    """
    size = batch_size(longest or max((len(prompt) + len(continuation) for prompt, continuation in rows), default=1))
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    if in_step is not None:
        batches += [[in_step.filler]] * (in_step.rounds - len(batches))
    found: list[float] = []
    for batch in batches:
        ids, mask, scored = _padded(batch)
        kept = scored.any(0).nonzero()[:, 0]
        own = _log_probabilities(policy, ids, mask, kept, None if in_step is None else in_step.policy)
        with reference() as other:
            theirs = _log_probabilities(other, ids, mask, kept, None if in_step is None else in_step.reference)
        terms = (own.exp() * (own - theirs)).sum(-1)
        found += (terms * scored[:, kept].to(terms.device)).sum(1).double().tolist()
        on_batch(len(batch))
    return found[: len(rows)]


def batch_size(longest: int) -> int:
    """Return the number of rows in a batch whose longest row has so many tokens."""
    return max(1, TOKENS // longest)


def _log_probabilities(
    causal: PreTrainedModel, ids: Tensor, mask: Tensor, kept: Tensor, inside: Inside | None
) -> Tensor:
    """Return log-probabilities `[B, K, V]` at K positions; of prompts, they would take most of the memory."""

    def compute() -> Tensor:
        # Of a sharded model, only inside are the weights of the embedding whole, and on the device.
        device = cast(Tensor, causal.get_input_embeddings().weight).device
        positions = kept.to(device)
        knows = "logits_to_keep" in inspect.signature(causal.forward).parameters
        options = {"logits_to_keep": positions} if knows else {}
        with generation_mode(causal):
            logits: Tensor = causal(
                input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, **options
            ).logits
        return (logits if knows else logits[:, positions]).float().log_softmax(-1)

    return compute() if inside is None else inside(compute)


def _padded(rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """Return padded ids and mask `[B, T]`, and where in `[B, T - 1]` a token of a continuation follows."""
    width = max(len(prompt) + len(continuation) for prompt, continuation in rows)
    ids, mask, scored = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
    for row, (prompt, continuation) in enumerate(rows):
        start, end = len(prompt), len(prompt) + len(continuation)
        ids[row, :end] = torch.tensor([*prompt, *continuation])
        mask[row, :end] = 1
        scored[row, start:end] = 1
    return ids, mask, scored[:, 1:]

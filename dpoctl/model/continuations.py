"""The divergence of a model from another one where the texts of the first have led."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpoctl.model.generate import generation_mode

TOKENS = 512
"""The most tokens in a batch: the logits of both models are all in memory, in float32."""

Row = tuple[Sequence[int], Sequence[int]]


@torch.no_grad()
def continuation_divergences(
    policy: PreTrainedModel,
    reference: Callable[[], AbstractContextManager[PreTrainedModel]],
    rows: Sequence[Row],
    on_batch: Callable[[int], None] = lambda count: None,
) -> list[float]:
    """Return sum_t KL(policy(. | x, y_<t) || reference(. | x, y_<t)) for each prompt x and its continuation y, in nats.

    Each term is over the whole vocabulary, at temperature 1: it is never negative, however y was drawn.

    Args:
        policy: the model that wrote the continuations; its state is restored afterwards.
        reference: a context with the other model, which may be the same one without its adapter.
        rows: token ids of a prompt and of its continuation.
        on_batch: called after each batch with the number of its rows.
    """
    size = max(1, TOKENS // max((len(prompt) + len(continuation) for prompt, continuation in rows), default=1))
    found: list[float] = []
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        ids, mask, scored = _padded(batch, cast(Tensor, policy.get_input_embeddings().weight).device)
        own = _log_probabilities(policy, ids, mask)
        with reference() as other:
            theirs = _log_probabilities(other, ids, mask)
        terms = (own.exp() * (own - theirs)).sum(-1)
        found += (terms * scored).sum(1).double().tolist()
        on_batch(len(batch))
    return found


def _log_probabilities(causal: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    with generation_mode(causal):
        logits: Tensor = causal(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits[:, :-1].float().log_softmax(-1)


def _padded(rows: Sequence[Row], device: torch.device | str | int) -> tuple[Tensor, Tensor, Tensor]:
    """Return padded ids and mask `[B, T]`, and where in `[B, T - 1]` a token of a continuation follows."""
    width = max(len(prompt) + len(continuation) for prompt, continuation in rows)
    ids, mask, scored = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
    for row, (prompt, continuation) in enumerate(rows):
        start, end = len(prompt), len(prompt) + len(continuation)
        ids[row, :end] = torch.tensor([*prompt, *continuation])
        mask[row, :end] = 1
        scored[row, start:end] = 1
    return ids.to(device), mask.to(device), scored[:, 1:].to(device)

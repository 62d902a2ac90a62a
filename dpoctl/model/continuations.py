"""Log-probabilities of texts that were generated, under any model that shares the tokens."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpoctl.model.generate import generation_mode

TOKENS = 2048
"""The most tokens in a batch: their logits are all in memory, in float32."""

Row = tuple[Sequence[int], Sequence[int]]


def continuation_logps(causal: PreTrainedModel, rows: Sequence[Row], *, rounds: int = 0, size: int = 0) -> list[float]:
    """Return the summed log-probability of each continuation after its prompt, in nats, at temperature 1.

    Args:
        causal: the causal model; its state is restored afterwards.
        rows: token ids of a prompt and of its continuation; at least one row.
        rounds: of a sharded model, the number of batches that every rank runs, in step.
        size: of a sharded model, the number of rows in a batch.
    """
    size = size or batch_rows(rows)
    found: list[float] = []
    with generation_mode(causal), torch.no_grad():
        for start in range(0, len(rows), size):
            found += _batch(causal, rows[start : start + size]).tolist()
        for _ in range(rounds - -(-len(rows) // size)):
            _batch(causal, rows[:1])
    return found


def batch_rows(rows: Sequence[Row]) -> int:
    """Return the number of rows in a batch."""
    return max(1, TOKENS // max(len(prompt) + len(continuation) for prompt, continuation in rows))


def _batch(causal: PreTrainedModel, rows: Sequence[Row]) -> Tensor:
    device = cast(Tensor, causal.get_input_embeddings().weight).device
    width = max(len(prompt) + len(continuation) for prompt, continuation in rows)
    ids, mask, scored = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
    for row, (prompt, continuation) in enumerate(rows):
        start, end = len(prompt), len(prompt) + len(continuation)
        ids[row, :end] = torch.tensor([*prompt, *continuation])
        mask[row, :end] = 1
        scored[row, start:end] = 1
    ids, mask, scored = ids.to(device), mask.to(device), scored.to(device)
    logits: Tensor = causal(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    taken = logits.gather(2, ids[:, 1:, None])[..., 0].float()
    logps = taken - logits.float().logsumexp(-1)
    return (logps * scored[:, 1:]).sum(1).double().cpu()

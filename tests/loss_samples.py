"""Scores for the tests of losses: two pairs to work out by hand, rankings, and random ones of any shape."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from dpoctl.losses import Loss, Outline, Scores

OF_RESPONSES = ("logps", "ref_logps", "head_logps", "ref_head_logps", "confidence")


def outline(num_tokens: Sequence[int] | Tensor, pairs: Sequence[Any] | Tensor, **columns: Any) -> Outline:
    """An outline of records of two responses, without labels and targets unless they are given."""
    starts = torch.as_tensor(columns.get("starts", range(0, len(num_tokens) + 1, 2)))
    nothing = torch.full((len(starts) - 1,), -1)
    given: dict[str, Any] = {"labels": nothing, "targets": nothing, "sources": nothing + 1}
    given |= {"num_tokens": num_tokens, "pairs": pairs, "starts": starts} | columns
    tensors = {name: torch.as_tensor(value) for name, value in given.items()}
    tensors["imitated"] = tensors["targets"][tensors["targets"] >= 0]
    return Outline(**tensors | {"pairs": tensors["pairs"].reshape(-1, 2).long()})


def having(scores: Scores, **columns: Tensor) -> Scores:
    """The same scores with other columns of their outline."""
    if "targets" in columns:
        columns["imitated"] = columns["targets"][columns["targets"] >= 0]
    return replace(scores, outline=replace(scores.outline, **columns))


# Pair A: log-ratios 2 and -1, margin 3. Pair B: log-ratios -0.5 and 0.5, margin -1.
BATCH = Scores(
    logps=torch.tensor([-10.0, -14.0, -20.0, -18.0], dtype=torch.float64),
    outline=outline([5, 8, 10, 6], [[0, 1], [2, 3]], targets=[0, 2]),
    ref_logps=torch.tensor([-12.0, -13.0, -19.5, -18.5], dtype=torch.float64),
    confidence=torch.tensor([-0.7, -0.9, -0.2, -1.5], dtype=torch.float64),
)


def of_margins(margins: Sequence[float]) -> Scores:
    """Pairs whose winners have these log-ratios, and whose losers have 0."""
    logps = torch.tensor([value for margin in margins for value in (margin, 0.0)], dtype=torch.float64)
    index = torch.arange(len(logps))
    return Scores(logps, outline(torch.ones_like(index), index), torch.zeros_like(logps))


def of_rankings(*rankings: Sequence[float], dtype: torch.dtype = torch.float64) -> Scores:
    """Records whose responses have these log-ratios, each from best to worst."""
    logps = torch.tensor([ratio for ranking in rankings for ratio in ranking], dtype=dtype)
    starts = torch.tensor([0, *map(len, rankings)]).cumsum(0)
    pairs = [s + torch.tensor([*combinations(range(len(r)), 2)]) for s, r in zip(starts[:-1], rankings, strict=True)]
    lengths = torch.ones(len(logps), dtype=torch.long)
    return Scores(logps, outline(lengths, torch.cat(pairs), starts=starts), torch.zeros_like(logps))


def random_scores(loss: Loss, seed: int = 0, dtype: torch.dtype = torch.float64) -> Scores:
    """Four records of what a loss judges, with everything that it may need, and lengths of 1 to 9 tokens."""
    generator = torch.Generator().manual_seed(seed)
    scores = of_rankings(*([0.0] * size for size in ((2, 3, 4, 2) if loss.rows == "rankings" else (2, 2, 2, 2))))
    size = len(scores.logps)

    def drawn() -> torch.Tensor:
        return -5 * torch.rand(size, generator=generator, dtype=torch.float64).to(dtype) - 0.1

    logps, ref_logps = drawn(), drawn()
    scores = having(
        scores,
        num_tokens=torch.randint(1, 10, (size,), generator=generator),
        pairs=scores.pairs[:0] if loss.rows == "labels" else scores.pairs,
        labels=torch.tensor([1, 0, 0, 1]),
        targets=scores.outline.starts[:-1],
    )
    return replace(
        scores,
        logps=logps,
        ref_logps=ref_logps,
        head_logps=drawn(),
        ref_head_logps=drawn(),
        confidence=drawn() / 5,
    )


def with_equal_models(scores: Scores) -> Scores:
    """The same scores before the first update."""
    return replace(scores, ref_logps=scores.logps, ref_head_logps=scores.head_logps)


def at_step(loss: Loss, scores: Scores) -> Loss:
    """A loss in the first step of a run."""
    return loss.for_step(scores, {}, step=1, seed=0)[0]


def cast(scores: Scores, dtype: torch.dtype) -> Scores:
    """The same scores in another precision."""
    return replace(scores, **{name: v.to(dtype) for name, v in vars(scores).items() if isinstance(v, Tensor)})


def only(scores: Scores, records: Sequence[int]) -> Scores:
    """Some of the records, in this order."""
    starts, chosen = scores.outline.starts.tolist(), list(records)
    rows = torch.tensor([row for record in records for row in range(starts[record], starts[record + 1])])
    place = torch.full_like(scores.num_tokens, -1).index_copy(0, rows, torch.arange(len(rows)))
    pairs = place[scores.pairs]
    columns = {name: value[rows] for name in OF_RESPONSES if (value := getattr(scores, name)) is not None}
    return having(
        replace(scores, **columns),
        num_tokens=scores.num_tokens[rows],
        pairs=pairs[(pairs >= 0).all(1)],
        starts=torch.tensor([0, *(starts[record + 1] - starts[record] for record in records)]).cumsum(0),
        labels=scores.outline.labels[chosen],
        targets=place[scores.outline.targets[chosen]],
        sources=scores.outline.sources[chosen],
    )

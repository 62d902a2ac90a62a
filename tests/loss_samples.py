"""Scores for the tests of losses: two pairs to work out by hand, rankings, and random ones of any shape."""

from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import combinations

import torch

from dpoctl.core.losses import Loss, Scores

OF_RESPONSES = ("logps", "num_tokens", "ref_logps", "head_logps", "ref_head_logps", "confidence")

# Pair A: log-ratios 2 and -1, margin 3. Pair B: log-ratios -0.5 and 0.5, margin -1.
BATCH = Scores(
    logps=torch.tensor([-10.0, -14.0, -20.0, -18.0], dtype=torch.float64),
    num_tokens=torch.tensor([5, 8, 10, 6]),
    pairs=torch.tensor([[0, 1], [2, 3]]),
    ref_logps=torch.tensor([-12.0, -13.0, -19.5, -18.5], dtype=torch.float64),
    starts=torch.tensor([0, 2, 4]),
    targets=torch.tensor([0, 2]),
    confidence=torch.tensor([-0.7, -0.9, -0.2, -1.5], dtype=torch.float64),
)


def of_margins(margins: Sequence[float]) -> Scores:
    """Pairs whose winners have these log-ratios, and whose losers have 0."""
    logps = torch.tensor([value for margin in margins for value in (margin, 0.0)], dtype=torch.float64)
    index = torch.arange(len(logps))
    return Scores(logps, torch.ones_like(index), index.view(-1, 2), torch.zeros_like(logps))


def of_rankings(*rankings: Sequence[float], dtype: torch.dtype = torch.float64) -> Scores:
    """Records whose responses have these log-ratios, each from best to worst."""
    logps = torch.tensor([ratio for ranking in rankings for ratio in ranking], dtype=dtype)
    starts = torch.tensor([0, *map(len, rankings)]).cumsum(0)
    pairs = [s + torch.tensor([*combinations(range(len(r)), 2)]) for s, r in zip(starts[:-1], rankings, strict=True)]
    return Scores(logps, torch.ones(len(logps), dtype=torch.long), torch.cat(pairs), torch.zeros_like(logps), starts)


def random_scores(loss: Loss, seed: int = 0, dtype: torch.dtype = torch.float64) -> Scores:
    """Four records of what a loss judges, with everything that it may need, and lengths of 1 to 9 tokens."""
    generator = torch.Generator().manual_seed(seed)
    scores = of_rankings(*([0.0] * size for size in ((2, 3, 4, 2) if loss.rows == "rankings" else (2, 2, 2, 2))))
    size = len(scores.logps)

    def drawn() -> torch.Tensor:
        return -5 * torch.rand(size, generator=generator, dtype=torch.float64).to(dtype) - 0.1

    return replace(
        scores,
        logps=drawn(),
        ref_logps=drawn(),
        num_tokens=torch.randint(1, 10, (size,), generator=generator),
        pairs=scores.pairs[:0] if loss.rows == "labels" else scores.pairs,
        labels=torch.tensor([1, 0, 0, 1]),
        targets=scores.starts[:-1],  # type: ignore[index]
        head_logps=drawn(),
        ref_head_logps=drawn(),
        confidence=drawn() / 5,
    )


def with_equal_models(scores: Scores) -> Scores:
    """The same scores before the first update."""
    return replace(scores, ref_logps=scores.logps, ref_head_logps=scores.head_logps)


def settled(loss: Loss, scores: Scores) -> Loss:
    """A loss in the first step of a run."""
    return loss.settle(scores, {}, step=1, seed=0)[0]


def cast(scores: Scores, dtype: torch.dtype) -> Scores:
    """The same scores in another precision."""
    values = {field.name: getattr(scores, field.name) for field in fields(scores)}
    floats = {name: v.to(dtype) for name, v in values.items() if v is not None and v.is_floating_point()}
    return replace(scores, **floats)


def only(scores: Scores, records: Sequence[int]) -> Scores:
    """Some of the records, in this order."""
    assert scores.starts is not None
    starts = scores.starts.tolist()
    rows = torch.tensor([row for record in records for row in range(starts[record], starts[record + 1])])
    place = torch.full_like(scores.num_tokens, -1).index_copy(0, rows, torch.arange(len(rows)))
    pairs = place[scores.pairs]
    columns = {name: value[rows] for name in OF_RESPONSES if (value := getattr(scores, name)) is not None}
    return replace(
        scores,
        **columns,
        pairs=pairs[(pairs >= 0).all(1)],
        starts=torch.tensor([0, *(starts[record + 1] - starts[record] for record in records)]).cumsum(0),
        labels=None if scores.labels is None else scores.labels[list(records)],
        targets=None if scores.targets is None else place[scores.targets[list(records)]],
    )

"""The first step must give the value that theory gives: while policy and reference are equal, every margin is zero."""

from dataclasses import replace

import torch

from dpoctl import console
from dpoctl.core.losses import Scores
from dpoctl.core.losses.scores import required
from dpoctl.core.objective import Objective
from dpoctl.core.planner import Plan
from dpoctl.core.reader import Reader
from dpoctl.errors import RunError
from dpoctl.tasks.reference import evaluating

# What a loss of exactly equal log-probabilities may be off by, relative to its value.
ROUNDING = 1e-3
# Rounding of one token's log-probability, in nats; the errors of a response's tokens add up like a random walk.
NOISE_PER_TOKEN = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


@torch.no_grad()
def check_first_step(
    objective: Objective, plan: Plan, reader: Reader, at_init: float | None, dtype: torch.dtype
) -> None:
    """Compare the first micro-batch's margins and loss with their known values.

    Args:
        objective: before the first update; it compares the policy with a reference.
        plan: of the run.
        reader: of the training data.
        at_init: the loss while policy and reference are equal; `None` where it depends on the data.
        dtype: the precision of the computation.

    Raises:
        RunError: the policy that starts is not the reference: a wrong reference, dropout, or a wrong mask; or the loss
            is not what theory gives for equal models.
    """
    records = plan.step(0).schedule[objective.accelerator.process_index][0]
    with evaluating(objective.scorer):
        scores = objective.score(reader.batch(records))
    loss = f"first loss {objective.first_loss(scores):.6f}" + ("" if at_init is None else f", expected {at_init:.6f}")
    margins = (scores.margins if len(scores.pairs) else scores.log_ratios).abs()
    if margins.max() > NOISE_PER_TOKEN[dtype] * scores.num_tokens.float().max().sqrt():
        raise RunError(
            f"self-check: before the first step the margins must be 0, and one is {float(margins.max()):.3g} ({loss})",
            hint="the reference is not the policy that training starts from",
        )
    if at_init is not None:
        _check_loss(objective, scores, at_init)
    console.say(f"self-check: {loss}; |margin| <= {float(margins.max()):.1e}")


def _check_loss(objective: Objective, scores: Scores, at_init: float) -> None:
    """Judge a policy that equals the reference to the last bit."""
    equal = replace(scores, logps=required(scores.ref_logps, "ref_logps"), head_logps=scores.ref_head_logps)
    loss = objective.first_loss(equal)
    if abs(loss - at_init) > ROUNDING * abs(at_init):
        raise RunError(
            f"self-check: the loss of equal models must be {at_init:.6f}, and it is {loss:.6f}",
            hint="the loss is not what its equation says; take another one",
        )

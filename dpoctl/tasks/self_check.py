"""The first step must give the value that theory gives: while policy and reference are equal, every margin is zero."""

import torch

from dpoctl import console
from dpoctl.core.objective import Objective
from dpoctl.core.planner import Plan
from dpoctl.core.reader import Reader
from dpoctl.errors import RunError
from dpoctl.tasks.reference import evaluating

# Rounding of one token's log-probability, in nats; the errors of a response's tokens add up like a random walk.
NOISE_PER_TOKEN = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


@torch.no_grad()
def check_first_step(objective: Objective, plan: Plan, reader: Reader, at_init: float, dtype: torch.dtype) -> None:
    """Compare the first micro-batch's margins and loss with their known values.

    Args:
        objective: before the first update.
        plan: of the run.
        reader: of the training data.
        at_init: the loss while policy and reference are equal.
        dtype: the precision of the computation.

    Raises:
        RunError: the policy that starts is not the reference: a wrong reference, dropout, or a wrong mask.
    """
    records = plan.step(0).schedule[objective.accelerator.process_index][0]
    with evaluating(objective.scorer):
        scores = objective.score(reader.batch(records))
    margins = scores.margins.abs()
    allowed = NOISE_PER_TOKEN[dtype] * scores.num_tokens.float().max().sqrt()
    loss = objective.loss(scores).mean()
    if margins.max() > allowed:
        raise RunError(
            f"self-check: before the first step the margins must be 0, and one is {float(margins.max()):.3g} "
            f"(loss {float(loss):.6f}, expected {at_init:.6f})",
            hint="the reference is not the policy that training starts from",
        )
    console.say(
        f"self-check: first loss {float(loss):.6f}, expected {at_init:.6f}; |margin| <= {float(margins.max()):.1e}"
    )

"""A training step on a fake GPU: the real Scorer, Objective, report and optimizer, under a tracker."""

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import models
import numpy as np
import ranks
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from tracker import Tracker, areas

from dpoctl.core.batch import Batch
from dpoctl.core.logps import Scorer
from dpoctl.core.meters import Meter
from dpoctl.core.objective import Objective
from dpoctl.core.optim import build_optimizer
from dpoctl.core.planner import Lengths, Plan, Step
from dpoctl.core.reader import Reader
from dpoctl.data.mismatched import Mismatched
from dpoctl.model.memory import set_gradient_checkpointing
from dpoctl.model.policy import Policy
from dpoctl.model.probe import ProbeResult
from dpoctl.model.sharding import part
from dpoctl.tasks.task import build_task

SOURCES = {0: "hh", 1: "hh", 2: "other"}


class Mixed(nn.Module):
    """The Scorer as accelerate hands it to the loop: forward under autocast, nothing else."""

    def __init__(self, scorer: Scorer) -> None:
        super().__init__()
        self.scorer = scorer

    def forward(self, batch: Batch) -> Tensor:
        """Score a batch."""
        with torch.autocast("cuda", models.BF16):
            scored: Tensor = self.scorer(batch)
        return scored


def one_gpu(tracker: Tracker) -> Any:
    """What the objective asks of an accelerator, where there is one rank on a GPU."""
    return SimpleNamespace(
        device=models.GPU,
        num_processes=1,
        process_index=0,
        is_main_process=True,
        backward=tracker.named("backward", lambda loss: loss.backward()),
        no_sync=lambda _: nullcontext(),
        gather=lambda tensor: tensor,
    )


@dataclass(frozen=True)
class Scene:
    """Everything that a traced step needs.

    Attributes:
        fakes: the world that it plays in.
        policy: trained.
        objective: over it.
        optimizer: of the recipe.
        step: of the plan.
        reader: of its records, onto the GPU.
        batches: of it, still on the host.
        tracker: to watch it with.
        clip: the gradient, to a norm.
    """

    fakes: FakeTensorMode
    policy: Policy
    objective: Objective
    optimizer: Any
    step: Step
    reader: Reader
    batches: list[Batch]
    tracker: Tracker
    clip: Callable[[float], Any]


def prepare(
    fakes: FakeTensorMode,
    policy: Policy,
    kind: str,
    *,
    loss: Mapping[str, Any] | None = None,
    method: str = "dpo",
    recomputed: int = 0,
    optimizer: bool = False,
    budget: int = 1 << 62,
    keep_calls: bool = False,
    num_ranks: int = 1,
) -> Scene:
    """Set the scene of a step with 16 records.

    Args:
        fakes: the world of the policy.
        policy: of a kind.
        kind: see `models.KINDS`.
        loss: of `dpo`; the sigmoid loss if left out.
        method: `dpo` or `sft`.
        recomputed: every how many layers are recomputed in backward.
        optimizer: with an optimizer whose states are there, as in all steps but the first.
        budget: tokens of a micro-batch; all records are in one if left out.
        keep_calls: see `Tracker`.
        num_ranks: over which the model is divided.
    """
    recipe = models.recipe(kind, loss, method)
    task = build_task(recipe)
    store: Any = models.pairs() if task.rows in ("pairs", "rankings") else models.demonstrations()
    if "mismatched" in task.needs:
        store = Mismatched(store, 1024)
    set_gradient_checkpointing(policy.causal, recomputed)
    confidence = "confidence" in task.needs
    scorer = Scorer(policy.model, policy.causal, ProbeResult("shared", True, ""), confidence=confidence).train()
    responses = int(store.response_start[-1])
    reference = np.linspace(-90, -30, responses, dtype=np.float32)
    on_host = Reader(
        store,
        "shared",
        torch.device("cpu"),
        ref_logps=reference if task.needs_reference else None,
        ref_head_logps=reference / 2 if "head" in task.needs else None,
        names=SOURCES,
    )
    tracker = Tracker(areas=areas(records(store)), keep_calls=keep_calls)
    vars(scorer._head)["logps"] = tracker.named("head", scorer._head.logps)
    objective = Objective(one_gpu(tracker), Mixed(scorer), task.terms, tracker.named("report", task.report))
    trained, clip = _stand(scorer, kind, num_ranks, fakes, tracker)
    optim = build_optimizer(trained, recipe.training) if optimizer else None
    if optim is not None:
        with fakes, tracker:
            begin(optim)
    step = Plan(Lengths.of(store), len(store), max_tokens=budget).step(0)
    batches = on_host.batches(step.schedule[0])
    return Scene(fakes, policy, objective, optim, step, replace(on_host, device=models.GPU), batches, tracker, clip)


def _stand(
    scorer: Scorer, kind: str, num_ranks: int, fakes: FakeTensorMode, tracker: Tracker
) -> tuple[Iterator[tuple[str, nn.Parameter]], Callable[[float], Any]]:
    """Show a tracker what stands before a step, and return what is trained, and what clips its gradient."""
    model = scorer.model
    scales = packed(model)
    if num_ranks > 1:
        trained, clip = ranks.divide(scorer, kind, num_ranks, fakes, tracker)
        # Whole weights must be gone.
        gc.collect()
    else:
        trained, clip = model.named_parameters(), partial(nn.utils.clip_grad_norm_, list(model.parameters()))
    tracker.note(*map(part, model.parameters()), *model.buffers(), *scales)
    return trained, clip


def run(scene: Scene) -> Tracker:
    """Take a step: forward and backward, with reports, and the update where there is an optimizer."""
    step, tracker = scene.step, scene.tracker
    with scene.fakes, tracker:
        batches = [batch.to(models.GPU) for batch in scene.batches]
        tracker.restart()
        meter = Meter(models.GPU)
        with tracker.during("forward"):
            scene.objective.backward(step, scene.reader, meter, batches)
        if scene.optimizer is not None:
            with tracker.during("update"):
                scene.clip(1.0)
                scene.optimizer.step()
        scene.policy.model.zero_grad()
    return tracker


def records(store: Any) -> list[tuple[int, list[int]]]:
    """For each record the length of its prefix and those of its suffixes."""
    examples = [store.example(number) for number in range(len(store.label))]
    return [(len(one.shared), [len(suffix) for suffix in one.suffixes]) for one in examples]


def packed(model: nn.Module) -> list[Tensor]:
    """What stands beside quantised weights: scales, and those of the scales."""
    found: list[Tensor] = []
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            found += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        elif getattr(parameter, "SCB", None) is not None:
            found += [parameter.CB, parameter.SCB]  # type: ignore[attr-defined]
    return found


def begin(optimizer: Any) -> None:
    """Let an optimizer make its states."""
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()

"""An observer for the tests of the loop, and a model of one parameter that a run takes no time to train."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from accelerate import Accelerator
from memory_store import MemoryStore, random_pairs
from torch import Tensor, nn

from dpoctl.core.guard import Guard
from dpoctl.core.objective import Objective
from dpoctl.core.planner import Lengths, Plan
from dpoctl.core.reader import Reader
from dpoctl.core.step import MemoryRetry, Stepper
from dpoctl.losses import Loss, Term, TokenNLL

VOCABULARY = 320


class Notes:
    """An observer that writes down all that it is told, in order.

    Attributes:
        events: the methods that were called, each with its step.
        rows: the metrics that were logged, each with its step.
        hear: called with each event.
        stop_after: the event after which it asks for the end.
        bests: the steps whose evaluation it wants a checkpoint of.
    """

    def __init__(
        self, hear: Callable[[str], object] = lambda event: None, stop_after: str = "", bests: Collection[int] = ()
    ) -> None:
        self.events: list[str] = []
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.hear, self.stop_after, self.bests = hear, stop_after, bests

    def advance(self, step: int) -> None:
        self._note(f"advance {step}")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.rows.append((step, metrics))
        prefix = "eval " if any(name.startswith("eval_") for name in metrics) else ""
        self._note(f"log {prefix}{step}")

    def evaluated(self, step: int) -> None:
        self._note(f"evaluated {step}")

    def should_stop(self) -> bool:
        return self.stop_after in self.events

    def wants_checkpoint(self, step: int) -> bool:
        return step in self.bests

    def save(self, step: int, *, owes_evaluation: bool) -> None:
        self._note(f"save {step}{', evaluation owed' if owes_evaluation else ''}")

    def wait_saved(self) -> None:
        self._note("wait_saved")

    def _note(self, event: str) -> None:
        self.events.append(event)
        self.hear(event)


class Unigrams(nn.Module):
    """A scorer with one logit for each token, whatever the context."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(VOCABULARY))

    def forward(self, batch: Any) -> Tensor:
        return self.logits.log_softmax(-1)[batch.score_tgt]


def stepper_of(
    loss: Loss | None = None,
    *,
    retry: MemoryRetry | None = None,
    max_tokens: int = 1 << 62,
    reference: Any = None,
    on_nonfinite: Any = "stop",
) -> Stepper:
    """Train unigrams on eleven pairs for two epochs of four steps."""
    accelerator, store = Accelerator(cpu=True), MemoryStore(random_pairs(11))
    terms = (Term(1.0, TokenNLL() if loss is None else loss),)
    objective = Objective(accelerator, Unigrams(), terms, lambda *_: {}, reference)
    return Stepper(
        objective,
        accelerator.prepare(torch.optim.SGD(objective.scorer.parameters(), lr=0.0)),
        Plan(Lengths.of(store), 3, max_tokens=max_tokens, seed=0, num_epochs=2),  # type: ignore[arg-type]
        Reader(store, "shared", torch.device("cpu")),  # type: ignore[arg-type]
        Guard(accelerator, on_nonfinite),
        learning_rate=lambda number: 0.1 * (number + 1),
        max_grad_norm=1.0,
        retry=retry or MemoryRetry(allowed=False),
        clip=lambda bound: accelerator.clip_grad_norm_(objective.scorer.parameters(), bound),
    )

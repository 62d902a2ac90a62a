"""What a recipe cannot say because it is code: the arguments of `dpoctl.sft` and `dpoctl.dpo`, in one value."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from dpoctl.core.collator import Collate, collate
from dpoctl.core.loop import Metrics
from dpoctl.core.losses import Scores
from dpoctl.core.meters import Total
from dpoctl.core.objective import Judged, Report
from dpoctl.core.optim import build_optimizer, learning_rate
from dpoctl.errors import UsageError
from dpoctl.model.policy import Policy
from dpoctl.recipe.schema import TrainingSection

Callback = Callable[[int, Metrics], object]
ExtraMetrics = Callable[[Scores, Tensor], Mapping[str, Total]]
ENVIRONMENT, RECORD = "env.json", "extensions"


@dataclass(frozen=True, kw_only=True)
class Extensions:
    """The parts of a run that code replaces; by default none. `dpoctl.sft` says what each must do."""

    collator: Collate = collate
    model_init: Callable[[], PreTrainedModel] | None = None
    callbacks: tuple[Callback, ...] = ()
    optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None
    learning_rate: Callable[[int], float] | None = None
    extra_metrics: ExtraMetrics | None = None

    def names(self) -> dict[str, list[str]]:
        """What is replaced, and the qualified names of the code: kept with the run, for a run cannot keep the code."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        replaced = {name: value for name, value in given.items() if value and value is not collate}
        return {
            name: [_qualified(code) for code in (value if isinstance(value, tuple) else (value,))]
            for name, value in replaced.items()
        }

    def check_resumed(self, run: Path) -> None:
        """See that a run that goes on is given the code that it began with.

        Raises:
            UsageError: It is given other code.
        """
        began, now = recorded_in(run), self.names()
        odd = sorted(name for name in began.keys() | now.keys() if began.get(name) != now.get(name))
        if odd:
            before = ", ".join(began.get(odd[0], ["none"]))
            raise UsageError(f"{run} began with {odd[0]}: {before}", hint="go on from the code that began it")

    def build_optimizer(self, policy: Policy, training: TrainingSection) -> Optimizer:
        """Build the optimizer over the parameters that train.

        Raises:
            UsageError: The callable gives something else.
        """
        if self.optimizer is None:
            return build_optimizer(policy.model.named_parameters(), training)
        built: object = self.optimizer([p for p in policy.model.parameters() if p.requires_grad])
        if not isinstance(built, Optimizer):
            raise UsageError(f"optimizer gave a {type(built).__name__}, not a torch optimizer")
        return built

    def rates(self, training: TrainingSection, num_steps: int) -> Callable[[int], float]:
        """The learning rate of each step, counted from 0."""
        own = self.learning_rate
        return learning_rate(training, num_steps) if own is None else lambda step: float(own(step))

    def report(self, own: Report) -> Report:
        """The metrics of the task, and the extra ones beside them."""
        extra = self.extra_metrics
        if extra is None:
            return own

        def both(scores: Scores, judged: Sequence[Judged], names: Mapping[int, str]) -> Mapping[str, Total]:
            task, more = own(scores, judged, names), extra(scores, judged[0].values)
            if clash := sorted({"loss", *task} & more.keys()):
                raise UsageError(f"extra_metrics: {clash[0]} is a metric already", hint="give it another name")
            return {**task, **more}

        return both


class Listeners:
    """Callbacks, which hear every row of metrics on the first rank, and may end the run.

    Args:
        callbacks: called in order with the step and its metrics; one that returns True asks for the end.
        log: what happens to the row before.
        accelerator: all ranks end together.
    """

    def __init__(
        self, callbacks: tuple[Callback, ...], log: Callable[[int, Metrics], None], accelerator: Accelerator
    ) -> None:
        self._callbacks, self._log, self._accelerator = callbacks, log, accelerator
        self._asked = False

    def log(self, step: int, metrics: Metrics) -> None:
        """Write a row of metrics, then let the callbacks see it."""
        self._log(step, metrics)
        if self._accelerator.is_main_process:
            # A list first: all of them hear it, whatever the first one wants.
            answers = [callback(step, dict(metrics)) for callback in self._callbacks]
            self._asked |= any(answer is True for answer in answers)

    def ended(self) -> bool:
        """Whether a callback has asked for the end, the same on all ranks."""
        if not self._callbacks or self._accelerator.num_processes == 1:
            return self._asked
        asked: Tensor = self._accelerator.reduce(torch.tensor(int(self._asked), device=self._accelerator.device))
        return bool(asked > 0)


def recorded_in(run: Path) -> dict[str, list[str]]:
    """What of a run was code, by the names that it kept; empty for a run of the command line."""
    file = run / ENVIRONMENT
    known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    found: dict[str, list[str]] = known.get(RECORD, {})
    return found


def _qualified(code: object) -> str:
    name = getattr(code, "__qualname__", None) or type(code).__qualname__
    return f"{getattr(code, '__module__', None) or type(code).__module__}.{name}"

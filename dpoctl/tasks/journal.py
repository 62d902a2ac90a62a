"""What is written while the loop walks: metrics, progress, checkpoints; and how a run takes them up again."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import yaml
from accelerate import Accelerator

from dpoctl import console
from dpoctl.core.loop import Metrics
from dpoctl.core.planner import Plan
from dpoctl.model.policy import Policy
from dpoctl.recipe.schema import Recipe
from dpoctl.runs import checkpoint, rng
from dpoctl.runs.checkpoint import Checkpoint
from dpoctl.runs.directory import RunDirectory
from dpoctl.runs.metrics import MetricsFile
from dpoctl.runs.progress import Progress
from dpoctl.runs.trackers import Trackers


class Journal:
    """The outputs of one run, on every rank; entering it puts back what a checkpoint holds.

    Args:
        recipe: of the run.
        directory: where everything goes.
        accelerator: ranks, and the loss scale.
        policy: whose trained weights a checkpoint holds.
        optimizer: as accelerate prepared it.
        plan: of the run.
        resumed: the checkpoint to go on from.
        data_key: of the training store; a checkpoint remembers it.
    """

    def __init__(
        self,
        recipe: Recipe,
        directory: RunDirectory,
        accelerator: Accelerator,
        policy: Policy,
        optimizer: Any,
        plan: Plan,
        resumed: Checkpoint | None,
        *,
        data_key: str,
    ) -> None:
        self.last: Metrics = {}
        self._recipe, self._directory, self._accelerator = recipe, directory, accelerator
        self._policy, self._optimizer, self._plan = policy, optimizer.optimizer, plan
        self._metrics = MetricsFile(directory.metrics)
        self._progress = Progress(plan.num_steps, start=resumed.step if resumed else 0)
        self._trackers: Trackers | None = None
        self._resumed, self._data_key = resumed, data_key

    def __enter__(self) -> Self:
        resumed = self._resumed
        if self._accelerator.is_main_process:
            self._metrics.truncate_after(resumed.step if resumed else -1)
        if resumed is not None:
            self._restore(resumed)
        if self._accelerator.is_main_process:
            self._trackers = Trackers(
                self._recipe.training.report_to,
                self._directory.path,
                config=yaml.safe_load(self._recipe.to_yaml()),
                run_name=self._recipe.training.run_name,
                resumed_at=resumed.step if resumed else None,
            )
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.__exit__(kind, error, trace)
        if self._trackers is not None:
            self._trackers.finish()

    def log(self, step: int, metrics: Metrics) -> None:
        """Write a row of metrics, of training or of an evaluation."""
        evaluation = any(name.startswith("eval_") for name in metrics)
        self.last = self.last | metrics
        if not self._accelerator.is_main_process:
            return
        self._metrics.append({"step": step, **metrics})
        if self._trackers is not None:
            plain = {name.removeprefix("eval_"): value for name, value in metrics.items()}
            self._trackers.log(plain, step, prefix="eval" if evaluation else "train")
        if evaluation:
            console.say("  ".join([f"eval at step {step}", *(f"{n} {v:.4g}" for n, v in metrics.items())]))
        else:
            self._progress.update(step, metrics)

    def log_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Send texts to the trackers."""
        if self._trackers is not None:
            self._trackers.log_texts(texts, step)

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        self._progress.update(step)

    def save(self, step: int) -> None:
        """Write a checkpoint; every rank calls this at the same step."""
        extra: dict[str, Any] = {"max_tokens": self._plan.max_tokens, "data": self._data_key}
        if self._accelerator.scaler is not None:
            extra["scaler"] = self._accelerator.scaler.state_dict()
        checkpoint.save(
            self._directory.checkpoints,
            Checkpoint(step, self._policy.trainable_state(), self._optimizer.state_dict(), rng.capture(), extra),
            rank=self._accelerator.process_index,
            world_size=self._accelerator.num_processes,
            barrier=self._accelerator.wait_for_everyone,
            keep=self._recipe.training.save_total_limit,
        )

    def _restore(self, resumed: Checkpoint) -> None:
        self._policy.load_trainable_state(resumed.weights)
        self._optimizer.load_state_dict(resumed.optimizer)
        if self._accelerator.scaler is not None and "scaler" in resumed.extra:
            self._accelerator.scaler.load_state_dict(resumed.extra["scaler"])
        if resumed.rng:
            rng.restore(resumed.rng)
        else:
            console.warn(
                "this rank is new: dropout is drawn anew, so the run goes on with the same maths, not the same bits"
            )
        console.say(f"resumed from step {resumed.step:,}")

"""What is written while the loop walks: metrics, progress, checkpoints; and how a run takes them up again."""

from collections.abc import Mapping
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self

import yaml
from accelerate import Accelerator

from dpoctl import console
from dpoctl.core.guard import Guard, checksum, refuse_different
from dpoctl.core.loop import Metrics
from dpoctl.core.objective import Objective
from dpoctl.core.planner import Plan
from dpoctl.model.policy import Policy
from dpoctl.recipe.schema import Recipe
from dpoctl.runs import rng
from dpoctl.runs.checkpoint import Checkpoint, Saver
from dpoctl.runs.directory import RunDirectory
from dpoctl.runs.health import Expectation, Health
from dpoctl.runs.metrics import MetricsFile
from dpoctl.runs.progress import Progress
from dpoctl.runs.trackers import Trackers
from dpoctl.tasks.reference import Live
from dpoctl.tasks.trouble import Relief

SHARDING = ("FSDP", "DEEPSPEED", "MEGATRON_LM")
"""Where ranks hold different weights by intention."""


class Journal:
    """The outputs of one run, on every rank; entering it puts back what a checkpoint holds.

    Args:
        recipe: of the run.
        directory: where everything goes.
        accelerator: ranks, and the loss scale.
        policy: whose trained weights a checkpoint holds.
        optimizer: as accelerate prepared it.
        plan: of the run.
        objective: whose losses carry a memory from step to step.
        resumed: the checkpoint to go on from.
        data_key: of the training store; a checkpoint remembers it.
        guard: whose count of rejected steps a checkpoint remembers.
        relief: whose token budget a checkpoint remembers.
        live: the reference that runs beside the policy.
        expected: what a healthy run would look like.
    """

    def __init__(
        self,
        recipe: Recipe,
        directory: RunDirectory,
        accelerator: Accelerator,
        policy: Policy,
        optimizer: Any,
        plan: Plan,
        objective: Objective,
        resumed: Checkpoint | None,
        *,
        data_key: str,
        guard: Guard,
        relief: Relief,
        live: Live | None = None,
        expected: Expectation,
    ) -> None:
        self.last: Metrics = {}
        self._recipe, self._directory, self._accelerator = recipe, directory, accelerator
        self._policy, self._optimizer = policy, optimizer.optimizer
        self._objective, self._guard = objective, guard
        self._relief = relief
        self._saver = Saver(
            directory.checkpoints,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            barrier=accelerator.wait_for_everyone,
            keep=recipe.training.save_total_limit,
        )
        self._metrics = MetricsFile(directory.metrics)
        self._progress = Progress(plan.num_steps, start=resumed.step if resumed else 0)
        self._trackers: Trackers | None = None
        self._resumed, self._data_key, self._live = resumed, data_key, live
        self._health = Health(expected)

    def __enter__(self) -> Self:
        resumed = self._resumed
        if self._accelerator.is_main_process:
            self._metrics.truncate_after(resumed.step if resumed else -1)
            for row in self._metrics.rows():
                self._health.watch(row)
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
        self._saver.abandon()
        if self._trackers is not None:
            self._trackers.finish()

    def log(self, step: int, metrics: Metrics) -> None:
        """Write a row of metrics, of training or of an evaluation."""
        evaluation = any(name.startswith("eval_") for name in metrics)
        self.last = self.last | metrics
        if not self._accelerator.is_main_process:
            return
        self._metrics.append({"step": step, **metrics})
        self._examine({"step": step, **metrics})
        if self._trackers is not None:
            plain = {name.removeprefix("eval_"): value for name, value in metrics.items()}
            self._trackers.log(plain, step, prefix="eval" if evaluation else "train")
        if evaluation:
            console.say("  ".join([f"eval at step {step}", *(f"{n} {v:.4g}" for n, v in metrics.items())]))
        else:
            self._progress.update(step, metrics)

    def _examine(self, row: Metrics) -> None:
        """Say what is new in a row that a healthy run would not show, and keep it with the run."""
        symptoms = self._health.watch(row)
        for symptom in symptoms:
            console.warn(f"{symptom}; {symptom.hint}")
        if symptoms:
            self._directory.write_json("health.json", [asdict(symptom) for symptom in self._health.symptoms])

    def log_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Send texts to the trackers."""
        if self._trackers is not None:
            self._trackers.log_texts(texts, step)

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        self._progress.update(step)

    def save(self, step: int) -> None:
        """Begin to write a checkpoint; every rank calls this at the same step."""
        weights = self._policy.trainable_state()
        if not self._accelerator.distributed_type.startswith(SHARDING):
            refuse_different(self._accelerator, "weights", checksum(weights.values()))
        extra: dict[str, Any] = {
            "max_tokens": self._relief.max_tokens,
            "relieved": self._relief.used,
            "skipped_steps": self._guard.skipped,
            "data": self._data_key,
            "memory": list(self._objective.memory),
        }
        if self._accelerator.scaler is not None:
            extra["scaler"] = self._accelerator.scaler.state_dict()
        moved = {} if self._live is None else self._live.state()
        self._saver.save(Checkpoint(step, weights, self._optimizer.state_dict(), rng.capture(), extra, moved))

    def settle(self) -> None:
        """Wait until the last checkpoint is on the disk; every rank calls this at the same step."""
        self._saver.wait()

    def _restore(self, resumed: Checkpoint) -> None:
        self._policy.load_trainable_state(resumed.weights)
        self._optimizer.load_state_dict(resumed.optimizer)
        self._guard.skipped = resumed.extra.get("skipped_steps", 0)
        self._objective.memory = tuple(resumed.extra.get("memory", self._objective.memory))
        if self._live is not None:
            self._live.load_state(resumed.reference)
        if self._accelerator.scaler is not None and "scaler" in resumed.extra:
            self._accelerator.scaler.load_state_dict(resumed.extra["scaler"])
        if resumed.rng:
            rng.restore(resumed.rng)
        else:
            console.warn(
                "this rank is new: dropout is drawn anew, so the run goes on with the same maths, not the same bits"
            )
        console.say(f"resumed from step {resumed.step:,}")

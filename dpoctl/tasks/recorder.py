"""The recorder of a run: metrics, progress, samples and checkpoints while the loop runs; and its state on a resume."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Self

import torch
import yaml
from accelerate.utils import broadcast_object_list
from torch import Tensor

from dpoctl import console
from dpoctl.core.guard import require_same, tensor_checksum
from dpoctl.core.loop import Metrics
from dpoctl.core.step import Stepper
from dpoctl.recipe.consistency import resolved_yaml
from dpoctl.runs.best import BestEvaluation
from dpoctl.runs.checkpoint import Checkpoint, Saver, capture_rng, restore_rng
from dpoctl.runs.directory import RunDirectory
from dpoctl.runs.health import Expectation, Health
from dpoctl.runs.metrics import MetricsFile, Progress, evaluation_line
from dpoctl.runs.trackers import Trackers
from dpoctl.tasks.comparison import Comparison
from dpoctl.tasks.samples import Samples
from dpoctl.tasks.setup import Setup

OWES_EVALUATION = "owes_evaluation"
"""In a checkpoint: True if the run was stopped before the evaluation that was due at its step."""

BEST = "best"
"""In a checkpoint: the best evaluation so far, if the recipe asks for it."""


class Recorder:
    """The observer of a run, on every rank; entering it restores the checkpoint to resume from.

    Args:
        setup: of the run; the trained weights of its policy go into checkpoints.
        directory: takes all files.
        stepper: its state goes into checkpoints.
        samples: drawn after each evaluation.
        callbacks: called with each step and its metrics, on the first rank; one that returns True ends the run.
        resumed: the checkpoint to resume from.
        inputs: what the run depends on, for its checkpoints.
        expected: the figures of a healthy run.
        comparison: of its forecast with what it takes; None makes none.
    """

    def __init__(
        self,
        setup: Setup,
        directory: RunDirectory,
        stepper: Stepper,
        *,
        samples: Samples,
        callbacks: Sequence[Callable[[int, Metrics], object]],
        resumed: Checkpoint | None,
        inputs: Mapping[str, Any],
        expected: Expectation,
        comparison: Comparison | None = None,
    ) -> None:
        self.last: Metrics = {}
        keep = setup.recipe.training.keep_best
        self.best = None if keep is None else BestEvaluation(keep.metric, keep.mode)
        self._evaluation: Metrics = {}
        self._recipe, self._directory, self._policy, self._stepper = setup.recipe, directory, setup.policy, stepper
        self._is_sharded = setup.sharding is not None
        self._samples, self._callbacks, self._resumed, self._inputs = samples, callbacks, resumed, inputs
        self._accelerator = stepper.objective.accelerator
        self._saver = Saver(
            directory.checkpoints,
            rank=self._accelerator.process_index,
            world_size=self._accelerator.num_processes,
            barrier=self._accelerator.wait_for_everyone,
            keep=setup.recipe.training.save_total_limit,
            shards=1 if setup.sharding is None else setup.sharding.shards,
        )
        self._metrics = MetricsFile(directory.metrics)
        self._progress = Progress(stepper.plan.num_steps, start=resumed.step if resumed else 0)
        self._trackers: Trackers | None = None
        self._health, self._comparison = Health(expected), comparison
        self._stop_asked = False

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
                config=yaml.safe_load(resolved_yaml(self._recipe)),
                run_name=self._recipe.training.run_name,
                resumed_at=resumed.step if resumed else None,
            )
        self._progress.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._progress.__exit__(*exception)
        self._saver.abandon()
        if self._trackers is not None:
            self._trackers.finish()

    def advance(self, step: int) -> None:
        """Move the progress bar, and look after the checkpoint that is being written."""
        self._progress.update(step)
        self._saver.check()

    def log(self, step: int, metrics: Metrics) -> None:
        """Write a row of metrics, and pass it to the callbacks."""
        if self._comparison is not None and "tokens_per_second" in metrics:
            metrics = {**metrics, **self._comparison.after(step, metrics["tokens_per_second"])}
        self._write(step, metrics)
        if self._accelerator.is_main_process:
            # A list first: every callback is called, whatever an earlier one returned.
            answers = [callback(step, dict(metrics)) for callback in self._callbacks]
            self._stop_asked |= any(answer is True for answer in answers)

    def evaluated(self, step: int) -> None:
        """Draw, log and show samples, if the recipe asks for them."""
        samples = self._samples.draw(step)
        if samples:
            self._write(step, self._samples.metrics(samples))
        if samples and self._trackers is not None:
            self._trackers.log_texts(self._samples.write(step, samples), step)
        evaluation, self._evaluation = self._evaluation, {}
        if self.best is not None:
            # All ranks decide alike, whatever the rounding of each.
            (evaluation,) = broadcast_object_list([evaluation])
            stopping = self._recipe.training.early_stopping
            self.best.watch(step, evaluation, 0.0 if stopping is None else stopping.min_delta)

    def should_stop(self) -> bool:
        """Whether a callback has asked for the end or evaluations no longer improve, the same on all ranks."""
        stopping = self._recipe.training.early_stopping
        if self.best is not None and stopping is not None and self.best.waited >= stopping.patience:
            return True
        if not self._callbacks or self._accelerator.num_processes == 1:
            return self._stop_asked
        asked: Tensor = self._accelerator.reduce(torch.tensor(int(self._stop_asked), device=self._accelerator.device))
        return bool(asked > 0)

    def wants_checkpoint(self, step: int) -> bool:
        """Whether the evaluation of a step is the best one so far."""
        return self.best is not None and self.best.step == step

    def save(self, step: int, *, owes_evaluation: bool) -> None:
        """Begin to write a checkpoint; every rank calls this at the same step."""
        stepper, objective = self._stepper, self._stepper.objective
        weights = self._policy.state()
        if not self._is_sharded:
            require_same(self._accelerator, "weights", tensor_checksum(weights.values()))
        extra: dict[str, Any] = {
            "max_tokens": stepper.plan.max_tokens,
            "relieved": stepper.retry.used,
            "skipped_steps": stepper.guard.skipped,
            "inputs": dict(self._inputs),
            "memory": list(objective.memory),
            OWES_EVALUATION: owes_evaluation,
            BEST: None if self.best is None else self.best.state(),
        }
        if self._accelerator.scaler is not None:
            extra["scaler"] = self._accelerator.scaler.state_dict()
        reference = {} if objective.reference is None else objective.reference.state()
        optimizer = stepper.optimizer.optimizer.state_dict()
        best = None if self.best is None else self.best.step
        self._saver.save(Checkpoint(step, weights, optimizer, capture_rng(), extra, reference, best))

    def summary(self) -> dict[str, Any]:
        """Return the last value of every metric, and the best evaluation if the recipe asks for it."""
        best = {} if self.best is None else {"best": {"step": self.best.step, self.best.metric: self.best.value}}
        return {"metrics": self.last, **best}

    def wait_saved(self) -> None:
        """Wait until the last checkpoint is on the disk; every rank calls this at the same step."""
        self._saver.wait()

    def _write(self, step: int, metrics: Metrics) -> None:
        """Write a row of metrics, of training or of an evaluation."""
        evaluation = any(name.startswith("eval_") for name in metrics)
        self.last = self.last | metrics
        self._evaluation |= metrics if evaluation else {}
        if not self._accelerator.is_main_process:
            return
        self._metrics.append({"step": step, **metrics, "time": datetime.now(UTC).isoformat(timespec="seconds")})
        self._check_health({"step": step, **metrics})
        if self._trackers is not None:
            plain = {name.removeprefix("eval_"): value for name, value in metrics.items()}
            self._trackers.log(plain, step, prefix="eval" if evaluation else "train")
        if evaluation:
            console.say(evaluation_line(step, metrics))
        else:
            self._progress.update(step, metrics)

    def _check_health(self, row: Metrics) -> None:
        """Warn about new symptoms in a row, and keep them with the run."""
        symptoms = self._health.watch(row)
        for symptom in symptoms:
            console.warn(f"{symptom}; {symptom.hint}")
        if symptoms:
            self._directory.write_json("health.json", [asdict(symptom) for symptom in self._health.symptoms])

    def _restore(self, resumed: Checkpoint) -> None:
        stepper, objective = self._stepper, self._stepper.objective
        self._policy.load_state(resumed.weights)
        stepper.optimizer.optimizer.load_state_dict(resumed.optimizer)
        if self.best is not None:
            self.best.load_state(resumed.extra.get(BEST))
        stepper.guard.skipped = resumed.extra.get("skipped_steps", 0)
        objective.keep_memory(tuple(resumed.extra.get("memory", objective.memory)))
        if objective.reference is not None:
            objective.reference.load_state(resumed.reference)
        if self._accelerator.scaler is not None and "scaler" in resumed.extra:
            self._accelerator.scaler.load_state_dict(resumed.extra["scaler"])
        # A rank that is new has none, and draws its dropout anew.
        if resumed.rng:
            restore_rng(resumed.rng)
        # Its tensors take as much memory as the weights and the optimizer state.
        resumed.release()
        console.say(f"resumed from step {resumed.step:,}")

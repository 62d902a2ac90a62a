"""The model of the best evaluation of a run, read from its checkpoint when training ends."""

from pathlib import Path

from dpoctl import console
from dpoctl.errors import RunError
from dpoctl.runs import checkpoint
from dpoctl.runs.best import BestEvaluation
from dpoctl.tasks.setup import Setup


def take_best(setup: Setup, checkpoints: Path, best: BestEvaluation, done: int, planned: int) -> None:
    """Put the weights of the best checkpoint into the policy, and say which step that is; all ranks call this.

    Args:
        setup: of the run, whose policy has the weights of its last step.
        checkpoints: the folder of the checkpoints.
        best: the best evaluation.
        done: the number of steps that were done.
        planned: the number of steps of the plan.

    Raises:
        RunError: That checkpoint is damaged.
    """
    if done < planned and setup.recipe.training.early_stopping is not None:
        console.say(f"stopped after step {done:,} of {planned:,}: {best.waited} evaluations without an improvement")
    if best.step is None or best.value is None:
        console.warn(f"no evaluation has a finite {best.metric}; the model of the last step is exported")
        return
    last = "not finite" if best.last_value is None else f"{best.last_value:.4g}"
    console.say(
        f"best: step {best.step:,}, {best.metric} {best.value:.4g}; the last evaluation, at step {best.last_step:,}, "
        f"has {last}; the model of step {best.step:,} is exported"
    )
    if best.step == done:
        return
    folder = checkpoint.folder_of(checkpoints, best.step)
    if damage := checkpoint.find_damage(folder):
        raise RunError(
            f"{folder}, the best checkpoint, is damaged: {damage}",
            hint="restore it from a backup and continue with --resume, "
            "or export the last step with --resume training.keep_best=null training.early_stopping=null",
        )
    shards = 1 if setup.sharding is None else setup.sharding.shards
    weights = checkpoint.load_weights(folder, setup.accelerator.process_index, shards)
    setup.policy.load_state(weights)

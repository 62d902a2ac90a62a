"""The model of an earlier step: written from its checkpoint into the run, as a folder that loads as the run does."""

import shutil
from pathlib import Path

from dpoctl import console
from dpoctl.data.prepare import iter_texts
from dpoctl.errors import RunError, UsageError
from dpoctl.files import temporary_folder
from dpoctl.model.export import export_model
from dpoctl.model.load import load_policy
from dpoctl.model.tokenizer import load_tokenizer
from dpoctl.runs import checkpoint
from dpoctl.runs.names import CHECKPOINTS, MANIFEST, run_of_checkpoint
from dpoctl.tasks.extensions import recorded_extensions
from dpoctl.tasks.finished_run import best_device, recipe_of
from dpoctl.tasks.task import build_task


def with_model(folder: Path) -> Path:
    """Return the folder of a model: the one that is given, or where the model of a checkpoint is now.

    The model of `RUN/checkpoints/step-000100` goes to `RUN/step-000100`, which `--overwrite` deletes with the run.

    Raises:
        UsageError: The user's code made the model that the run started from, so it cannot be made again.
        RunError: The checkpoint is damaged, or is not of this model.
    """
    run = run_of_checkpoint(folder)
    if run is None or folder.resolve().name == CHECKPOINTS or not (folder / MANIFEST).is_file():
        return folder
    target = run / folder.resolve().name
    source = target / f"checkpoint-{MANIFEST}"
    if source.is_file() and source.read_bytes() == (folder / MANIFEST).read_bytes():
        return target
    made_by = recorded_extensions(run).get("model_init")
    if made_by:
        raise UsageError(
            f"{folder}: {made_by[0]} made the model that the run started from, and it is needed to read a checkpoint",
            hint=f"use {run}: it holds the model of the last step",
        )
    if damage := checkpoint.find_damage(folder):
        raise RunError(f"{folder}: the checkpoint is damaged: {damage}", hint="use another step")
    console.say(f"writing the model of {folder.resolve().name} to {target}")
    with temporary_folder(target) as staging:
        _export(run, folder, staging)
        shutil.copyfile(folder / MANIFEST, staging / source.name)
        # Of an earlier run in this folder.
        shutil.rmtree(target, ignore_errors=True)
        staging.replace(target)
    return target


def _export(run: Path, folder: Path, target: Path) -> None:
    recipe = recipe_of(run)
    tokenizer = load_tokenizer(recipe, lambda: iter_texts(recipe, build_task(recipe).rows))
    policy = load_policy(recipe, tokenizer, best_device())
    saved = checkpoint.load(folder)
    policy.load_state(saved.weights)
    # Whoever loads it is told of another base.
    base = saved.extra["inputs"]["weights"] if policy.kind == "lora" else None
    export_model(policy, target, tokenizer, base_weights=base)

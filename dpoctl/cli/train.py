"""What `sft` and `dpo` have in common: check the recipe, then start the training here or in several processes."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from dpoctl.cli import failure, launch

if TYPE_CHECKING:
    from dpoctl.recipe.loader import Examined


@dataclass(frozen=True, slots=True)
class Launch:
    """Where a run happens.

    Args:
        output_dir: The run directory, over the recipe's.
        num_processes: How many processes of this machine take part.
        accelerate_config: A name that is shipped, or a file of accelerate's.
    """

    output_dir: str | None = None
    num_processes: int | None = None
    accelerate_config: str | None = None


def train(
    command: str,
    path: Path,
    overrides: Sequence[str],
    where: Launch,
    *,
    resume: bool,
    allow_changed: Sequence[str] = (),
    overwrite: bool,
    dry_run: bool,
    json_output: bool,
) -> None:
    """Run a training command.

    Args:
        command: `sft` or `dpo`.
        path: The recipe.
        overrides: `key=value` texts.
        where: The run directory and the processes.
        resume: Go on from the newest checkpoint.
        allow_changed: Keys that may differ from what the run began with.
        overwrite: Replace an earlier run.
        dry_run: Show the plan, and train nothing.
        json_output: Print one JSON object on stdout.

    Raises:
        UserError: What the user can mend.
        typer.Exit: With the workers' exit code, where they failed.
    """
    from dpoctl.data.sources import refuse_missing
    from dpoctl.errors import UsageError

    if resume and overwrite:
        raise UsageError("--resume and --overwrite exclude each other")
    if where.output_dir is not None:
        overrides = [*overrides, f"training.output_dir={json.dumps(where.output_dir)}"]
    text, examined = _read(command, path, overrides)
    recipe = examined.accept()
    failure.remember_run_directory(Path(recipe.training.output_dir))
    refuse_missing(recipe.data)
    plan = launch.plan_launch(where.num_processes, where.accelerate_config)
    if plan is not None and not dry_run:
        if code := plan.run():
            raise typer.Exit(code)
        return

    from dpoctl.tasks.train import run

    run(
        recipe,
        recipe_text=text,
        document=examined.document,
        resume=resume,
        allow_changed=allow_changed,
        overwrite=overwrite,
        dry_run=dry_run,
        json_output=json_output,
    )


def _read(command: str, path: Path, overrides: Sequence[str]) -> tuple[str, "Examined"]:
    """Return a recipe's text, and what there is to say of it."""
    from dpoctl.core.losses import LOSSES
    from dpoctl.data.formats import FORMATS
    from dpoctl.recipe import examine_recipe, read_text

    text = read_text(path)
    found = examine_recipe(text, str(path), command=command, overrides=overrides, losses=LOSSES, formats=FORMATS)
    return text, found

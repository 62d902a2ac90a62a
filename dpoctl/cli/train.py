"""The commands `sft` and `dpo`: check the recipe, then train in this process or start several."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from dpoctl import console
from dpoctl.cli import failure, launch, options
from dpoctl.errors import UsageError
from dpoctl.tasks import import_libraries

if TYPE_CHECKING:
    from dpoctl.recipe import Recipe


def training_command(method: str, help: str) -> Callable[..., None]:
    """Return the command that trains recipes of a method.

    Args:
        method: `sft` or `dpo`.
        help: The help text of the command.
    """

    def command(
        recipe: options.RecipePath,
        overrides: options.Overrides = None,
        settings: options.Set = None,
        output_dir: options.OutputDir = None,
        resume: options.Resume = False,
        allow_changed: options.AllowChanged = None,
        overwrite: options.Overwrite = False,
        dry_run: options.DryRun = False,
        verbose: options.Verbose = False,
        num_processes: options.NumProcesses = None,
        accelerate_config: options.AccelerateConfig = None,
        json_output: options.Json = False,
        debug: options.Debug = False,
    ) -> None:
        from dpoctl.recipe import examine_recipe, read_text
        from dpoctl.tasks.paths import check_paths

        if resume and overwrite:
            raise UsageError("--resume and --overwrite cannot be used together")
        changes = [*(settings or []), *(overrides or [])]
        if output_dir is not None:
            changes.append(f"training.output_dir={json.dumps(output_dir)}")
        text = read_text(recipe)
        examined = examine_recipe(text, str(recipe), command=method, overrides=changes)
        checked = examined.accept()
        if not dry_run:
            failure.remember_run_directory(Path(checked.training.output_dir))
        check_paths(checked, recipe)
        launcher = launch.find_launcher(num_processes, accelerate_config, recipe=checked)
        if launcher is not None and not dry_run:
            raise typer.Exit(launcher.run())

        if verbose and not dry_run:
            _show(checked)
        import_libraries()
        from dpoctl.tasks.train import run

        flags: dict[str, Any] = {"resume": resume, "overwrite": overwrite, "dry_run": dry_run, "verbose": verbose}
        run(
            checked,
            recipe_text=text,
            document=examined.document,
            allow_changed=allow_changed or [],
            processes=num_processes or 1,
            json_output=json_output,
            **flags,
        )

    command.__doc__ = help
    return command


sft = training_command(
    "sft",
    """[bold]dpoctl sft recipes/mistral7b-sft.yaml --set learning_rate=1e-4[/]

    Train on demonstrations: conversations, or prompts with their completions.
    """,
)
dpo = training_command(
    "dpo",
    """[bold]dpoctl dpo recipes/mistral7b-lora.yaml --set beta=0.05[/]

    Train on preferences: prompts with a better and a worse answer. The reward of an answer is beta times
    log(policy / reference), summed over its tokens, not averaged. A higher beta keeps the policy closer to the
    reference.
    """,
)


def _show(recipe: "Recipe") -> None:
    """Print a recipe with every default."""
    from dpoctl.recipe.consistency import resolved_yaml

    console.say(resolved_yaml(recipe))

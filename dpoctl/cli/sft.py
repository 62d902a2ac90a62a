"""`dpoctl sft`."""

from dpoctl.cli import options
from dpoctl.cli.train import Launch, train


def sft(
    recipe: options.RecipePath,
    overrides: options.Overrides = None,
    settings: options.Set = None,
    output_dir: options.OutputDir = None,
    resume: options.Resume = False,
    allow_changed: options.AllowChanged = None,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    num_processes: options.NumProcesses = None,
    accelerate_config: options.AccelerateConfig = None,
    json_output: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """[bold]dpoctl sft recipes/mistral7b-sft.yaml --set learning_rate=1e-4[/]

    Train on demonstrations: conversations, or prompts with their completions.
    """  # noqa: D415 - the help shows an example first
    train(
        "sft",
        recipe,
        [*(settings or []), *(overrides or [])],
        Launch(output_dir, num_processes, accelerate_config),
        resume=resume,
        allow_changed=allow_changed or [],
        overwrite=overwrite,
        dry_run=dry_run,
        json_output=json_output,
    )

"""`dpoctl dpo`."""

from dpoctl.cli import options
from dpoctl.cli.train import Launch, train


def dpo(
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
    """[bold]dpoctl dpo recipes/mistral7b-lora.yaml --set beta=0.05[/]

    Train on preferences: prompts with a better and a worse answer. The reward of an answer is beta times
    log(policy / reference), summed over its tokens, not averaged; a higher beta keeps the policy closer to the
    reference.
    """  # noqa: D415 - the help shows an example first
    train(
        "dpo",
        recipe,
        [*(settings or []), *(overrides or [])],
        Launch(output_dir, num_processes, accelerate_config),
        resume=resume,
        allow_changed=allow_changed or [],
        overwrite=overwrite,
        dry_run=dry_run,
        json_output=json_output,
    )

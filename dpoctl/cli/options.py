"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from dpoctl.errors import UsageError


def existing(run: Path) -> Path:
    """Refuse a missing run directory here, before torch is imported."""
    if not run.is_dir():
        raise UsageError(f"RUN: there is no directory {str(run)!r}", hint="pass the training.output_dir of a run")
    return run


RunPath = Annotated[
    Path,
    typer.Argument(
        metavar="RUN", help="The run directory (training.output_dir).", callback=existing, show_default=False
    ),
]
RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Recipe values to change; the same as --set.", show_default=False),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a recipe value: --set dpo.loss.beta=0.05, or just beta=0.05. Can be repeated.",
        show_default=False,
    ),
]
OutputDir = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="The run directory; replaces training.output_dir.", show_default=False),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint in the run directory.")]
AllowChanged = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY",
        help="With --resume: accept that this recipe key, or an input such as model, has changed. Can be repeated.",
        show_default=False,
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete the earlier run in the run directory, and start.")]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Read the data, print the plan and some training rows, and train nothing."),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print the recipe with every default, too.")]
NumProcesses = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Run N processes on this machine.", show_default=False),
]
AccelerateConfig = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE",
        help="Start the processes with accelerate: single_gpu, multi_gpu, or an accelerate config file.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, for errors too.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="The run directory.", show_default=False)]
RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The YAML recipe.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="The same as --set KEY=VALUE.", show_default=False),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Put a value over the recipe's, e.g. --set dpo.loss.beta=0.05, or beta=0.05 for short. Repeatable.",
        show_default=False,
    ),
]
OutputDir = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="The run directory, over training.output_dir.", show_default=False),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint of the run directory.")]
AllowChanged = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY", help="Go on although this key is not what the run began with. Repeatable.", show_default=False
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in the run directory.")]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Read the data, show the plan and what would be trained on; train nothing."),
]
NumProcesses = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Train in N processes on this machine.", show_default=False),
]
AccelerateConfig = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|PATH", help="Start through accelerate: single_gpu, multi_gpu or a file.", show_default=False
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, errors too.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

"""`dpoctl eval`."""

from pathlib import Path
from typing import Annotated

import typer

from dpoctl.cli import options

Run = Annotated[Path, typer.Argument(metavar="RUN", help="The run directory.", show_default=False)]
Data = Annotated[
    str | None,
    typer.Option(metavar="SOURCE", help="Measure on this instead of the run's eval sets.", show_default=False),
]
Limit = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Use the first N rows of each set.", show_default=False)
]


def evaluate(
    run: Run,
    data: Data = None,
    limit: Limit = None,
    json_output: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """[bold]dpoctl eval runs/mistral7b-dpo --json[/]

    Measure a finished run on held-out data: loss, reward accuracy with its confidence interval, margins.
    """  # noqa: D415 - the help shows an example first
    from dpoctl.errors import UsageError

    if not run.is_dir():
        raise UsageError(f"there is no run directory {str(run)!r}", hint="name the output_dir of a finished run")

    from dpoctl.tasks.evaluate import run as measure

    measure(run, data=data, limit=limit, json_output=json_output)

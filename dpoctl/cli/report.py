"""`dpoctl report`."""

from pathlib import Path
from typing import Annotated

import typer

from dpoctl.cli import options

Run = Annotated[Path, typer.Argument(metavar="RUN", help="The run directory.", show_default=False)]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="Where to, over RUN/report.html.", show_default=False),
]


def report(
    run: Run,
    output: Output = None,
    json_output: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """[bold]dpoctl report runs/mistral7b-dpo[/]

    One HTML file that shows a run, finished or not: curves, samples, evaluation, advice, data, recipe. It needs nothing
    else to be read, and sends nothing.
    """  # noqa: D415 - the help shows an example first
    import json

    from dpoctl import console
    from dpoctl.runs.report import write_report

    written = write_report(run, output)
    console.emit(json.dumps({"report": str(written)}) if json_output else str(written))

"""The `dpoctl report` command."""

import json
from pathlib import Path
from typing import Annotated

import typer

from dpoctl import console
from dpoctl.cli import options

Output = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", metavar="FILE", help="The file to write. Default: RUN/report.html.", show_default=False
    ),
]


def report(
    run: options.RunPath,
    output: Output = None,
    json_output: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """[bold]dpoctl report runs/mistral7b-dpo[/]

    Write one HTML file about a run, finished or not: charts, samples, evaluation, advice, data and recipe. The file
    works offline and sends nothing.
    """  # noqa: D415 - the help shows an example first
    from dpoctl.runs.report import report_verdict, write_report

    written = write_report(run, output)
    if (verdict := report_verdict(run)) is not None:
        console.say(str(verdict))
    console.emit(json.dumps({"report": str(written)}) if json_output else str(written))

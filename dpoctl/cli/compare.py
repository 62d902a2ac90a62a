"""The `dpoctl compare` command."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpoctl import console
from dpoctl.cli import options
from dpoctl.errors import GATE_FAILED, UsageError, writing

if TYPE_CHECKING:
    from dpoctl.runs.comparison import RunComparison
    from dpoctl.runs.comparison_page import Block

Runs = Annotated[
    list[Path],
    typer.Argument(
        metavar="RUN", help="Two or more run directories; all are compared with the first.", show_default=False
    ),
]
Markdown = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write markdown for a pull request to this file.", show_default=False),
]
Html = Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page to this file.", show_default=False)]


def compare(
    runs: Runs,
    markdown: Markdown = None,
    html: Html = None,
    json_output: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """[bold]dpoctl compare runs/baseline runs/candidate --markdown comment.md[/]

    Compare runs by the results of dpoctl eval: what differs in their recipes, every number with its interval, and
    differences on the same records with p-values. It exits with 4 if a gate of a recipe fails.
    """  # noqa: D415 - the help shows an example first
    if len(runs) < 2:
        raise UsageError("RUN: one run cannot be compared", hint="pass two or more")
    for run in runs:
        options.existing(run)
    from dpoctl.files import write_atomically
    from dpoctl.runs.comparison import RunComparison, measured
    from dpoctl.runs.comparison_page import blocks, to_markdown, to_page

    comparison = RunComparison(measured(runs))
    for option, path, render in (("--markdown", markdown, to_markdown), ("--html", html, to_page)):
        if path is None:
            continue
        if not path.parent.is_dir():
            raise UsageError(f"{option}: there is no folder {str(path.parent)!r}", hint="create it first")
        with writing(path.parent):
            write_atomically(path, render(comparison))
    if json_output:
        console.emit(json.dumps(comparison.to_dict()))
    else:
        _show(comparison, blocks(comparison))
    if not comparison.passed:
        raise typer.Exit(GATE_FAILED)


def _show(comparison: "RunComparison", found: "list[Block]") -> None:
    """Print the tables, then gates and verdicts."""
    from rich.table import Table
    from rich.text import Text

    from dpoctl.runs.comparison import describe

    for run in comparison.runs:
        console.say(describe(run))
    for block in found:
        table = Table(*block.columns, title=block.title, title_justify="left", box=None)
        for row in block.rows:
            table.add_row(*map(Text, row))
        console.say(table)
    for run in comparison.runs:
        for gate in run.gates:
            console.say(f"{run.name}: {gate}")
    for line in comparison.verdicts():
        console.say(line)

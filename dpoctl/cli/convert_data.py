"""`dpoctl convert-data`."""

from typing import Annotated

import typer

from dpoctl.cli import options

CONTRASTIVE = "contrastive"

Source = Annotated[
    str, typer.Argument(metavar="SRC", help="A file, a folder, a hub id; - is stdin.", show_default=False)
]
Output = Annotated[str, typer.Option("--output", "-o", metavar="FILE", help="Where the rows go; - is stdout.")]
Format = Annotated[str, typer.Option("--format", metavar="NAME", help="The format of the rows.")]
Split = Annotated[str, typer.Option(metavar="NAME", help="The split of a data set.")]
Rejects = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Write the rows that cannot be used here, with reasons.", show_default=False),
]
ColumnMap = Annotated[
    list[str] | None,
    typer.Option(
        metavar="COLUMN=NAME",
        help="A canonical column and its name in the file, e.g. prompt=question. Repeatable.",
        show_default=False,
    ),
]


def convert_data(
    source: Source,
    output: Output = "-",
    format: Format = "auto",
    split: Split = "train",
    rejects: Rejects = None,
    column_map: ColumnMap = None,
    overrides: options.Set = None,
    json_output: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """[bold]dpoctl convert-data raw.jsonl.gz -o pairs.jsonl --rejects rejects.jsonl[/]

    Turn any known data format into canonical JSONL, and count what could not be used.

    With --format contrastive SRC is a recipe, and a model writes the pairs: two answers under opposite instructions.
    """  # noqa: D415 - the help shows an example first
    from dpoctl.data.convert import run
    from dpoctl.data.formats import FORMATS
    from dpoctl.errors import UsageError

    if format == CONTRASTIVE:
        _write_pairs(source, output, split, rejects, column_map, overrides or [], json_output)
        return
    if overrides:
        raise UsageError(f"--set changes a recipe, and only --format {CONTRASTIVE} reads one")
    if format != "auto" and format not in FORMATS:
        raise UsageError(f"--format: expected one of auto, {', '.join(FORMATS)}, {CONTRASTIVE}, got {format!r}")
    columns = {}
    for pair in column_map or []:
        column, equals, name = pair.partition("=")
        if not (column and equals and name):
            raise UsageError(f"--column-map: expected COLUMN=NAME, got {pair!r}")
        columns[column] = name
    run(
        source,
        output=output,
        format=format,
        split=split,
        rejects=rejects,
        column_map=columns,
        json_output=json_output,
    )


def _write_pairs(
    source: str,
    output: str,
    split: str,
    rejects: str | None,
    column_map: list[str] | None,
    overrides: list[str],
    json_output: bool,
) -> None:
    from dpoctl.errors import UsageError

    if split != "train" or column_map:
        raise UsageError(
            f"--split and --column-map would do nothing with --format {CONTRASTIVE}",
            hint="set items.split and items.column in the recipe",
        )
    if output == "-":
        raise UsageError(
            f"--format {CONTRASTIVE} needs a file to write to, and to go on from after an interruption",
            hint="name one with -o",
        )
    from dpoctl.tasks.contrastive import run

    run(source, output=output, rejects=rejects, overrides=overrides, json_output=json_output)

"""`dpoctl merge`."""

from pathlib import Path
from typing import Annotated

import typer

from dpoctl.cli import options

Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FOLDER", help="The new folder; RUN/merged if absent.", show_default=False),
]
Precision = Annotated[
    str, typer.Option(metavar="NAME", help="auto (the run's, or the base's), float32, bfloat16 or float16.")
]


def merge(
    run: options.RunPath,
    output: Output = None,
    dtype: Precision = "auto",
    json_output: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """[bold]dpoctl merge runs/mistral7b-dpo -o mistral7b-dpo-merged[/]

    Write a run's adapter into its unquantised base: one plain model folder, checked against base + adapter.
    """  # noqa: D415 - the help shows an example first
    from dpoctl.errors import UsageError

    names = ("auto", "float32", "bfloat16", "float16")
    if dtype not in names:
        raise UsageError(f"--dtype: expected one of {', '.join(names)}, got {dtype!r}")

    from dpoctl.tasks.merge import run as merge_run

    merge_run(run, output=output, dtype=dtype, json_output=json_output)

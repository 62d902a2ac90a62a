"""The `dpoctl merge` command."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from dpoctl.cli import options
from dpoctl.tasks import import_libraries

Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FOLDER", help="The new folder. Default: RUN/merged.", show_default=False),
]
Precision = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(
        metavar="NAME", help="Precision of the merged weights: auto (as in the recipe), float32, bfloat16 or float16."
    ),
]


def merge(
    run: options.RunPath,
    output: Output = None,
    dtype: Precision = "auto",
    json_output: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """[bold]dpoctl merge runs/mistral7b-dpo -o mistral7b-dpo-merged[/]

    Merge the LoRA adapter of a run into its unquantised base model. The result is a plain model folder; its output is
    compared with that of base and adapter before it is kept.
    """  # noqa: D415 - the help shows an example first
    import_libraries()
    from dpoctl.tasks.merge import run as merge_run

    merge_run(run, output=output, dtype=dtype, json_output=json_output)

"""The `dpoctl eval` command."""

import os
from typing import Annotated

import typer

from dpoctl.cli import options
from dpoctl.errors import GATE_FAILED
from dpoctl.tasks import import_libraries, launchers

Data = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE",
        help="Evaluate on this file, folder or hub dataset instead of the recipe's eval data.",
        show_default=False,
    ),
]
Limit = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Use only the first N rows of each eval set.", show_default=False)
]
Repeats = Annotated[
    int,
    typer.Option(metavar="N", min=1, max=1000, help="Draw and judge the samples N times, for the noise floor."),
]


def evaluate(
    run: options.RunPath,
    data: Data = None,
    limit: Limit = None,
    set_values: options.Set = None,
    repeats: Repeats = 1,
    json_output: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """[bold]dpoctl eval runs/mistral7b-dpo --json[/]

    Evaluate a finished run on held-out data: loss, reward margins, and reward accuracy with its confidence interval.
    It exits with 4 if a gate of the recipe fails. A folder with any other model is measured on --data, without a
    reference.
    """  # noqa: D415 - the help shows an example first
    from dpoctl.recipe.secrets import refuse_secret_argument

    refuse_secret_argument("--data", data or "")
    for text in set_values or ():
        refuse_secret_argument("--set", text)
    launchers.check_environment(os.environ)
    import_libraries()
    from dpoctl.tasks.evaluate import run as evaluate_run

    changes = set_values or ()
    if not evaluate_run(run, data=data, limit=limit, json_output=json_output, overrides=changes, repeats=repeats):
        raise typer.Exit(GATE_FAILED)

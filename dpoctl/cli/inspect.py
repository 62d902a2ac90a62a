"""The `dpoctl inspect` command."""

from typing import Annotated

import typer

from dpoctl.cli import options
from dpoctl.tasks import import_libraries

Row = Annotated[int | None, typer.Option("--row", metavar="N", min=1, help="Show only row N; the first row is 1.")]
Rows = Annotated[int, typer.Option("--rows", "-n", metavar="N", min=0, help="Show the first N rows.")]
Ids = Annotated[bool, typer.Option("--ids", help="Show the token ids too.")]


def inspect(
    recipe: options.RecipePath,
    overrides: options.Overrides = None,
    row: Row = None,
    rows: Rows = 2,
    ids: Ids = False,
    settings: options.Set = None,
    json_output: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """[bold]dpoctl inspect recipes/mistral7b-lora.yaml --row 17[/]

    Show training rows as the model sees them: which tokens are the prompt, which are trained on, which are control
    tokens. Then check the template, the prompt boundary and the end of turn, on these rows and on a sample of the
    training set. No weights are loaded.
    """  # noqa: D415 - the help shows an example first
    from dpoctl.recipe import examine_recipe, read_text
    from dpoctl.tasks.paths import check_paths

    changes = [*(settings or []), *(overrides or [])]
    checked = examine_recipe(read_text(recipe), str(recipe), overrides=changes).accept()
    check_paths(checked, recipe)
    import_libraries()
    from dpoctl.tasks.inspect import run

    run(checked, row=row, rows=rows, ids=ids, json_output=json_output)

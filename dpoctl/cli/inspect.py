"""`dpoctl inspect`."""

from typing import Annotated

import typer

from dpoctl.cli import options

Row = Annotated[int | None, typer.Option("--row", metavar="N", min=1, help="Show this record alone, counted from 1.")]
Rows = Annotated[int, typer.Option("--rows", "-n", metavar="ROWS", min=0, help="Show this many records.")]
Ids = Annotated[bool, typer.Option("--ids", help="Show the ids of the tokens too.")]


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

    Rows as the model will see them: what it is given, what it is trained on, control tokens in boxes; and whether
    prompts, beginnings, ends and answers are where they belong, in these rows and in the set. No weights are loaded.
    """  # noqa: D415 - the help shows an example first
    from dpoctl.core.losses import LOSSES
    from dpoctl.data.formats import FORMATS
    from dpoctl.recipe import examine_recipe, read_text
    from dpoctl.tasks.inspect import run

    given = [*(settings or []), *(overrides or [])]
    examined = examine_recipe(read_text(recipe), str(recipe), overrides=given, losses=LOSSES, formats=FORMATS)
    run(examined.accept(), row=row, rows=rows, ids=ids, json_output=json_output)

"""The `dpoctl schema` command."""

import json
from pathlib import Path
from typing import Annotated

import typer

from dpoctl import console
from dpoctl.cli import options
from dpoctl.errors import UsageError, writing
from dpoctl.files import write_atomically

Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="Write the schema to this file.", show_default=False),
]
Modeline = Annotated[
    list[Path] | None,
    typer.Option(
        "--modeline",
        metavar="RECIPE",
        help="With -o: begin this recipe with a line that tells editors where the schema is. Can be repeated.",
        show_default=False,
    ),
]


def schema(output: Output = None, modeline: Modeline = None, debug: options.Debug = False) -> None:
    """[bold]dpoctl schema -o recipe.schema.json --modeline mine.yaml[/]

    Print the JSON schema of recipes, by which editors complete keys, explain them and mark mistakes.
    """  # noqa: D415 - the help shows an example first
    from dpoctl.recipe.json_schema import recipe_json_schema, set_modeline
    from dpoctl.recipe.loader import read_text

    text = json.dumps(recipe_json_schema(), indent=2, ensure_ascii=False)
    if output is None:
        if modeline:
            raise UsageError("--modeline names a file of the schema", hint="pass -o FILE too")
        console.emit(text)
        return
    recipes = {path: set_modeline(read_text(path), output, path.parent) for path in modeline or []}
    with writing(output.parent):
        write_atomically(output, f"{text}\n")
        for path, changed in recipes.items():
            write_atomically(path, changed)
    console.say("\n".join(map(str, [output, *recipes])))

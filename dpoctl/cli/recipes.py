"""The `dpoctl recipes` command."""

import json
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from dpoctl import console
from dpoctl.cli import options
from dpoctl.errors import UsageError

Name = Annotated[
    str | None, typer.Argument(metavar="NAME", help="The recipe to print. Default: list all.", show_default=False)
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="Copy the recipe to this file.", show_default=False),
]
KeyName = Annotated[
    str | None,
    typer.Option("--key", metavar="KEY", help="Explain a key, or all keys of a section or loss.", show_default=False),
]


def recipes(
    name: Name = None,
    output: Output = None,
    key: KeyName = None,
    json_output: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """[bold]dpoctl recipes mistral7b-lora -o mine.yaml[/]

    List, print or copy the recipes that come with dpoctl; with --key, explain keys of recipes.
    """  # noqa: D415 - the help shows an example first
    from dpoctl.recipe.shipped import find_recipe, shipped_recipes, summary

    if key is not None:
        if name is not None or output is not None:
            raise UsageError("--key explains keys, and takes no recipe", hint="leave NAME and -o out")
        _explain(key, json_output=json_output)
    elif name is not None:
        text = find_recipe(name).read_text(encoding="utf-8")
        if output is None:
            console.emit(json.dumps({"recipe": text}) if json_output else text.rstrip("\n"))
        else:
            _write(output, text)
    elif output is not None:
        raise UsageError("-o: there is no recipe to copy", hint="name one; `dpoctl recipes` lists them")
    else:
        found = {name: summary(file) for name, file in shipped_recipes().items()}
        console.emit(
            json.dumps(found) if json_output else "\n".join(_wrapped(f"{name}: {found[name]}") for name in found)
        )


def _explain(name: str, *, json_output: bool) -> None:
    from dpoctl.recipe.reference import find_keys

    found = find_keys(name)
    if json_output:
        console.emit(json.dumps({"keys": [key._asdict() for key in found]}))
        return
    for key in found:
        default = "required" if key.default == "required" else f"default {key.default}"
        console.emit("\n".join(_wrapped(text) for text in (f"{key.name}: {key.type}; {default}", f"  {key.meaning}")))


def _wrapped(text: str) -> str:
    """Break a line where a terminal would, with the next ones indented; leave it whole in a pipe."""
    if not sys.stdout.isatty():
        return text
    width = max(20, shutil.get_terminal_size().columns - 1)
    return textwrap.fill(text, width, subsequent_indent="  ", break_on_hyphens=False)


def _write(path: Path, text: str) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise UsageError(f"{path}: exists already", hint="name another file") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror or error}") from error

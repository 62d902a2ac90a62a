"""The `dpoctl import` command."""

import json
from pathlib import Path
from typing import Annotated

import typer

from dpoctl import console
from dpoctl.cli import options
from dpoctl.cli.recipes import write_new

Config = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG",
        help="A config of TRL, axolotl, LLaMA-Factory, torchtune or the alignment-handbook, or a script with their "
        "command line.",
        show_default=False,
    ),
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="Write the recipe to this file.", show_default=False),
]
NumProcesses = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="The number of devices that the config is for, which its batch size depends on.",
        show_default=False,
    ),
]


def import_config(
    config: Config,
    output: Output = None,
    num_processes: NumProcesses = None,
    json_output: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """[bold]dpoctl import axolotl.yml -o mine.yaml --num-processes 8[/]

    Turn a config of another tool into a recipe, and say what has become of each of its keys: carried over, changed,
    or without equivalent.
    """  # noqa: D415 - the help shows an example first
    from dpoctl.recipe.imports import import_config

    template = "chat_template.jinja" if output is None else str(output.with_suffix(".jinja"))
    found = import_config(config, processes=num_processes, template=template)
    if output is not None:
        write_new(output, found.text)
        for name, text in found.templates.items():
            write_new(Path(name), text)
    if json_output:
        where = {"recipe": found.text} if output is None else {"output": str(output)}
        console.emit(json.dumps({**where, "report": found.report.to_dict(), "problems": found.problems}))
        return
    if output is None:
        console.emit(found.text.rstrip("\n"))
    console.say(found.report.text())
    if output is None:
        for name in found.templates:
            console.warn(f"the recipe expects the config's chat template in {name}; -o writes it too")
    for problem in found.problems:
        console.warn(f"to be settled by hand: {problem}")
    if output is not None:
        console.say(f"{output}: from a config of {found.report.tool}\nnext: dpoctl check {output}")

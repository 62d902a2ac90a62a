"""The `dpoctl plan` command."""

from typing import Annotated

import typer

from dpoctl.cli import options
from dpoctl.errors import UsageError
from dpoctl.tasks import import_libraries

Gpu = Annotated[
    str,
    typer.Option(
        "--gpu",
        metavar="NAME",
        help="The GPU to plan for, such as h100-80gb, a100-40gb or rtx4090. auto: that of this machine, or its CPU.",
    ),
]
Processes = Annotated[
    int, typer.Option("--num-processes", metavar="N", min=1, help="The number of processes, one on each GPU.")
]
Measure = Annotated[bool, typer.Option("--measure", help="Take a few real steps on this machine, for the time.")]
Compare = Annotated[
    str | None,
    typer.Option(
        "--compare", metavar="KINDS", help="Print a table over full, lora, qlora, joined by commas.", show_default=False
    ),
]
Gpus = Annotated[
    str, typer.Option("--gpus", metavar="NUMBERS", help="With --compare: numbers of processes, joined by commas.")
]


def plan(
    recipe: options.RecipePath,
    overrides: options.Overrides = None,
    gpu: Gpu = "auto",
    num_processes: Processes = 1,
    measure: Measure = False,
    compare: Compare = None,
    gpus: Gpus = "1",
    settings: options.Set = None,
    json_output: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """[bold]dpoctl plan recipes/mistral7b-lora.yaml --gpu rtx4090[/]

    Estimate a run before it runs: the memory of a process by part, the micro-batch, steps, work, time and disk. It
    needs neither the GPU nor the weights, only the model's configuration, its tokenizer and the data. A run that does
    not fit is refused, with the keys that would make it fit.
    """  # noqa: D415 - the help shows an example first
    from dpoctl.recipe import examine_recipe, read_text
    from dpoctl.tasks.paths import check_paths

    changes = [*(settings or []), *(overrides or [])]
    checked = examine_recipe(read_text(recipe), str(recipe), overrides=changes).accept()
    check_paths(checked, recipe)
    numbers = _numbers(gpus)
    import_libraries()
    from dpoctl.tasks.plan import run

    kinds = [] if compare is None else [kind.strip() for kind in compare.split(",")]
    run(
        checked,
        gpu=gpu,
        processes=num_processes,
        measured=measure,
        compare=kinds,
        gpus=numbers,
        json_output=json_output,
    )


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise UsageError(
            f"--gpus {text}: not numbers of 1 or more, joined by commas", hint="for example --gpus 1,2,4,8"
        )
    return numbers

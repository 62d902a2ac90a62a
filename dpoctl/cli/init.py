"""The `dpoctl init` command."""

import json
import re
import sys
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpoctl import console
from dpoctl.cli import options
from dpoctl.cli.recipes import write_new
from dpoctl.errors import UsageError

if TYPE_CHECKING:
    from dpoctl.data.formats.detect import Detection
    from dpoctl.data.records import Record

Model = Annotated[
    str | None, typer.Option("--model", metavar="NAME", help="The model: a hub id or a folder.", show_default=False)
]
Data = Annotated[
    str | None,
    typer.Option("--data", metavar="SRC", help="The data: a file, a folder or a hub id.", show_default=False),
]
Split = Annotated[
    str | None, typer.Option("--split", metavar="NAME", help="The split of a hub data set.", show_default=False)
]
Gpu = Annotated[
    str | None,
    typer.Option(
        "--gpu", "--memory", metavar="NAME|GB", help="A GPU, its memory in GB, or none for a CPU.", show_default=False
    ),
]
Method = Annotated[
    str | None,
    typer.Option("--method", metavar="sft|dpo", help="Default: what the rows are for.", show_default=False),
]
Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="FILE", help="The file of the recipe.", show_default="recipe.yaml")
]
FEW = 200
"""Fewer rows than this are counted."""
QUESTIONS = {
    "model": "Which model? A hub id or a folder",
    "data": "Which data? A file, a folder or a hub id",
    "gpu": "Which GPU? Its name, its memory in GB, or none",
}


def init(
    model: Model = None,
    data: Data = None,
    gpu: Gpu = None,
    method: Method = None,
    split: Split = None,
    output: Output = Path("recipe.yaml"),
    json_output: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """[bold]dpoctl init --model Qwen/Qwen3-0.6B --data pairs.jsonl --gpu rtx4090 -o mine.yaml[/]

    Write a first recipe, with comments, for your model, data and GPU. What no option says is asked on the terminal.
    """  # noqa: D415 - the help shows an example first
    from dpoctl.recipe.starter import Wish, gigabytes, starter_recipe

    if method not in (None, "sft", "dpo"):
        raise UsageError(f"--method: expected sft or dpo, got {method!r}")
    if output.exists():
        raise UsageError(f"{output}: exists already", hint="name another file with -o")
    answers = _ask({"model": model, "data": data, "gpu": gpu})
    memory = gigabytes(answers["gpu"])
    found, record, rows = _detected(answers["data"], split, method)
    wish = Wish(
        model=answers["model"],
        data=answers["data"],
        split=split or "",
        format=found.format,
        method=_method_for(record, method, answers["data"]),
        loss=_loss_for(record),
        memory=memory,
        rows=rows,
        output=re.sub(r"[^\w.-]+", "-", output.stem) or "mine",
    )
    text = starter_recipe(wish)
    write_new(output, text)
    if json_output:
        console.emit(json.dumps({"output": str(output), "method": wish.method, "format": found.format}))
        return
    console.say(f"{answers['data']}: {found.format} ({found.evidence})")
    console.say(f"{output}: a recipe for `dpoctl {wish.method}`\nnext: dpoctl check {output}")


def _ask(given: dict[str, str | None]) -> dict[str, str]:
    """Ask for what is not given.

    Raises:
        UsageError: There is nobody to ask.
    """
    missing = [name for name, value in given.items() if not value]
    if missing and not (sys.stdin.isatty() and sys.stderr.isatty()):
        flags = ", ".join(f"--{name}" for name in missing)
        raise UsageError("dpoctl init asks questions, and there is no terminal to ask on", hint=f"pass {flags}")
    asked = {name: typer.prompt(QUESTIONS[name], err=True).strip() for name in missing}
    return {name: asked.get(name) or str(given[name]) for name in given}


def _detected(data: str, split: str | None, method: str | None) -> tuple["Detection", "Record", int | None]:
    """Return the format of the data, the first row that can be used, and the number of rows if they are few."""
    from dpoctl.data.formats import read
    from dpoctl.data.pipeline import detect_format, open_rows
    from dpoctl.data.records import Reject
    from dpoctl.errors import DataError
    from dpoctl.recipe.data_section import Source

    source = Source(path=data, **({"split": split} if split else {}))
    opened = open_rows(source, method=method or "dpo")
    if not opened.sound:
        raise DataError(f"{data}: no row that can be read")
    found = detect_format(data, opened)
    for row in opened.sound:
        try:
            record = read(found.format, row, {})
            count = sum(1 for _ in islice(opened.rows, FEW))
            return found, record, count if count < FEW else None
        except Reject as reject:
            reason = f"{reject.reason}: {reject.detail}"
    raise DataError(f"{data}: none of the first {len(opened.sound)} rows can be used: {reason}")


def _method_for(record: "Record", asked: str | None, data: str) -> str:
    """Return the method that the rows are for, or the one that was asked for.

    Raises:
        UsageError: The rows are no preferences, and DPO was asked for.
    """
    prefers = bool(record.pairs or record.scores) or record.label is not None
    if asked == "dpo" and not prefers:
        raise UsageError(f"--method: dpo needs preferences, and {data} has one answer a row", hint="use --method sft")
    return asked or ("dpo" if prefers else "sft")


def _loss_for(record: "Record") -> str:
    return "kto" if record.label is not None else "sigmoid"

"""`dpoctl convert-data`."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dpoctl.cli import options

if TYPE_CHECKING:
    from dpoctl.recipe.schema_data import Source as RecipeSource

CONTRASTIVE = "contrastive"


class Pairs(StrEnum):
    """Which rated answers are compared."""

    best_worst = "best-worst"
    best_rest = "best-rest"
    best_random = "best-random"
    adjacent = "adjacent"
    all = "all"
    none = "none"


class Keep(StrEnum):
    """What becomes of something."""

    keep = "keep"
    drop = "drop"


class To(StrEnum):
    """What is written."""

    pairs = "pairs"
    unpaired = "unpaired"
    messages = "messages"


Source = Annotated[
    str, typer.Argument(metavar="SRC", help="A file, a folder, a hub id; - is stdin.", show_default=False)
]
# A line each, or the help does not fit on a screen.
Output = Annotated[
    str, typer.Option("--output", "-o", metavar="FILE", help="Where the rows go; - is stdout.", show_default=False)
]
Format = Annotated[
    str, typer.Option("--format", metavar="NAME", help="Of the rows; else it is found.", show_default=False)
]
FormatOptions = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="KEY=VALUE", help="For the format. Repeatable.", show_default=False),
]
Split = Annotated[str, typer.Option(metavar="NAME", help="Of a data set; else train.", show_default=False)]
ColumnMap = Annotated[
    list[str] | None,
    typer.Option(
        metavar="COLUMN=NAME", help="A column's name in the file, prompt=question. Repeatable.", show_default=False
    ),
]
ToWhat = Annotated[
    To | None,
    typer.Option("--to", metavar="WHAT", help="pairs, unpaired, or messages: the best answer of each row."),
]
PairsOption = Annotated[
    Pairs | None,
    typer.Option("--pairs", metavar="HOW", help="best-worst, best-rest, best-random, adjacent, all or none."),
]
MinMargin = Annotated[
    float | None, typer.Option(min=0, metavar="X", help="Least difference of ratings.", show_default=False)
]
MaxPairs = Annotated[
    int | None,
    typer.Option(
        "--max-pairs-per-prompt", min=1, metavar="N", help="How many pairs of one prompt.", show_default=False
    ),
]
Ties = Annotated[Keep | None, typer.Option("--ties", metavar="keep|drop", help="Pairs of equal ratings; else drop.")]
Duplicates = Annotated[
    Keep, typer.Option("--duplicates", metavar="keep|drop", help="Rows seen again; else keep.", show_default=False)
]
Strict = Annotated[bool, typer.Option("--strict", help="No output if a row is rejected.")]
MaxRejects = Annotated[
    float | None,
    typer.Option(
        "--max-reject-fraction", min=0, max=1, metavar="X", help="No output beyond this share.", show_default=False
    ),
]
Rejects = Annotated[str | None, typer.Option(metavar="FILE", help="Rejected rows, with reasons.", show_default=False)]
Report = Annotated[str | None, typer.Option(metavar="FILE", help="All counts, as JSON.", show_default=False)]
Detect = Annotated[bool, typer.Option("--detect", help="Only say which format it is.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A key of a contrastive recipe.", show_default=False),
]


def convert_data(
    source: Source,
    output: Output = "-",
    format: Format = "auto",
    option: FormatOptions = None,
    split: Split = "train",
    column_map: ColumnMap = None,
    to: ToWhat = None,
    pairs: PairsOption = None,
    min_margin: MinMargin = None,
    max_pairs: MaxPairs = None,
    ties: Ties = None,
    duplicates: Duplicates = Keep.keep,
    strict: Strict = False,
    max_reject_fraction: MaxRejects = None,
    rejects: Rejects = None,
    report: Report = None,
    detect: Detect = False,
    overrides: Set = None,
    json_output: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """[bold]dpoctl convert-data raw.jsonl.gz -o pairs.jsonl --rejects rejects.jsonl[/]

    Turn any known data format into canonical JSONL, and count what could not be used.

    With --format contrastive SRC is a recipe, and a model writes the pairs: two answers under opposite instructions.
    """  # noqa: D415 - the help shows an example first
    choices = {
        "option": option,
        "split": None if split == "train" else split,
        "column_map": column_map,
        "to": to,
        "pairs": pairs,
        "min_margin": min_margin,
        "max_pairs_per_prompt": max_pairs,
        "ties": ties,
        "duplicates": None if duplicates is Keep.keep else duplicates,
        "strict": strict or None,
        "max_reject_fraction": max_reject_fraction,
        "report": report,
        "detect": detect or None,
    }
    given = {name: value for name, value in choices.items() if value is not None}
    if format == CONTRASTIVE:
        _write_pairs(source, output, given, rejects, overrides or [], json_output)
    else:
        _convert(_source(source, format, given, overrides), output, given, rejects, json_output)


def _convert(
    source: "RecipeSource", output: str, given: dict[str, Any], rejects: str | None, json_output: bool
) -> None:
    from dpoctl.data.convert import Job, detect, run

    if "detect" in given:
        _refuse(given.keys() - {"detect", "split", "column_map"}, "--detect converts nothing")
        detect(source, json_output=json_output)
        return
    to = given.get("to")
    job = Job(
        source=source,
        output=output,
        to=to and to.value,
        rankings=given.get("pairs") is Pairs.none,
        drop_duplicates="duplicates" in given,
        strict="strict" in given,
        max_reject_fraction=given.get("max_reject_fraction"),
        rejects=rejects,
        report=given.get("report"),
    )
    run(job, json_output=json_output)


def _source(path: str, format: str, given: dict[str, Any], overrides: list[str] | None) -> "RecipeSource":
    """Say where rows are read, and how, as a recipe would."""
    from dpoctl.data.formats import FORMATS
    from dpoctl.errors import UsageError
    from dpoctl.recipe.schema_data import Source as RecipeSource

    if overrides:
        raise UsageError(f"--set changes a recipe, and only --format {CONTRASTIVE} reads one")
    if format != "auto" and format not in FORMATS:
        raise UsageError(f"--format: expected one of auto, {', '.join(FORMATS)}, {CONTRASTIVE}, got {format!r}")
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{path!a}: a name that is not UTF-8", hint="rename the file") from error
    words = _pairs("--option", "KEY=VALUE", given.get("option"))
    mode = given.get("pairs")
    ties = given.get("ties")
    return RecipeSource(
        path=path,
        split=given.get("split", "train"),
        format=format,
        format_options={key: _scalar(value) for key, value in words.items()},
        column_map=_pairs("--column-map", "COLUMN=NAME", given.get("column_map")),
        pairs=None if mode in (None, Pairs.none) else mode.value,
        min_margin=given.get("min_margin"),
        max_pairs_per_prompt=given.get("max_pairs_per_prompt"),
        ties=ties and ties.value,
    )


def _pairs(option: str, form: str, texts: list[str] | None) -> dict[str, str]:
    """Read `NAME=VALUE` texts."""
    from dpoctl.errors import UsageError

    found = {}
    for text in texts or []:
        key, equals, value = text.partition("=")
        if not (key and equals and value):
            raise UsageError(f"{option}: expected {form}, got {text!r}")
        found[key] = value
    return found


def _scalar(text: str) -> Any:
    """Read a value as a recipe would."""
    from dpoctl.errors import UsageError
    from dpoctl.recipe.scalars import read_scalar

    try:
        return read_scalar(text)
    except ValueError as error:
        raise UsageError(f"--option: {error}") from error


def _refuse(names: set[str], why: str, hint: str | None = None) -> None:
    """Make sure that no option is given that would do nothing."""
    from dpoctl.errors import UsageError

    if names:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(names))
        raise UsageError(f"{flags} would do nothing: {why}", hint=hint)


def _write_pairs(
    source: str, output: str, given: dict[str, Any], rejects: str | None, overrides: list[str], json_output: bool
) -> None:
    from dpoctl.errors import UsageError

    hint = "set items.split and items.column in the recipe" if given.keys() & {"split", "column_map"} else None
    _refuse(set(given), f"with --format {CONTRASTIVE} the recipe says it all", hint)
    if output == "-":
        raise UsageError(
            f"--format {CONTRASTIVE} needs a file to write to, and to go on from after an interruption",
            hint="name one with -o",
        )
    from dpoctl.tasks.contrastive import run

    run(source, output=output, rejects=rejects, overrides=overrides, json_output=json_output)

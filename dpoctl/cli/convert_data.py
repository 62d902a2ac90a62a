"""The `dpoctl convert-data` command."""

from collections.abc import Collection
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dpoctl import console
from dpoctl.cli import options
from dpoctl.errors import UsageError
from dpoctl.tasks import import_libraries

if TYPE_CHECKING:
    from dpoctl.recipe.data_section import Source as RecipeSource

CONTRASTIVE, SAMPLED = "contrastive", "sampled"

READING, CHOOSING, WRITING = "Reading", "Choosing rows and pairs", "Writing"


def _option(panel: str, help: str, *names: str, **settings: Any) -> Any:
    """An option in a panel of the help, which names the default itself."""
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False, **settings)


def _show_formats(requested: bool) -> None:
    if requested:
        from dpoctl.data.formats.detect import list_formats

        console.emit(list_formats())
        raise typer.Exit


Source = Annotated[
    str, typer.Argument(metavar="SRC", help="A file, a folder or a hub dataset; - is stdin.", show_default=False)
]
Format = Annotated[str, _option(READING, "The format of the rows. Default: detect it.", "--format", metavar="NAME")]
FormatOptions = Annotated[
    list[str] | None,
    _option(READING, "An option of the format. Can be repeated.", "--option", metavar="KEY=VALUE"),
]
Formats = Annotated[
    bool,
    _option(READING, "List all formats with their options.", "--formats", is_eager=True, callback=_show_formats),
]
Split = Annotated[str, _option(READING, "The split of a dataset. Default: train.", "--split", metavar="NAME")]
ColumnMap = Annotated[
    list[str] | None,
    _option(
        READING,
        "Read NAME, such as prompt, from COLUMN. Can be repeated.",
        "--column-map",
        metavar="NAME=COLUMN",
    ),
]
Detect = Annotated[bool, _option(READING, "Only print the format of SRC and its options.", "--detect")]
Set = Annotated[
    list[str] | None,
    _option(
        READING, "Change a value of a contrastive or sampled recipe. Can be repeated.", "--set", metavar="KEY=VALUE"
    ),
]
To = Annotated[
    Literal["pairs", "unpaired", "messages"] | None,
    _option(CHOOSING, "Write pairs, unpaired rows, or messages (the best answers).", "--to", metavar="KIND"),
]
Transcripts = Annotated[
    Literal["text", "messages"] | None,
    _option(
        CHOOSING,
        "Write transcripts (Human: ...) as text or messages.",
        "--transcripts",
        metavar="KIND",
    ),
]
Pairs = Annotated[
    Literal["best-worst", "best-rest", "best-random", "adjacent", "all", "none"] | None,
    _option(
        CHOOSING,
        "Pair rated answers: best-worst, best-rest, best-random, adjacent, all, or none (keep them in one row).",
        "--pairs",
        metavar="HOW",
    ),
]
MinMargin = Annotated[
    float | None,
    _option(CHOOSING, "Skip pairs whose ratings differ by less than X.", "--min-margin", min=0, metavar="X"),
]
MaxPairs = Annotated[
    int | None,
    _option(CHOOSING, "Keep at most N pairs of a prompt.", "--max-pairs-per-prompt", min=1, metavar="N"),
]
Ties = Annotated[
    Literal["drop", "keep"] | None,
    _option(CHOOSING, "Keep or drop pairs with equal ratings. Default: drop.", "--ties", metavar="keep|drop"),
]
Duplicates = Annotated[
    Literal["keep", "drop"],
    _option(CHOOSING, "Repeated rows. Default: keep.", "--duplicates", metavar="keep|drop"),
]
Output = Annotated[str, _option(WRITING, "The file to write. Default: stdout.", "--output", "-o", metavar="FILE")]
Strict = Annotated[bool, _option(WRITING, "Write nothing if any row is dropped.", "--strict")]
MaxRejects = Annotated[
    float | None,
    _option(
        WRITING,
        "Write nothing if more than this share of the rows is dropped.",
        "--max-reject-fraction",
        min=0,
        max=1,
        metavar="X",
    ),
]
Rejects = Annotated[
    str | None, _option(WRITING, "Write the dropped rows and their reasons to this file.", "--rejects", metavar="FILE")
]
Report = Annotated[str | None, _option(WRITING, "Write all counts to this file, as JSON.", "--report", metavar="FILE")]


def convert_data(
    source: Source,
    output: Output = "-",
    format: Format = "auto",
    option: FormatOptions = None,
    split: Split = "train",
    column_map: ColumnMap = None,
    to: To = None,
    transcripts: Transcripts = None,
    pairs: Pairs = None,
    min_margin: MinMargin = None,
    max_pairs: MaxPairs = None,
    ties: Ties = None,
    duplicates: Duplicates = "keep",
    strict: Strict = False,
    max_reject_fraction: MaxRejects = None,
    rejects: Rejects = None,
    report: Report = None,
    detect: Detect = False,
    formats: Formats = False,
    overrides: Set = None,
    json_output: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """[bold]dpoctl convert-data raw.jsonl.gz -o pairs.jsonl --rejects rejects.jsonl[/]

    Convert data of any known format to canonical JSONL, and count the rows that cannot be used.

    With --format contrastive or --format sampled, SRC is a recipe by which a model writes the answers of pairs.
    """  # noqa: D415 - the help shows an example first
    choices = {
        "option": option,
        "split": None if split == "train" else split,
        "column_map": column_map,
        "to": to,
        "transcripts": transcripts,
        "pairs": pairs,
        "min_margin": min_margin,
        "max_pairs_per_prompt": max_pairs,
        "ties": ties,
        "duplicates": None if duplicates == "keep" else duplicates,
        "strict": strict or None,
        "max_reject_fraction": max_reject_fraction,
        "report": report,
        "detect": detect or None,
    }
    given = {name: value for name, value in choices.items() if value is not None}
    if format in (CONTRASTIVE, SAMPLED):
        _generate_pairs(source, format, output, given, rejects, overrides or [], json_output)
    else:
        _convert(_build_source(source, format, given, overrides), output, given, rejects, json_output)


def _convert(
    source: "RecipeSource", output: str, given: dict[str, Any], rejects: str | None, json_output: bool
) -> None:
    from dpoctl.data.convert import Conversion, detect, run

    if "detect" in given:
        _refuse(given.keys() - {"detect", "split", "column_map"}, "--detect converts nothing")
        detect(source, json_output=json_output)
        return
    job = Conversion(
        source=source,
        output=output,
        to=given.get("to"),
        transcripts=given.get("transcripts"),
        rankings=given.get("pairs") == "none",
        drop_duplicates="duplicates" in given,
        strict="strict" in given,
        max_reject_fraction=given.get("max_reject_fraction"),
        rejects=rejects,
        report=given.get("report"),
    )
    run(job, json_output=json_output)


def _build_source(path: str, format: str, given: dict[str, Any], overrides: list[str] | None) -> "RecipeSource":
    """Return the options as a recipe's data source."""
    from dpoctl.data.formats import FORMATS
    from dpoctl.recipe.data_section import Source as RecipeSource
    from dpoctl.recipe.secrets import refuse_secret_argument

    for name, texts in {
        "SRC": [path],
        "--option": given.get("option"),
        "--column-map": given.get("column_map"),
    }.items():
        for text in texts or ():
            refuse_secret_argument(name, text)
    if overrides:
        raise UsageError(f"--set has no effect without --format {CONTRASTIVE} or {SAMPLED}: it changes a recipe")
    if format != "auto" and format not in FORMATS:
        raise UsageError(
            f"--format: expected one of auto, {', '.join(FORMATS)}, {CONTRASTIVE}, {SAMPLED}, got {format!r}"
        )
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{path!a}: the file name is not UTF-8", hint="rename the file") from error
    format_options = _split_pairs("--option", "KEY=VALUE", given.get("option"))
    mode = given.get("pairs")
    return RecipeSource(
        path=path,
        split=given.get("split", "train"),
        format=format,
        format_options={key: _scalar(value) for key, value in format_options.items()},
        column_map=_split_pairs("--column-map", "NAME=COLUMN", given.get("column_map")),
        pairs=None if mode == "none" else mode,
        min_margin=given.get("min_margin"),
        max_pairs_per_prompt=given.get("max_pairs_per_prompt"),
        ties=given.get("ties"),
    )


def _split_pairs(option: str, form: str, texts: list[str] | None) -> dict[str, str]:
    """Split `NAME=VALUE` texts at the first `=`."""
    found = {}
    for text in texts or []:
        key, equals, value = text.partition("=")
        if not (key and equals and value):
            raise UsageError(f"{option}: expected {form}, got {text!r}")
        found[key] = value
    return found


def _scalar(text: str) -> Any:
    """Read a value as a recipe would."""
    from dpoctl.recipe.document import read_scalar

    try:
        return read_scalar(text)
    except ValueError as error:
        raise UsageError(f"--option: {error}") from error


def _refuse(names: Collection[str], why: str, hint: str | None = None) -> None:
    """Refuse options that would have no effect."""
    if names:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(names))
        raise UsageError(f"{flags} {'has' if len(names) == 1 else 'have'} no effect: {why}", hint=hint)


def _generate_pairs(
    source: str,
    method: str,
    output: str,
    given: dict[str, Any],
    rejects: str | None,
    overrides: list[str],
    json_output: bool,
) -> None:
    section = "items" if method == CONTRASTIVE else "prompts"
    hint = f"set {section}.split and {section}.column in the recipe" if given.keys() & {"split", "column_map"} else None
    _refuse(given, f"--format {method} takes its settings from the recipe", hint)
    if output == "-":
        raise UsageError(
            f"--format {method} cannot write to stdout: it continues from its file after an interruption",
            hint="pass a file with -o",
        )
    import_libraries()
    if method == CONTRASTIVE:
        from dpoctl.tasks.pair_generation import run
    else:
        from dpoctl.tasks.sampled_pairs import run

    run(source, output=output, rejects=rejects, overrides=overrides, json_output=json_output)

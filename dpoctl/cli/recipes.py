"""The `dpoctl recipes` command."""

import json
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpoctl import console
from dpoctl.cli import options
from dpoctl.errors import UsageError

if TYPE_CHECKING:
    from dpoctl.recipe.shipped import Entry

COPY = "copy"
HEADER = ("recipe", "model", "trains", "GPU", "GiB", "expected")
NARROWEST = 32
"""The width that a column of expected results needs beside the others; with less they are a line of their own."""
FOOTNOTE = (
    "GPU: what a recipe is meant for. GiB: weights, gradients and optimizer state, computed from the model's shape, "
    "on one device that holds all of them; activations come on top. expected: at the end, on the eval set."
)


def complete_name(incomplete: str) -> list[str]:
    """Return the words that may follow `dpoctl recipes` in a shell: names of recipes, and `copy`."""
    from dpoctl.recipe.shipped import shipped_recipes

    return [name for name in (COPY, *shipped_recipes()) if name.startswith(incomplete)]


Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[NAME | copy NAME [FILE]]",
        help="The recipe to print, or to copy to a file: NAME.yaml, or FILE. Default: list all.",
        show_default=False,
        autocompletion=complete_name,
    ),
]
KeyName = Annotated[
    str | None,
    typer.Option("--key", metavar="KEY", help="Explain a key, or all keys of a section or loss.", show_default=False),
]


def recipes(
    words: Words = None,
    key: KeyName = None,
    json_output: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """[bold]dpoctl recipes copy qwen3-4b-dpo-lora mine.yaml[/]

    List, print or copy the recipes that come with dpoctl; with --key, explain keys of recipes.
    """  # noqa: D415 - the help shows an example first
    from dpoctl.recipe.shipped import describe_recipe, find_recipe, shipped_recipes

    words = words or []
    if key is not None:
        if words:
            raise UsageError("--key explains keys, and takes no recipe", hint=f"leave {' '.join(words)} out")
        _explain(key, json_output=json_output)
    elif words[:1] == [COPY]:
        _copy(words[1:], json_output=json_output)
    elif len(words) > 1:
        raise UsageError(
            f"one recipe is printed, not {len(words)}", hint=f"dpoctl recipes {COPY} {words[0]} FILE copies"
        )
    elif words:
        text = find_recipe(words[0]).read_text(encoding="utf-8")
        console.emit(json.dumps({"recipe": text}) if json_output else text.rstrip("\n"))
    else:
        found = {name: describe_recipe(file) for name, file in shipped_recipes().items()}
        if json_output:
            console.emit(json.dumps({name: asdict(entry) for name, entry in found.items()}))
        else:
            console.emit("\n".join(table(found, _width())))
            console.say("\n".join(_wrapped([FOOTNOTE])))


def _copy(words: Sequence[str], *, json_output: bool) -> None:
    from dpoctl.recipe.shipped import find_recipe

    if not 1 <= len(words) <= 2:
        raise UsageError(f"{COPY} takes the name of a recipe, and a file", hint="`dpoctl recipes` lists the names")
    file = find_recipe(words[0])
    target = Path(words[1] if len(words) == 2 else file.name)
    target = target / file.name if target.is_dir() else target
    write_new(target, file.read_text(encoding="utf-8"))
    console.emit(json.dumps({"output": str(target)}) if json_output else str(target))


def write_new(path: Path, text: str) -> None:
    """Write a text to a file that does not exist yet.

    Raises:
        UsageError: It exists, or cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise UsageError(f"{path}: exists already", hint="name another file") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror or error}") from error


def table(recipes: Mapping[str, "Entry"], width: int | None) -> list[str]:
    """Lay recipes out in columns.

    Args:
        recipes: by name.
        width: of the terminal; None where lines may be of any length.
    """
    rows = [HEADER[:5]]
    rows += [(name, *_cells(entry)) for name, entry in recipes.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    used = sum(widths) + 2 * len(widths)
    room = None if width is None else width - used
    lines = []
    for row, result in zip(rows, [HEADER[5], *(entry.result for entry in recipes.values())], strict=True):
        plain = "  ".join(cell.ljust(size) for cell, size in zip(row, widths, strict=True))
        if room is None:
            lines.append(f"{plain}  {result}".rstrip())
        elif room >= NARROWEST:
            first, *rest = textwrap.wrap(result, room) or [""]
            lines += [f"{plain}  {first}".rstrip(), *(" " * used + more for more in rest)]
        else:
            lines.append(plain.rstrip())
            lines += textwrap.wrap(result, width or 80, initial_indent="  expected ") if row != HEADER[:5] else []
    return lines


def _cells(entry: "Entry") -> tuple[str, str, str, str]:
    trains = f"{entry.method} {entry.trained}" if entry.trained else "pairs"
    memory = entry.memory.removesuffix(" GiB").rjust(5) if entry.memory else ""
    return entry.model.rpartition("/")[2], trains, entry.gpu.replace(" x ", "x"), memory


def _explain(name: str, *, json_output: bool) -> None:
    from dpoctl.recipe.reference import find_keys

    found = find_keys(name)
    if json_output:
        console.emit(json.dumps({"keys": [key._asdict() for key in found]}))
        return
    for key in found:
        default = "required" if key.default == "required" else f"default {key.default}"
        console.emit("\n".join(_wrapped((f"{key.name}: {key.type}; {default}", f"  {key.meaning}"))))


def _wrapped(texts: Iterable[str]) -> list[str]:
    """Break lines where a terminal would, with the next ones indented; leave them whole in a pipe."""
    width = _width()
    if width is None:
        return list(texts)
    return [textwrap.fill(text, width, subsequent_indent="  ", break_on_hyphens=False) for text in texts]


def _width() -> int | None:
    """Return the columns of the terminal that stdout goes to; None for a file or a pipe."""
    return max(20, shutil.get_terminal_size().columns - 1) if sys.stdout.isatty() else None

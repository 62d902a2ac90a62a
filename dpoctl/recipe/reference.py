"""The reference of all recipe keys in Markdown; `python -m dpoctl.recipe.reference` prints docs/recipe.md."""

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import pairwise
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dpoctl.errors import UsageError
from dpoctl.losses import LOSSES
from dpoctl.losses.base import loss_parameters
from dpoctl.recipe.document import write_yaml
from dpoctl.recipe.key_errors import closest, describe, hints, unwrap
from dpoctl.recipe.loss_section import DEFAULT
from dpoctl.recipe.pair_generation import ContrastiveRecipe
from dpoctl.recipe.sampled_pairs import SampledRecipe
from dpoctl.recipe.schema import Recipe
from dpoctl.recipe.section import Expect

Titles = dict[type[BaseModel], str]


class Key(NamedTuple):
    """A key of a recipe, or of a section of one, in Markdown."""

    name: str
    type: str
    default: str
    meaning: str


INTRODUCTION = """# Recipe reference

`make docs` writes this page from `dpoctl/recipe/` and `dpoctl/losses/`; do not edit it by hand.

A recipe is a YAML 1.2 file. Every key can also be set on the command line, for example `--set training.seed=1`; the
last part of a key is enough where it is unique (`--set seed=1`). An unknown key is an error. A key without a default is
**required**."""
LOSS_INTRODUCTION = f"""## Losses

The keys of `dpo.loss` for each `type`; the default type is `{DEFAULT}`. Equations are in [losses.md](losses.md).

A list of losses is their weighted sum, for example `loss: [{{type: sigmoid}}, {{type: sft, weight: 0.2}}]`. In a list,
the type is required, and every loss also has the key `weight` (a number above 0, default `1.0`). The type `sft` exists
in lists only: the mean negative log-likelihood of the tokens of preferred responses, without other keys."""


def recipe_reference() -> str:
    """Return a page with a table of keys for each section and each loss."""
    recipe = _titles(Recipe, "Top level")
    contrastive = _titles(ContrastiveRecipe, "Contrastive recipes", "Contrastive: ")
    sampled = _titles(SampledRecipe, "Sampled recipes", "Sampled: ")
    titles = sampled | contrastive | recipe
    parts = [INTRODUCTION, *_pages(recipe, titles), LOSS_INTRODUCTION]
    for name, loss in LOSSES.items():
        summary = " ".join(inspect.cleandoc(loss.__doc__ or "").split("\n\n")[0].split())
        parts += [f"### `{name}`\n\n{summary}", _table(loss_parameters(loss), titles, _attribute_docstrings(loss))]
    parts += _pages({model: title for model, title in contrastive.items() if model not in recipe}, titles)
    known = contrastive | recipe
    parts += _pages({model: title for model, title in sampled.items() if model not in known}, titles)
    return "\n\n".join(parts) + "\n"


def find_keys(name: str) -> list[Key]:
    """Return the keys of a name, under their whole names: one key, all of a section or a loss, or those that end in it.

    Raises:
        UsageError: There is no such key.
    """
    wanted = re.sub(r"\[\d+\]", "", name)
    known = _all_keys()
    for matches in (
        lambda key: f"{key.name.split(' ')[0]}.".startswith(f"{wanted}."),
        lambda key: f".{key.name.split(' ')[0]}".endswith(f".{wanted}"),
        lambda key: key.name.endswith(f" ({wanted})"),
    ):
        found = [key for key in known if matches(key)]
        # A section is known by its keys.
        if found:
            return [key for key in found if key.name != wanted or len(found) == 1]
    last = {key.name.split(" ")[0].rpartition(".")[2] for key in known}
    near = closest(wanted.rpartition(".")[2], last)
    raise UsageError(f"--key: no key of recipes is called {name!r}", hint=near and f"did you mean {near!r}?")


@cache
def _all_keys() -> tuple[Key, ...]:
    """Return the keys of all kinds of recipes and of losses in plain text."""
    return tuple(_iter_keys())


def _iter_keys() -> Iterator[Key]:
    """Yield the keys of all kinds of recipes and of losses in plain text."""
    tables: list[tuple[str, str, Titles, type[BaseModel], Mapping[str, str] | None]] = []
    for root, note in (
        (Recipe, ""),
        (ContrastiveRecipe, " (contrastive recipes)"),
        (SampledRecipe, " (sampled recipes)"),
    ):
        titles = _titles(root, "")
        tables += [(title.strip("`"), note, titles, model, None) for model, title in titles.items()]
    for name, loss in LOSSES.items():
        tables.append(("dpo.loss", f" ({name})", {}, loss_parameters(loss), _attribute_docstrings(loss)))
    yield Key("dpo.loss.type", ", ".join(LOSSES), DEFAULT, "The loss; `--key ipo` explains the keys of one of them.")
    for section, note, titles, model, meanings in tables:
        for key in _keys(model, titles, meanings):
            plain = (
                re.sub(r"\[([^]]*)\]\(#[^)]*\)", r"\1", cell).replace("`", "").replace("**", "") for cell in key[1:]
            )
            yield Key(f"{section}.{key.name}".lstrip(".") + note, *plain)


def _titles(model: type[BaseModel], title: str, prefix: str = "", path: str = "") -> Titles:
    """Return the titles of a section and of all sections in it."""
    titles = {model: title}
    for name in model.model_fields:
        if section := _section_in(hints(model)[name]):
            for inner, its_title in _titles(section, f"{prefix}`{path}{name}`", prefix, f"{path}{name}.").items():
                titles.setdefault(inner, its_title)
    return titles


def _section_in(hint: Any) -> type[BaseModel] | None:
    """Return the section that a type is made of: itself, or the items of its lists."""
    kind, _ = unwrap(hint)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind
    return next((found for inner in get_args(kind) if (found := _section_in(inner))), None)


def _pages(sections: Titles, titles: Titles) -> Iterator[str]:
    for model, title in sections.items():
        yield f"##{'#' * title.count('.')} {title}\n\n{inspect.cleandoc(model.__doc__ or '')}"
        yield _table(model, titles)


def _table(model: type[BaseModel], titles: Titles, meanings: Mapping[str, str] | None = None) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key in _keys(model, titles, meanings):
        cells = (f"`{key.name}`", *key[1:])
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(rows)


def _keys(model: type[BaseModel], titles: Titles, meanings: Mapping[str, str] | None = None) -> Iterator[Key]:
    for name, field in model.model_fields.items():
        meaning = " ".join((meanings[name] if meanings else field.description or "").split())
        yield Key(name, _type_of(hints(model)[name], titles), _default_of(field), meaning)


def _type_of(hint: Any, titles: Titles) -> str:
    section, (kind, metadata) = _section_in(hint), unwrap(hint)
    is_nullable = NoneType in get_args(hint)
    if get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in [*get_args(kind), *(["null"] if is_nullable else [])])
    if section is None:
        return describe(hint)
    words = next((one.words for one in metadata if isinstance(one, Expect)), "a section")
    anchor = re.sub(r"[^\w -]", "", titles[section].lower()).replace(" ", "-")
    return f"[{words}](#{anchor}){', or null' if is_nullable else ''}"


def _default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    return "its defaults" if isinstance(field.default, BaseModel) else f"`{write_yaml(field.default, inline=True)}`"


def _attribute_docstrings(kind: type) -> dict[str, str]:
    """Return the text under each field of a class and of its bases; pydantic reads those of its own classes only."""
    inherited = [_attribute_docstrings(base) for base in kind.__bases__ if hasattr(base, "__dataclass_fields__")]
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    own = {
        field.target.id: text.value.value
        for field, text in pairwise(definition.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }
    return {key: meaning for meanings in (*inherited, own) for key, meaning in meanings.items()}


if __name__ == "__main__":
    sys.stdout.write(recipe_reference())

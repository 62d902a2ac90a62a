"""Paths of a recipe: missing ones and checkpoints are refused before anything heavy is imported.

Relative paths start from the folder in which `dpoctl` is called, not from that of the recipe; errors name both.
"""

from collections.abc import Iterator
from pathlib import Path

from dpoctl.data.sources import FILE, HUB, HUB_ID, kind_of
from dpoctl.errors import DataError, UsageError, UserError
from dpoctl.recipe.pair_generation import ContrastiveRecipe
from dpoctl.recipe.sampled_pairs import SampledRecipe
from dpoctl.recipe.schema import Recipe
from dpoctl.recipe.templates import NAMES
from dpoctl.runs.names import is_checkpoint, run_of_checkpoint

RULE = "relative paths start from the folder in which dpoctl is called"


def check_paths(recipe: Recipe, file: Path) -> None:
    """Make sure that the files of a recipe exist, and that its models are no checkpoints.

    Args:
        recipe: complete.
        file: the recipe's file.

    Raises:
        DataError: A data file does not exist.
        UsageError: A model or a template does not exist but stands beside the recipe, or a model is a checkpoint.
    """
    for error in find_wrong_paths(recipe, file):
        raise error


def find_wrong_paths(recipe: Recipe, file: Path) -> Iterator[UserError]:
    """Yield the errors that `check_paths` raises; see there."""
    for key, value in (
        ("model.model_name_or_path", recipe.model.model_name_or_path),
        ("dpo.reference.path", recipe.dpo.reference.path),
    ):
        if value is not None:
            yield from _wrong_model(key, value, file)
    template = recipe.model.chat_template
    if template is not None and template not in NAMES:
        yield from _beside("model.chat_template", template, file)
    for _, source in recipe.data.sources:
        kind = kind_of(source.path)
        is_missing = not Path(source.path).exists() if kind == FILE else not HUB_ID.fullmatch(source.path)
        if kind in (FILE, HUB) and is_missing:
            yield DataError(
                f"{source.path}: cannot be read: No such file or directory{_looked_in(source.path, file)}",
                hint=_remedy(source.path),
            )
        elif kind == HUB:
            yield from _beside("data", source.path, file)


def check_contrastive_paths(recipe: ContrastiveRecipe, file: Path) -> None:
    """Make sure that the model of a contrastive recipe is no checkpoint, and does not stand beside the recipe only.

    Raises:
        UsageError: It is one, or does.
    """
    for error in _wrong_model("model.model_name_or_path", recipe.model.model_name_or_path, file):
        raise error
    for error in _beside("items.path", recipe.items.path, file):
        raise error


def check_sampled_paths(recipe: SampledRecipe, file: Path) -> None:
    """Make sure that no model of a recipe of sampled pairs is a checkpoint, or stands beside the recipe only.

    Raises:
        UsageError: One is, or does.
    """
    names = {
        "model.model_name_or_path": None if recipe.model is None else recipe.model.model_name_or_path,
        "score.model_name_or_path": recipe.score.model_name_or_path,
    }
    for key, name in names.items():
        for error in _wrong_model(key, name, file) if name is not None else ():
            raise error
    for error in _beside("prompts.path", recipe.prompts.path, file):
        raise error


def _wrong_model(key: str, value: str, file: Path) -> Iterator[UserError]:
    yield from _beside(key, value, file)
    folder = Path(value).expanduser()
    if is_checkpoint(folder):
        run = run_of_checkpoint(folder) or "the folder of the run that wrote it"
        yield UsageError(
            f"{key}: {value} is a checkpoint; only --resume can continue from it",
            hint=f"use {run}: it holds the model of the last step",
        )


def _beside(key: str, value: str, file: Path) -> Iterator[UserError]:
    """Yield an error for what is not in the current folder, but in that of the recipe."""
    if not Path(value).expanduser().exists() and _is_beside(value, file):
        yield UsageError(f"{key}: {value} is not there{_looked_in(value, file)}", hint=RULE)


def _looked_in(value: str, file: Path) -> str:
    """Name the folder in which a relative path was looked for, and that of the recipe."""
    here, folder = Path.cwd(), file.parent.resolve()
    if Path(value).is_absolute():
        return ""
    if here == folder:
        return f" in {here}"
    return f" in {here}, but in {folder}, beside the recipe" if _is_beside(value, file) else f" in {here} or {folder}"


def _is_beside(value: str, file: Path) -> bool:
    return not Path(value).is_absolute() and file.parent.resolve() != Path.cwd() and (file.parent / value).exists()


def _remedy(value: str) -> str:
    parts = [part.strip() for part in value.split(",")]
    if len(parts) > 1:
        return f"several sources are a list: [{', '.join(parts)}]"
    if value.startswith("~"):
        return "~ is not expanded in data paths; write the whole path"
    return f"correct data.train or data.eval{'' if Path(value).is_absolute() else f'; {RULE}'}"

"""The recipes that come with dpoctl: a wheel holds them in the package, a checkout beside it."""

from itertools import takewhile
from pathlib import Path

from dpoctl.errors import UsageError
from dpoctl.recipe.key_errors import closest

PACKAGE = Path(__file__).parents[1]


def shipped_recipes() -> dict[str, Path]:
    """Return the files of all recipes by name."""
    folder = next(path for path in (PACKAGE / "recipes", PACKAGE.parent / "recipes", PACKAGE) if path.is_dir())
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """Return the file of a recipe.

    Args:
        name: Its name, also as a path in the folder `recipes`.

    Raises:
        UsageError: There is no such recipe.
    """
    recipes, wanted = shipped_recipes(), Path(name).name.removesuffix(".yaml").removesuffix(".yml")
    if wanted in recipes:
        return recipes[wanted]
    near = next((name for name in recipes if name.startswith(wanted)), None) or closest(wanted, recipes)
    hint = f"did you mean {near!r}?" if near else "`dpoctl recipes` lists them"
    raise UsageError(f"{name}: no recipe of this name comes with dpoctl", hint=hint)


def summary(recipe: Path) -> str:
    """Return the first sentence of the comment that a recipe begins with."""
    comment = takewhile(lambda line: line.startswith("# "), recipe.read_text(encoding="utf-8").splitlines())
    return " ".join(line.removeprefix("# ").strip() for line in comment).split(". ")[0].rstrip(".")

"""The recipe: its schema, its loading and checks, and advice on it."""

from dpoctl.recipe.diagnostics import RecipeError
from dpoctl.recipe.loader import Examined, examine_recipe, parse_recipe, read_text
from dpoctl.recipe.schema import Recipe

__all__ = ["Examined", "Recipe", "RecipeError", "examine_recipe", "parse_recipe", "read_text"]

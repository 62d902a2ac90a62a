"""The recipe: its schema, how it is read, and how it is written back."""

from dpoctl.recipe.json_schema import json_schema
from dpoctl.recipe.loader import Examined, examine_recipe, load_recipe, parse_recipe, read_text
from dpoctl.recipe.problems import RecipeError
from dpoctl.recipe.schema import Recipe

__all__ = [
    "Examined",
    "Recipe",
    "RecipeError",
    "examine_recipe",
    "json_schema",
    "load_recipe",
    "parse_recipe",
    "read_text",
]

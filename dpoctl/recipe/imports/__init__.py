"""Configs of other tools become recipes, with a report on what each of their keys has become."""

from dpoctl.recipe.imports.convert import Imported, import_config

__all__ = ["Imported", "import_config"]

"""The import of a config: which tool it is for, the recipe, its text, and what is still to be settled in it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpoctl.recipe.diagnostics import RecipeError
from dpoctl.recipe.document import write_yaml
from dpoctl.recipe.imports import axolotl, llama_factory, torchtune, trl
from dpoctl.recipe.imports.reading import Foreign, read_foreign
from dpoctl.recipe.imports.translation import Report, Translation
from dpoctl.recipe.loader import examine_recipe

TOOLS: dict[str, tuple[Callable[[Foreign], str], Callable[[Translation, Foreign, str], None]]] = {
    "TRL": (trl.method_of, trl.translate),
    "the alignment-handbook": (trl.method_of, trl.translate),
    "axolotl": (axolotl.method_of, axolotl.translate),
    "LLaMA-Factory": (llama_factory.method_of, llama_factory.translate),
    "torchtune": (torchtune.method_of, torchtune.translate),
}
ORDER = ("method", "model", "quantization", "lora", "data", "sft", "dpo", "training")
KEYS = ("model_name_or_path", "output_dir", "global_batch_size", "num_train_epochs", "max_steps", "learning_rate")


@dataclass
class Imported:
    """A config as a recipe.

    Attributes:
        text: the recipe.
        report: the fate of each key of the config.
        templates: chat templates that the config held, by the name of the file that the recipe expects.
        problems: what keeps dpoctl from accepting the recipe, to be settled by hand.
    """

    text: str
    report: Report
    templates: dict[str, str]
    problems: list[str]


def import_config(path: Path, *, processes: int | None = None, template: str = "chat_template.jinja") -> Imported:
    """Turn a config of another tool into a recipe.

    Args:
        path: Its file: YAML, JSON, or a script with a command line.
        processes: The number of processes that it is for. None: that of its command line, or 1.
        template: The path of a file for a chat template that stands in the config.

    Raises:
        UsageError: It cannot be read, or is for no tool or method that dpoctl knows.
    """
    foreign = read_foreign(path)
    method_of, translate = TOOLS[foreign.tool]
    method = method_of(foreign)
    job = Translation(foreign.tool, foreign.config, processes or foreign.processes, template)
    translate(job, foreign, method)
    text = f"# From {path.name}, a config of {foreign.tool}.\n#   dpoctl {method} FILE --dry-run\n"
    text += write_yaml(_sorted(job.recipe))
    return Imported(text, job.report, job.templates, _problems(text, method))


def _sorted(recipe: dict[str, Any]) -> dict[str, Any]:
    ordered = {key: recipe[key] for key in ORDER if key in recipe} | recipe
    training = ordered.get("training", {})
    first = {key: training[key] for key in KEYS if key in training}
    return {key: value for key, value in ordered.items() if value != {}} | {"training": first | training}


def _problems(text: str, method: str) -> list[str]:
    """Return what is wrong with a recipe that was made."""
    try:
        problems = examine_recipe(text, "recipe", command=method).problems
    except RecipeError as error:
        problems = list(error.problems)
    return [problem.message for problem in problems]

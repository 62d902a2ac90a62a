"""The recipes that come with dpoctl: a wheel holds them in the package, a checkout beside it."""

import re
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

from dpoctl.errors import UsageError
from dpoctl.recipe.document import read_document
from dpoctl.recipe.key_errors import closest

PACKAGE = Path(__file__).parents[1]
FACT = re.compile(r"# (GPU|Memory): ([^,\n]+)")
"""A line of the comment that a recipe begins with: the hardware it is meant for, and the memory of its fixed part."""
PROSE = re.compile(r"# \S")
"""Prose of that comment; commands in it are indented."""
SHORT = {"eval_loss": "loss", "eval_rewards/accuracies": "accuracy", "eval_rewards/margins": "margin"}


@dataclass(frozen=True)
class Entry:
    """A recipe in a list of recipes.

    Attributes:
        summary: the first sentence of its comment.
        model: that it trains, by its hub id, its folder or its type.
        method: `sft`, `dpo`, `contrastive` or `sampled`.
        trained: `full`, `LoRA` or `QLoRA`.
        gpu: that it is meant for; empty where none is needed.
        memory: of weights, gradients and optimizer state, computed from the shape of the model; empty if unknown.
        expected: the lowest and the highest value of each metric that the run should end with.
    """

    summary: str
    model: str
    method: str
    trained: str
    gpu: str
    memory: str
    expected: dict[str, list[float]]

    @property
    def result(self) -> str:
        """The expected metrics in short."""
        ranges = ((SHORT.get(metric, metric), *bounds) for metric, bounds in self.expected.items())
        return ", ".join(f"{metric} {low:g}-{high:g}" for metric, low, high in ranges)


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


@cache
def describe_recipe(file: Path) -> Entry:
    """Read what a list of recipes says about one."""
    text = file.read_text(encoding="utf-8")
    data: dict[str, Any] = read_document(text, file.name).data
    model = data.get("model") or {}
    scratch = model.get("from_scratch")
    trained = "full" if "lora" not in data else "QLoRA" if "quantization" in data else "LoRA"
    facts = dict(FACT.findall(text))
    return Entry(
        summary=_summary(text),
        model=f"new {scratch['config']['model_type']}" if scratch else str(model.get("model_name_or_path")),
        method=str(data["method"]),
        trained="" if data["method"] in ("contrastive", "sampled") else trained,
        gpu=facts.get("GPU", "none").replace("none", ""),
        memory=facts.get("Memory", ""),
        expected=data.get("expected") or {},
    )


def _summary(text: str) -> str:
    """Return the first sentence of the comment that a recipe begins with."""
    prose = takewhile(lambda line: PROSE.match(line) and not FACT.match(line), text.splitlines())
    return " ".join(line.removeprefix("# ") for line in prose).split(". ")[0].rstrip(".")

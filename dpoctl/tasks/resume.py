"""What may change when a run goes on: nothing that its steps depend on."""

from collections.abc import Mapping
from typing import Any

import yaml

from dpoctl.errors import UsageError
from dpoctl.recipe.schema import Recipe
from dpoctl.runs.directory import RunDirectory

# How a run is watched, and how its steps are cut up: none of it changes what is learned.
FREE = {
    *("eval", "data.eval", "training.output_dir", "training.logging_steps", "training.eval_steps"),
    *("training.eval_on_start", "training.save_steps", "training.save_total_limit", "training.report_to"),
    *("training.run_name", "training.max_tokens_per_device", "training.gradient_checkpointing"),
}


def refuse_other_recipe(directory: RunDirectory, recipe: Recipe) -> None:
    """Compare a recipe with the one that a run began with, before that one is overwritten.

    Raises:
        UsageError: a key differs that the steps depend on; names all of them.
    """
    if not directory.resolved_recipe.is_file() or not directory.checkpoints.is_dir():
        return
    before = _flatten(yaml.safe_load(directory.resolved_recipe.read_text(encoding="utf-8")))
    now = _flatten(yaml.safe_load(recipe.to_yaml()))
    now["data.train"] = _with_formats(now["data.train"], before["data.train"])
    changed = [
        f"{key} ({before.get(key)} -> {now.get(key)})"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not any(key == free or key.startswith(f"{free}.") for free in FREE)
    ]
    if changed:
        raise UsageError(
            f"{directory.path}: the run began with another recipe: {', '.join(changed)}",
            hint="put it back to go on, or start anew with --overwrite",
        )


def _with_formats(sources: list[dict[str, Any]], before: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Take `auto` for the format that it found when the run began: other rows would be noticed by their tokens."""
    if len(before) != len(sources):
        return sources
    return [
        now | {"format": then["format"]} if "auto" in (now["format"], then["format"]) else now
        for now, then in zip(sources, before, strict=True)
    ]


def _flatten(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {path: value}
    items = ((f"{path}.{key}" if path else str(key), item) for key, item in value.items())
    return {name: leaf for key, item in items for name, leaf in _flatten(item, key).items()}

"""What may change when a run goes on: nothing that its steps depend on."""

import json
from collections.abc import Collection, Mapping
from typing import Any

import yaml

from dpoctl.errors import UsageError
from dpoctl.recipe.schema import Recipe
from dpoctl.runs.checkpoint import Checkpoint
from dpoctl.runs.directory import RunDirectory
from dpoctl.runs.environment import installed_version
from dpoctl.runs.redact import redact

# How a run is watched, and how its steps are cut up: none of it changes what is learned.
FREE = {
    *("eval", "data.eval", "training.output_dir", "training.logging_steps", "training.eval_steps"),
    *("training.eval_on_start", "training.save_steps", "training.save_total_limit", "training.report_to"),
    *("training.run_name", "training.max_tokens_per_device", "training.gradient_checkpointing"),
    *("training.resume", "training.on_nonfinite", "training.ddp_timeout"),
    *("training.hub_model_id", "training.hub_private_repo"),
}
# Another version of one of these may compute other bits.
COMPUTING = ("dpoctl", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "numpy")
DATA = "data"


def refuse_changes(directory: RunDirectory, recipe: Recipe, allowed: Collection[str] = ()) -> None:
    """Compare recipe and software with those that a run began with, before these are overwritten.

    Args:
        directory: of the run.
        recipe: to go on with.
        allowed: keys that may differ, by their names in the refusal.

    Raises:
        UsageError: a key differs that the steps depend on; names all of them.
    """
    if not directory.resolved_recipe.is_file() or not directory.checkpoints.is_dir():
        return
    before = _flatten(yaml.safe_load(directory.resolved_recipe.read_text(encoding="utf-8"))) | _versions_of(directory)
    now = _flatten(redact(yaml.safe_load(recipe.to_yaml())))
    now["data.train"] = _with_formats(now["data.train"], before["data.train"])
    now |= {f"versions.{name}": installed_version(name) for name in COMPUTING if f"versions.{name}" in before}
    changed = {
        key: f"{key} ({before.get(key)} -> {now.get(key)})"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not _within(key, FREE) and not _within(key, allowed)
    }
    if changed:
        raise UsageError(
            f"{directory.path}: the run began with other settings: {', '.join(changed.values())}",
            hint="put them back to go on, start anew with --overwrite, or go on all the same with "
            + " ".join(f"--allow-changed {key}" for key in changed),
        )


def refuse_other_data(directory: RunDirectory, newest: Checkpoint, data_key: str, allowed: Collection[str]) -> None:
    """Compare the tokens that a run is given with those that it began with.

    Raises:
        UsageError: they differ.
    """
    if newest.extra["data"] != data_key and DATA not in allowed:
        raise UsageError(
            f"{directory.path}: the training data, the tokenizer or the template is not what the run began with",
            hint=f"put it back, start anew with --overwrite, or go on all the same with --allow-changed {DATA}",
        )


def _within(key: str, names: Collection[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _versions_of(directory: RunDirectory) -> dict[str, Any]:
    try:
        packages = json.loads((directory.path / "env.json").read_text(encoding="utf-8"))["packages"]
    except (OSError, ValueError, KeyError):
        return {}
    return {f"versions.{name}": packages[name] for name in COMPUTING if name in packages}


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

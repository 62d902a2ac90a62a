"""Checks before a run is resumed: recipe, models, tokenizer, data and machine are those that its steps depend on."""

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from dpoctl import console
from dpoctl.data.tokenize import Encoder
from dpoctl.errors import SetupError, UsageError
from dpoctl.model.integrity import fingerprint_adapter, fingerprint_all, fingerprint_model
from dpoctl.model.source import base_of, find_adapter, find_source, first_line, recipe_source
from dpoctl.model.tokenizer import stop_tokens
from dpoctl.recipe.consistency import resolved_yaml
from dpoctl.recipe.document import flatten
from dpoctl.recipe.schema import Recipe
from dpoctl.runs.checkpoint import Checkpoint
from dpoctl.runs.directory import RunDirectory
from dpoctl.runs.environment import installed_version
from dpoctl.tasks.reference import fingerprint
from dpoctl.tasks.setup import Setup
from dpoctl.tasks.task import build_task

# Keys that do not change the result: evaluation, logging, micro-batches.
FREE = {
    *("eval", "expected", "data.eval", "training.output_dir", "training.logging_steps", "training.eval_steps"),
    *("training.eval_on_start", "training.save_steps", "training.save_total_limit", "training.report_to"),
    *("training.run_name", "training.max_tokens_per_device", "training.gradient_checkpointing"),
    *("training.sharding", "training.replicas", "training.cpu_offload"),
    *(
        "training.keep_best",
        "training.early_stopping",
        "training.resume",
        "training.on_nonfinite",
        "training.ddp_timeout",
    ),
    *("training.hub_model_id", "training.hub_private_repo"),
}
# Packages of which another version may compute other bits.
COMPUTING = ("dpoctl", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "numpy")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables by which a user asks for a number of threads."""
TOKENS = ("tokenizer", "chat_template")
"""Inputs that decide the tokens of the training data."""
MATHS = {
    "model": "another config.json or other code of {model}",
    "weights": "other weights of {model}",
    "adapter": "other weights or settings of {adapter}",
    "reference": "other weights at {reference}",
    "tokenizer": "another vocabulary, or other tokens that end an answer",
    "chat_template": "another text",
    "data": "other rows",
}
"""Inputs of which another one gives another result, and words for what has changed."""
NAMES = {"weights": "model"}
"""Names of inputs for --allow-changed, where they are not their own."""


def inputs_of(setup: Setup, data_key: str) -> dict[str, Any]:
    """Return fingerprints of everything that the steps of a run depend on and that its checkpoints do not hold.

    Args:
        setup: the model before its first update, on the first rank.
        data_key: identifies the tokens of the training data.
    """
    recipe, tokenizer = setup.recipe, setup.tokenizer
    encoder, special = Encoder(tokenizer), dict(tokenizer.special_tokens_map)
    stops = stop_tokens(recipe, tokenizer)
    inputs = {
        "data": data_key,
        "tokenizer": _digest([encoder.state, encoder.bos, encoder.eos, special, sorted(stops or ())]),
        "chat_template": _digest(tokenizer.chat_template),
        "machine": _machine(setup),
    }
    if recipe.model.from_scratch is not None or setup.extensions.model_init is not None:
        # There are no files of this model. Its weights matter as long as they are the reference.
        # Recipe and tokenizer describe a model from scratch, the only one of these that is divided over the ranks.
        is_reference = setup.starts_at_reference and recipe.dpo.reference.sync_steps is None and not setup.sharding
        inputs["weights"] = fingerprint(setup.policy.reference_tensors()) if is_reference else ""
    else:
        source = recipe_source(recipe.model)
        if (adapter := find_adapter(source)) is not None:
            inputs["adapter"] = fingerprint_adapter(adapter)
            source = base_of(adapter, trust_remote_code=source.trust_remote_code)
        about = fingerprint_model(source)
        inputs |= {"model": about["config"], "weights": about["weights"]}
    if setup.task.needs_reference and recipe.dpo.reference.path is not None:
        trusted = recipe.model.trust_remote_code
        inputs["reference"] = fingerprint_all(find_source(recipe.dpo.reference.path, trust_remote_code=trusted))
    return inputs


def keep_threads(newest: Checkpoint) -> None:
    """Compute with as many threads as the run did, unless the user asks for a number or the machine has fewer cores."""
    threads = newest.extra["inputs"]["machine"]["threads"]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not any(os.environ.get(name) for name in THREADS) and threads <= cores:
        torch.set_num_threads(threads)


def refuse_changes(directory: RunDirectory, recipe: Recipe, allowed: Collection[str] = ()) -> None:
    """Compare a recipe with the one that the run started with, before its file is overwritten.

    Args:
        directory: the run directory.
        recipe: the recipe to resume with.
        allowed: keys that may differ, as the error names them.

    Raises:
        UsageError: keys differ that the steps depend on; the error names all of them.
        SetupError: the recipe that the run has written is damaged.
    """
    if not directory.resolved_recipe.is_file() or not directory.checkpoints.is_dir():
        return
    before = flatten(_recorded(directory.resolved_recipe))
    now = flatten(yaml.safe_load(resolved_yaml(recipe)))
    now["data.train"] = _with_formats(now["data.train"], before.get("data.train"))
    changed = {
        key: f"{key} ({before.get(key)} -> {now.get(key)})"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not _within(key, FREE) and not _within(key, allowed)
    }
    if changed:
        raise UsageError(
            f"{directory.path}: the run started with other settings: {', '.join(changed.values())}",
            hint="change them back, or start again with --overwrite, or accept the change with "
            + " ".join(f"--allow-changed {key}" for key in changed),
        )


def refuse_other_inputs(
    directory: RunDirectory, recipe: Recipe, newest: Checkpoint, inputs: Mapping[str, Any], allowed: Collection[str]
) -> None:
    """Compare the inputs of a run with those that its newest checkpoint was computed from.

    What changes the result is refused; what changes only its bits is said in one line.

    Args:
        directory: the run directory.
        recipe: the recipe to resume with.
        newest: the checkpoint to resume from.
        inputs: what `inputs_of` returns now.
        allowed: names of inputs that may differ, as the error names them.

    Raises:
        UsageError: inputs differ that the result depends on; the error names all of them.
    """
    before = newest.extra["inputs"]
    changed = [name for name in MATHS if before.get(name) != inputs.get(name)]
    if any(name in changed for name in TOKENS) and recipe.model.from_scratch is None:
        changed.remove("data")  # the rows may well be the same
    if "weights" in changed and not _needs_start(recipe, inputs):
        changed.remove("weights")
        console.note(f"{recipe.model.model_name_or_path} has other weights now; the run goes on with its own")
    refused = [name for name in changed if NAMES.get(name, name) not in allowed]
    if refused:
        model = recipe.model.model_name_or_path or "the model"
        words = {
            "model": f"the base of {model}" if "adapter" in inputs else model,
            "adapter": model,
            "reference": recipe.dpo.reference.path,
        }
        parts = [f"{NAMES.get(name, name)} ({MATHS[name].format(**words)})" for name in refused]
        options = dict.fromkeys(f"--allow-changed {NAMES.get(name, name)}" for name in refused)
        raise UsageError(
            f"{directory.path}: changed since the run started: {', '.join(parts)}",
            hint=f"change it back, or start again with --overwrite, or accept the change with {' '.join(options)}",
        )
    _say_other_machine(before["machine"], inputs["machine"])


def _needs_start(recipe: Recipe, inputs: Mapping[str, Any]) -> bool:
    """Whether the weights that training started from are still used after the first step."""
    if recipe.lora is not None or recipe.training.trainable is not None or "model" not in inputs:
        return True
    reference = recipe.dpo.reference
    needed = recipe.method == "dpo" and build_task(recipe).needs_reference
    return needed and reference.path is None and reference.sync_steps is None


def _machine(setup: Setup) -> dict[str, Any]:
    """Return what changes the rounding of a run, and nothing else."""
    device = setup.accelerator.device.type
    return {
        "device": f"{device} ({str(setup.policy.dtype).removeprefix('torch.')})",
        "processes": setup.accelerator.num_processes,
        "threads": torch.get_num_threads(),
        **{name: found for name in COMPUTING if (found := installed_version(name))},
    }


def _say_other_machine(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    # A GPU rounds the same with any number of threads.
    if not str(now["device"]).startswith("cpu"):
        names = [name for name in names if name != "threads"]
    if names:
        changes = ", ".join(f"{name} ({before.get(name, 'none')} -> {now.get(name, 'none')})" for name in names)
        console.note(f"changed since the run started: {changes}: the same mathematics, but not the same bits")


def _within(key: str, names: Collection[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _recorded(file: Path) -> dict[str, Any]:
    """Read the recipe that a run has written, which another version may have done."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is not a recipe")
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise SetupError(
            f"{file} is damaged: {first_line(error)}", hint="copy it from a backup, or start again with --overwrite"
        ) from error
    return content


def _with_formats(sources: list[dict[str, Any]], before: Any) -> list[dict[str, Any]]:
    """Treat `auto` and the format that was detected at the start as equal: other rows would have other tokens."""
    is_like = isinstance(before, list) and all(isinstance(then, dict) and "format" in then for then in before)
    if not is_like or len(before) != len(sources):
        return sources
    return [
        now | {"format": then["format"]} if "auto" in (now["format"], then["format"]) else now
        for now, then in zip(sources, before, strict=True)
    ]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]

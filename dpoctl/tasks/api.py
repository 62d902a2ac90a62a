"""The Python functions `dpoctl.sft` and `dpoctl.dpo`: training with a recipe and the user's own code."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dpoctl.errors import UsageError
from dpoctl.recipe import examine_recipe, read_text
from dpoctl.tasks import train
from dpoctl.tasks.extensions import Extensions
from dpoctl.tasks.paths import check_paths


def run(
    command: str,
    recipe: str | Path | Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    allow_changed: Sequence[str] = (),
    overwrite: bool = False,
    callbacks: Sequence[Any] = (),
    **code: Any,
) -> dict[str, Any]:
    """Train a recipe with the caller's code; see `dpoctl.sft` for the arguments.

    Args:
        command: `sft` or `dpo`.
        recipe: the YAML file, or its content as a mapping.
        overrides: `key=value` texts.
        resume: continue from the newest checkpoint.
        allow_changed: keys that may differ from the recipe that the run started with.
        overwrite: delete an earlier run.
        callbacks: the callbacks of `Extensions`.
        code: the other fields of `Extensions`; None means the default.
    """
    if resume and overwrite:
        raise UsageError("resume and overwrite cannot be used together")
    if isinstance(recipe, Mapping):
        plain = json.loads(json.dumps(recipe, default=os.fspath))
        text, name = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), "recipe"
    else:
        text, name = read_text(recipe), str(recipe)
    examined = examine_recipe(text, name, command=command, overrides=overrides)
    checked = examined.accept()
    check_paths(checked, Path(name))
    given = {field: value for field, value in code.items() if value is not None}
    return train.run(
        checked,
        recipe_text=text,
        document=examined.document,
        resume=resume,
        allow_changed=allow_changed,
        overwrite=overwrite,
        extensions=Extensions(callbacks=tuple(callbacks), **given),
    )

"""The Python functions `dpoctl.sft` and `dpoctl.dpo`: a recipe, and the code that it cannot hold."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dpoctl.core.losses import LOSSES
from dpoctl.data.formats import FORMATS
from dpoctl.errors import UsageError
from dpoctl.recipe import examine_recipe, read_text
from dpoctl.tasks import train
from dpoctl.tasks.extensions import Extensions


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
    """Train a recipe with code of the caller's; see `dpoctl.sft` for the arguments.

    Args:
        command: `sft` or `dpo`.
        recipe: the YAML file, or what would stand in it.
        overrides: `key=value` texts.
        resume: go on from the newest checkpoint.
        allow_changed: keys that may differ from what the run began with.
        overwrite: replace an earlier run.
        callbacks: of `Extensions`.
        code: the other fields of `Extensions`; None is the default.
    """
    if resume and overwrite:
        raise UsageError("resume and overwrite exclude each other")
    if isinstance(recipe, Mapping):
        plain = json.loads(json.dumps(recipe, default=os.fspath))
        text, name = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), "recipe"
    else:
        text, name = read_text(recipe), str(recipe)
    examined = examine_recipe(text, name, command=command, overrides=overrides, losses=LOSSES, formats=FORMATS)
    given = {field: value for field, value in code.items() if value is not None}
    return train.run(
        examined.accept(),
        recipe_text=text,
        document=examined.document,
        resume=resume,
        allow_changed=allow_changed,
        overwrite=overwrite,
        extensions=Extensions(callbacks=tuple(callbacks), **given),
    )

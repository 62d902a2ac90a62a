"""A finished run: its recipe, its model with the saved tokenizer, and the reference that it was trained against."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Self

import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpoctl import console
from dpoctl.errors import SetupError, UsageError
from dpoctl.model.lazy_weights import is_lazy
from dpoctl.model.load import compute_dtype, load_policy, load_run
from dpoctl.model.policy import FROZEN, Policy
from dpoctl.model.source import ADAPTER_CONFIG, find_adapter, find_source, first_line
from dpoctl.model.tokenizer import read_tokenizer
from dpoctl.recipe import Recipe, parse_recipe
from dpoctl.recipe.diagnostics import RecipeError
from dpoctl.recipe.schema import HUB_REPOSITORY
from dpoctl.runs.names import RESOLVED_RECIPE, require_run
from dpoctl.runs.status import describe_status, read_status
from dpoctl.tasks.extensions import recorded_extensions
from dpoctl.tasks.reference import load_reference

MODEL_CONFIGS = ("config.json", ADAPTER_CONFIG)
MERGED = "merged"
"""The folder in a run that `dpoctl merge` writes."""
STEP = re.compile(r"step-(\d{6,})")
"""The name of a folder in a run with the model of an earlier step."""


def recipe_of(run: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read the resolved recipe of a run.

    Args:
        run: the run directory.
        overrides: `key=value` texts that replace values of it.

    Raises:
        UsageError: The folder is not a run of dpoctl.
        SetupError: Its recipe is damaged.
    """
    if is_model_only(run):
        return model_recipe(run, overrides=overrides)
    home = home_of(run)
    require_run(home)
    return read_resolved(home / RESOLVED_RECIPE, overrides)


def read_resolved(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe that a run has written.

    Raises:
        SetupError: The file is damaged.
        RecipeError: An override is wrong.
    """
    hint = "copy the run again, or put the recipe that it started with in its place"
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
        recipe = parse_recipe(text, str(path), command=content["method"])
    except RecipeError as error:
        first = error.problems[0]
        raise SetupError(f"{first.where}: {first.message}", hint=f"the run wrote this file: {hint}") from error
    except (OSError, ValueError, TypeError, LookupError, RecursionError, yaml.YAMLError) as error:
        raise SetupError(f"{path} is damaged: {first_line(error)}", hint=hint) from error
    return parse_recipe(text, str(path), command=recipe.method, overrides=overrides) if overrides else recipe


def home_of(folder: Path) -> Path:
    """Return the run that a model belongs to: the folder itself, or the run in which the folder was written."""
    home = folder
    while not (home / RESOLVED_RECIPE).is_file():
        if home.name != MERGED and not STEP.fullmatch(home.name):
            return folder
        home = home.parent
    return home


def is_model_only(folder: Path) -> bool:
    """Whether a folder, or a repository of the hub, holds a model that no run of dpoctl describes."""
    if not folder.exists() and HUB_REPOSITORY.fullmatch(str(folder)):
        return True
    is_run = (home_of(folder) / RESOLVED_RECIPE).is_file()
    return not is_run and any((folder / name).is_file() for name in MODEL_CONFIGS)


def model_recipe(folder: Path, *, method: str = "dpo", overrides: Sequence[str] = ()) -> Recipe:
    """Return a recipe for a model that no run describes: it has no reference and no data of its own."""
    loss = {"dpo": {"loss": {"type": "sigmoid", "reference_free": True}}} if method == "dpo" else {}
    recipe = {
        "method": method,
        "model": {"model_name_or_path": str(folder)},
        "data": {"train": [str(folder)]},
        **loss,
        "training": {"output_dir": str(folder / "run"), "learning_rate": 1e-6},
    }
    return parse_recipe(yaml.safe_dump(recipe), str(folder), command=method, overrides=overrides)


def require_model(run: Path) -> None:
    """Refuse a run that has not finished.

    Raises:
        UsageError: The run has no exported model.
    """
    if not is_model_only(run) and not any((run / name).is_file() for name in MODEL_CONFIGS):
        status = read_status(run)
        ended = describe_status(status) if status and status["state"] != "finished" else "has not finished"
        raise UsageError(f"{run} has no trained model: the run {ended}", hint="continue it with --resume")


def require_known_start(run: Path, recipe: Recipe) -> None:
    """Refuse a comparison with the model that a run started from if the user's code made that model.

    Raises:
        UsageError: It did: the run does not keep that model.
    """
    made_by = recorded_extensions(home_of(run)).get("model_init")
    if made_by and recipe.dpo.reference.path is None:
        raise UsageError(
            f"{run} started from a model that {made_by[0]} made, and does not keep that model",
            hint="save the model before training, and set dpo.reference.path to its folder",
        )


def best_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class FinishedRun:
    """A finished run with its model.

    Attributes:
        path: the run directory.
        recipe: the resolved recipe.
        policy: the trained model.
        tokenizer: the tokenizer that was saved with the model, with its chat template.
        device: the device of the weights.
        lazy: whether weights are left in their files until the model is divided over the ranks.
    """

    path: Path
    recipe: Recipe
    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    lazy: bool = False

    @classmethod
    def load(cls, run: Path, device: torch.device, dtype: torch.dtype | None = None, *, lazy: bool = False) -> Self:
        """Load a run as it was trained: in the same precision, with the same quantisation of the base.

        Args:
            run: the run directory.
            device: the device of the weights.
            dtype: the dtype of the weights; the default is the precision of the computation.
            lazy: leave weights in their files, if that can be done, until the model is divided over the ranks.

        Raises:
            UsageError: The folder is not a run, or the run has not finished.
            SetupError: The base model of its adapter is missing.
        """
        recipe = recipe_of(run)
        require_model(run)
        with console.WorkProgress("loading the model"):
            policy = load_run(
                run,
                device,
                dtype or compute_dtype(recipe, device),
                attn_implementation=recipe.model.attn_implementation,
                quantization=recipe.quantization,
                trust_remote_code=recipe.model.trust_remote_code,
                lazy=lazy,
            )
        source = find_source(str(run), trust_remote_code=recipe.model.trust_remote_code)
        return cls(run, recipe, policy, read_tokenizer(source), device, lazy)

    def load_reference_adapter(self) -> None:
        """Load what `reference` adds to the policy, which must be there before the policy is divided over the ranks."""
        if self.policy.kind == "lora" and not is_model_only(self.path) and self.recipe.dpo.reference.path is None:
            _ = self._with_frozen_adapter

    @contextmanager
    def reference(self) -> Iterator[PreTrainedModel]:
        """Yield the reference of the run, or the model that an SFT run started from.

        That is the base with adapters off, the SFT adapter that the run started from, the model before training, or
        the model at `dpo.reference.path`.

        Raises:
            UsageError: The user's code made the model that training started from, or no run describes the model.
        """
        if is_model_only(self.path):
            raise UsageError(f"{self.path} is a model that no run describes: it has no reference", hint="pass a run")
        if self.other_policy is not None:
            yield self.other_policy.causal
            return
        with self._with_frozen_adapter.reference():
            yield self.policy.causal

    @cached_property
    def other_policy(self) -> Policy | None:
        """The reference if it is a separate model."""
        recipe, policy = self.recipe, self.policy
        if recipe.method == "dpo" and recipe.dpo.reference.path is not None:
            return load_reference(recipe, self.device, policy.dtype, lazy=self.lazy)
        if policy.kind == "lora":
            return None
        require_known_start(self.path, recipe)
        start = load_policy(recipe, self.tokenizer, self.device, lazy=self.lazy)
        for parameter in start.causal.parameters():
            parameter.requires_grad_(False)
            if not is_lazy(parameter):
                parameter.data = parameter.data.to(policy.dtype)
        return start

    @cached_property
    def _with_frozen_adapter(self) -> Policy:
        """The policy, and beside its own adapter the SFT adapter that it started from, if there was one."""
        section = self.recipe.model
        start = find_source(
            section.model_name_or_path or "", revision=section.revision, trust_remote_code=section.trust_remote_code
        )
        adapter = find_adapter(start)
        if adapter is None:
            return self.policy
        from dpoctl.model.lora import add_frozen_adapter  # noqa: PLC0415 - peft takes a second to import

        add_frozen_adapter(self.policy.model, adapter)
        self.policy.model.requires_grad_(False)
        return replace(self.policy, reference_adapters=(FROZEN,))

"""A finished run, to be looked at: its recipe, its model with the saved tokenizer, and the reference it came from."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Self

import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpoctl.core.losses import LOSSES
from dpoctl.data.formats import FORMATS
from dpoctl.errors import UsageError
from dpoctl.model.load import load_policy, load_run, resolve_dtype
from dpoctl.model.policy import FROZEN, Policy
from dpoctl.model.source import ADAPTER_CONFIG, find_adapter, find_source
from dpoctl.model.tokenizer import read_tokenizer
from dpoctl.recipe import Recipe, parse_recipe
from dpoctl.runs.directory import RESOLVED_RECIPE
from dpoctl.tasks.extensions import recorded_in
from dpoctl.tasks.reference import load_named

MODEL_CONFIGS = ("config.json", ADAPTER_CONFIG)


def recipe_of(run: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read the resolved recipe of a run.

    Args:
        run: the run directory.
        overrides: `key=value` texts that win over it.

    Raises:
        UsageError: The folder is no run of dpoctl.
    """
    if not run.is_dir():
        raise UsageError(f"there is no run directory {str(run)!r}", hint="name the output_dir of a finished run")
    path = run / RESOLVED_RECIPE
    if not path.is_file():
        raise UsageError(f"{run} is not a run of dpoctl: it has no {RESOLVED_RECIPE}")
    text = path.read_text(encoding="utf-8")
    method = yaml.safe_load(text).get("method")
    return parse_recipe(text, str(path), command=method, overrides=overrides, losses=LOSSES, formats=FORMATS)


def require_model(run: Path) -> None:
    """Refuse a run that has not come to its end.

    Raises:
        UsageError: No model was exported.
    """
    if not any((run / name).is_file() for name in MODEL_CONFIGS):
        raise UsageError(f"{run} holds no trained model yet: the run has not finished", hint="finish it with --resume")


def require_known_start(run: Path, recipe: Recipe) -> None:
    """Refuse to say what a run is compared with where code made the model that it started from.

    Raises:
        UsageError: It did; a run does not keep that model.
    """
    made = recorded_in(run).get("model_init")
    if made and recipe.dpo.reference.path is None:
        raise UsageError(
            f"{run} started from a model that {made[0]} made, and does not hold it",
            hint="save such a model, and name its folder as dpo.reference.path",
        )


def best_device() -> torch.device:
    """A GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class FinishedRun:
    """A run that has ended, with its model.

    Attributes:
        path: the run directory.
        recipe: as it was resolved.
        policy: the model that was trained.
        tokenizer: as it was saved with the model, with its chat template.
    """

    path: Path
    recipe: Recipe
    policy: Policy
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(cls, run: Path, device: torch.device, dtype: torch.dtype | None = None) -> Self:
        """Load a run as it was trained: in its precision, its base quantised as it was.

        Args:
            run: the run directory.
            device: where to put it.
            dtype: what to store it in, if not in the precision of its computation.

        Raises:
            UsageError: The folder is no run, or the run has not finished.
            SetupError: The base of its adapter is not there.
        """
        recipe = recipe_of(run)
        require_model(run)
        policy = load_run(
            run,
            device,
            dtype or resolve_dtype(recipe.model.dtype, device),
            attn_implementation=recipe.model.attn_implementation,
            quantization=recipe.quantization,
            trust_remote_code=recipe.model.trust_remote_code,
        )
        source = find_source(str(run), trust_remote_code=recipe.model.trust_remote_code)
        return cls(run, recipe, policy, read_tokenizer(source))

    @contextmanager
    def reference(self) -> Iterator[PreTrainedModel]:
        """Inside it, the model that is yielded computes what the run was compared with, or started from.

        That is the base with adapters off, the SFT adapter that the run started from, the model as it was before
        training, or the one that the recipe names.

        Raises:
            UsageError: Code made the model that training started from.
        """
        other = self._other_model
        if other is not None:
            yield other
            return
        with self._with_frozen_adapter.reference():
            yield self.policy.causal

    @cached_property
    def _other_model(self) -> PreTrainedModel | None:
        """The reference where it is a model of its own; loaded when it is first asked for."""
        recipe, policy = self.recipe, self.policy
        device = policy.causal.device
        if recipe.method == "dpo" and recipe.dpo.reference.path is not None:
            return load_named(recipe, device, policy.dtype).causal
        if policy.kind == "lora":
            return None
        require_known_start(self.path, recipe)
        start = load_policy(recipe, self.tokenizer, device).causal
        for parameter in start.parameters():
            parameter.requires_grad_(False).data = parameter.data.to(policy.dtype)
        return start

    @cached_property
    def _with_frozen_adapter(self) -> Policy:
        """The policy with the SFT adapter that it started from, if it did, beside its own."""
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

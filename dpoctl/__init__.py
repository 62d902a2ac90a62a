"""Fine-tune language models on demonstrations and preferences, from YAML recipes."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"
__all__ = ["dpo", "sft"]


def sft(
    recipe: str | Path | Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    allow_changed: Sequence[str] = (),
    overwrite: bool = False,
    collator: Callable[..., Any] | None = None,
    model_init: Callable[[], Any] | None = None,
    callbacks: Sequence[Callable[[int, dict[str, float]], object]] = (),
    optimizer: Callable[[list[Any]], Any] | None = None,
    learning_rate: Callable[[int], float] | None = None,
    extra_metrics: Callable[[Any, Any], Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Train on demonstrations, as `dpoctl sft` does, with code where a recipe has no words.

    ================  =================================================================================================
    argument          what it is, and what it replaces
    ================  =================================================================================================
    `collator`        `(examples, layout, *, pad_token_id, ref_logps, is_filler) -> Batch`, in place of
                      `dpoctl.core.collator.collate`; deterministic, for policy and reference must see the same batch
    `model_init`      `() -> PreTrainedModel`, a causal model that is trained whole, in place of the recipe's, which
                      still names the tokenizer; called under the recipe's seed
    `callbacks`       functions `(step, metrics)`, called on the first rank after a row of metrics is written, of
                      training or of an eval set (`eval_...`); one that returns True ends the run after that step,
                      with a checkpoint and the exported model
    `optimizer`       `(parameters) -> torch.optim.Optimizer` over the float32 tensors that train, in place of
                      `training.optim`; its state must be tensors and plain numbers, for checkpoints
    `learning_rate`   `(step) -> rate`, steps counted from 0, in place of the recipe's schedule; a parameter group
                      with an `lr_scale` gets that many times the rate
    `extra_metrics`   `(scores, values) -> {name: Total(sum, count)}` of a micro-batch, beside the task's own: the
                      log-probabilities as `dpoctl.core.losses.Scores`, the value of the first loss for each item; the
                      same names always
    ================  =================================================================================================

    Under a launcher (`accelerate launch script.py`, torchrun) every rank calls this.

    Args:
        recipe: the YAML file, or a mapping of what would stand in it.
        overrides: `key=value` texts that win over the recipe.
        resume: go on from the newest checkpoint; with the code that the run began with.
        allow_changed: keys that may differ from what the run began with, by their names in the refusal.
        overwrite: replace an earlier run in the run directory.
        collator: see the table.
        model_init: see the table.
        callbacks: see the table.
        optimizer: see the table.
        learning_rate: see the table.
        extra_metrics: see the table.

    Returns:
        `output_dir`, `steps` that were done, and `metrics`: the last value of each.

    Raises:
        UserError: what the user can mend; see `dpoctl.errors`.
    """
    return _train("sft", dict(locals()))


def dpo(
    recipe: str | Path | Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    allow_changed: Sequence[str] = (),
    overwrite: bool = False,
    collator: Callable[..., Any] | None = None,
    model_init: Callable[[], Any] | None = None,
    callbacks: Sequence[Callable[[int, dict[str, float]], object]] = (),
    optimizer: Callable[[list[Any]], Any] | None = None,
    learning_rate: Callable[[int], float] | None = None,
    extra_metrics: Callable[[Any, Any], Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Train on preferences, as `dpoctl dpo` does; the arguments are those of `sft`."""
    return _train("dpo", dict(locals()))


def _train(command: str, arguments: dict[str, Any]) -> dict[str, Any]:
    # Imported by name, so that `import dpoctl` pays for no torch.
    summary: dict[str, Any] = import_module("dpoctl.tasks.api").run(command, **arguments)
    return summary

"""Fine-tune language models on demonstrations and preferences, from YAML recipes."""

import os
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
    """Train on demonstrations, as `dpoctl sft` does, with your own code in place of parts of the run.

    ================  =================================================================================================
    argument          its signature, and the part that it replaces
    ================  =================================================================================================
    `collator`        `(examples, layout, *, pad_token_id, ref_logps, is_filler) -> Batch`, in place of
                      `dpoctl.core.collator.collate`; it must be deterministic: policy and reference need the same batch
    `model_init`      `() -> PreTrainedModel`, a causal model, in place of the recipe's model, which still gives the
                      tokenizer; all its weights are trained; called with the recipe's seed
    `callbacks`       functions `(step, metrics)`, called on the first rank after each row of metrics, of training or of
                      an eval set (`eval_...`); if one returns True, the run ends after that step, with a checkpoint
                      and the exported model
    `optimizer`       `(parameters) -> torch.optim.Optimizer` over the float32 tensors that train, in place of
                      `training.optim`; its state must be tensors and plain numbers, for checkpoints
    `learning_rate`   `(step) -> rate`, in place of the recipe's schedule; the first step is 0; the rate of a parameter
                      group is multiplied by its `lr_scale`
    `extra_metrics`   `(scores, values) -> {name: Total(sum, count)}` of a micro-batch, in addition to the task's
                      metrics; gets the log-probabilities as `dpoctl.losses.Scores` and the first loss of each item;
                      must always return the same names
    ================  =================================================================================================

    Under a launcher (`accelerate launch script.py`, torchrun) every rank calls this.

    Args:
        recipe: the YAML file, or its content as a mapping.
        overrides: `key=value` texts that replace values of the recipe.
        resume: continue from the newest checkpoint; needs the code that the run started with.
        allow_changed: keys that may differ from the recipe that the run started with, as the error names them.
        overwrite: delete an earlier run in the run directory.
        collator: see the table.
        model_init: see the table.
        callbacks: see the table.
        optimizer: see the table.
        learning_rate: see the table.
        extra_metrics: see the table.

    Returns:
        `output_dir`, `steps` (the number of steps done), and `metrics` (the last value of each).

    Raises:
        UserError: something that the user can fix; see `dpoctl.errors`.
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
    # Imported by name, so that `import dpoctl` does not import torch.
    import_module("dpoctl.tasks").prepare_allocator(os.environ)
    summary: dict[str, Any] = import_module("dpoctl.tasks.api").run(command, **arguments)
    return summary

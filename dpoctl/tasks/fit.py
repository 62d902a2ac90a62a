"""Runs that do not fit in memory: the arithmetic, and the keys that would make them fit."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dpoctl.errors import UsageError
from dpoctl.recipe.schema import LoraSection, QuantizationSection, Recipe
from dpoctl.tasks.footprint import states_of

SHOWN = 3
LEFT_FOR_STEPS = 0.9
"""The share of memory that weights, gradients and optimizer state may take; the rest is for activations."""


@dataclass(frozen=True)
class Remedy:
    """A change of a recipe that needs less memory.

    Attributes:
        keys: as they stand in a recipe, with their values.
        peak: bytes that a process would take.
        fits: whether that fits.
    """

    keys: str
    peak: int
    fits: bool

    def words(self, capacity: float) -> str:
        """Say what it comes to."""
        result = "fits" if self.fits else f"still {in_bytes(max(0.0, self.peak - capacity))} too much"
        return f"{self.keys} ({in_bytes(self.peak)}: {result})"


def in_bytes(size: float) -> str:
    """Return a size in words."""
    unit, name = next((found for found in ((1e9, "GB"), (1e6, "MB")) if size >= found[0]), (1e3, "kB"))
    return f"{size / unit:.1f} {name}"


def refuse_states(recipe: Recipe, dtype: torch.dtype, capacity: float, where: str, shards: int = 1) -> None:
    """Refuse a run whose weights, gradients and optimizer state alone do not fit; needs neither data nor tokenizer.

    A model that cannot be read is not refused here: its error belongs where the model is loaded.

    Args:
        recipe: checked and complete.
        dtype: the precision of the computation.
        capacity: bytes that a process may take.
        where: the device, in words.
        shards: number of processes that share the model.

    Raises:
        UsageError: they do not fit; with the arithmetic, and what would.
    """
    # A tokenizer that is yet to be trained needs the data.
    if recipe.model.from_scratch is not None or recipe.training.cpu_offload:
        return
    try:
        sizes = states_of(recipe, None, dtype)
    except Exception:  # of a model that cannot be built; a library can raise anything
        return
    total = sum(sizes.values())
    if total / shards <= capacity:
        return
    shared = f", divided by {shards}" if shards > 1 else ""

    def peak(changed: Recipe) -> int:
        needed = sum(states_of(changed, None, dtype).values())
        return int(needed / shards)

    raise too_large(
        {name: int(size / shards) for name, size in sizes.items()},
        capacity,
        where,
        remedies(recipe, peak, LEFT_FOR_STEPS * capacity, shards),
        shared,
    )


def too_large(
    parts: Mapping[str, int], capacity: float, where: str, found: list[Remedy], shared: str = ""
) -> UsageError:
    """Return the error of a run that cannot fit: its parts, what is there, and what would fit."""
    total = sum(parts.values())
    words = ", ".join(f"{name} {in_bytes(size)}" for name, size in parts.items() if size >= total / 200)
    return UsageError(
        f"the run does not fit on {where}: {words}{shared}; together {in_bytes(total)}, of which "
        f"{in_bytes(capacity)} are there: {in_bytes(total - capacity)} too much",
        hint="set one of: " + "; ".join(remedy.words(capacity) for remedy in found)
        if found
        else "use a GPU with more memory, or a smaller model",
    )


def remedies(
    recipe: Recipe, peak: Callable[[Recipe], int], capacity: float, shards: int = 1, *, steps: bool = False
) -> list[Remedy]:
    """Return the changes that would make a run fit, the least intrusive first; else those that save most.

    Args:
        recipe: that does not fit.
        peak: returns the bytes that a process takes under a recipe.
        capacity: bytes that it may take.
        shards: number of processes that share the model.
        steps: also try what shrinks the activations.
    """
    found = []
    for keys, changed in _changes(recipe, steps=steps):
        size = peak(changed)
        found.append(Remedy(keys, size, size <= capacity))
    if recipe.training.sharding != "none" and recipe.training.replicas == 1:
        size, own = peak(recipe), 1
        while size / own > capacity and own < 1024:
            own *= 2
        if own > 1:
            number = shards * own
            found.append(Remedy(f"--num-processes {number} (training.sharding)", size // own, own < 1024))
    fitting = [remedy for remedy in found if remedy.fits]
    return (fitting + sorted((one for one in found if not one.fits), key=lambda one: one.peak))[:SHOWN]


def _changes(recipe: Recipe, *, steps: bool) -> Iterator[tuple[str, Recipe]]:
    """Yield changes that need less memory, the least intrusive first."""

    def training(**values: Any) -> Recipe:
        return recipe.model_copy(update={"training": recipe.training.model_copy(update=values)})

    if steps and recipe.training.gradient_checkpointing is False:
        yield "training.gradient_checkpointing: true", training(gradient_checkpointing=True)
    if steps and recipe.training.max_tokens_per_device != "auto":
        yield "training.max_tokens_per_device: auto", training(max_tokens_per_device="auto")
    if recipe.lora is None:
        is_8bit, is_bf16 = recipe.training.optim == "adamw_8bit", recipe.training.param_dtype == "bfloat16"
        if not is_8bit:
            yield "training.optim: adamw_8bit", training(optim="adamw_8bit")
        if not is_bf16:
            yield "training.param_dtype: bfloat16", training(param_dtype="bfloat16")
        if not (is_8bit or is_bf16):
            both = training(optim="adamw_8bit", param_dtype="bfloat16")
            yield "training.param_dtype: bfloat16 and training.optim: adamw_8bit", both
        if recipe.model.from_scratch is not None:
            return
        yield "lora: {}", recipe.model_copy(update={"lora": LoraSection()})
    is_packed = recipe.quantization is not None and (
        recipe.quantization.load_in_4bit or recipe.quantization.load_in_8bit
    )
    if not is_packed:
        packed = recipe.model_copy(
            update={"lora": recipe.lora or LoraSection(), "quantization": QuantizationSection(load_in_4bit=True)}
        )
        name = "quantization.load_in_4bit: true"
        yield f"lora: {{}} and {name}" if recipe.lora is None else name, packed

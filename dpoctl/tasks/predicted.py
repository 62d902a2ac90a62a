"""Predicted against measured, in a run: its peak of memory and its speed, after the first steps and at the end."""

import json
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Self

import torch
from accelerate import Accelerator

from dpoctl import console
from dpoctl.core.planner import Plan
from dpoctl.model.memory import MemoryMeter, machine_gpu
from dpoctl.recipe.schema import Recipe
from dpoctl.runs.directory import RunDirectory
from dpoctl.tasks.estimate import MemoryEstimate, Work, work_of
from dpoctl.tasks.extensions import ENVIRONMENT
from dpoctl.tasks.speed import Rate, rate_of

FORECAST = "forecast"
"""The key of `env.json`."""
SETTLED = 2
"""After so many steps the optimizer's state is there, and a step has run with it."""
GB = 1e9


def begin_metering(recipe: Recipe, device: torch.device) -> MemoryMeter:
    """Begin to measure memory, after the imports of what the run will use."""
    if recipe.lora is not None:
        import_module("peft")
    return MemoryMeter(device)


@dataclass
class Comparison:
    """Compares the forecast of a run with what it takes; on the first rank.

    Attributes:
        directory: of the run.
        estimate: of its memory.
        work: of the run.
        rate: operations a second that are expected.
        ranks: number of processes.
        meter: measures memory since before the model was loaded.
    """

    directory: RunDirectory
    estimate: MemoryEstimate
    work: Work
    rate: Rate
    ranks: int
    meter: MemoryMeter
    _speeds: list[float] = field(default_factory=list)
    _is_said: bool = False

    @classmethod
    def of(
        cls,
        directory: RunDirectory,
        estimate: MemoryEstimate,
        plan: Plan,
        accelerator: Accelerator,
        meter: MemoryMeter,
        dtype: torch.dtype,
    ) -> Self | None:
        """Return the comparison of a run in a precision, on the first rank.

        For models so small that a formula estimates them there is none: their process holds little but the libraries.
        """
        if not accelerator.is_main_process or estimate.footprint.method != "trace":
            return None
        work = work_of(estimate.footprint, plan.lengths, plan, has_reference=False)
        rate = rate_of(machine_gpu() if accelerator.device.type == "cuda" else None, dtype)
        return cls(directory, estimate, work, rate, accelerator.num_processes, meter)

    def after(self, step: int, tokens_per_second: float) -> dict[str, float]:
        """Take the speed of some steps, and return the measured peak as a metric; say both once things are settled."""
        self._speeds.append(tokens_per_second)
        peak = self.meter.peak()
        if peak is None:
            return {}
        if step >= SETTLED and not self._is_said:
            self._is_said = True
            self._say(peak, f"after {step:,} steps")
        return {"peak_memory_gb": round(peak / GB, 3)}

    def conclude(self) -> None:
        """Say both at the end."""
        if self._speeds and (peak := self.meter.peak()) is not None:
            self._say(peak, "at the end")

    def _say(self, peak: int, when: str) -> None:
        predicted = self.estimate.peak if self.meter.counts_process else self.estimate.live
        low, usual, high = self.rate.tokens_per_second(self.work, self.ranks)
        # The first steps are slower: a device warms up.
        settled = self._speeds[1:] or self._speeds
        speed = sum(settled) / len(settled)
        console.say(
            f"{when}: memory {predicted / GB:.2f} GB predicted, {peak / GB:.2f} GB measured "
            f"({peak / predicted - 1:+.0%}); speed {usual:,.0f} tokens/s predicted ({low:,.0f} to {high:,.0f}), "
            f"{speed:,.0f} measured"
        )
        self._record({
            "memory_predicted": predicted,
            "memory_measured": peak,
            "parts": self.estimate.parts,
            "tokens_per_second_predicted": [low, usual, high],
            "tokens_per_second_measured": speed,
            "when": when,
        })  # fmt: skip

    def _record(self, found: dict[str, Any]) -> None:
        path = self.directory.path / ENVIRONMENT
        environment = json.loads(path.read_text(encoding="utf-8"))
        self.directory.write_json(ENVIRONMENT, environment | {FORECAST: found})

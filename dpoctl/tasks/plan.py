"""`dpoctl plan`: memory by part, the micro-batch, work and time of a run, before it runs; and of its alternatives."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dpoctl import console
from dpoctl.core.optim import state_bytes, stored_moments
from dpoctl.core.planner import Lengths, Plan
from dpoctl.data.cache import Cache, cache_dir
from dpoctl.data.prepare import PreparedData
from dpoctl.errors import UsageError
from dpoctl.model.memory import GPU_CONTEXT, checkpointing_choices, free_bytes, machine_gpu
from dpoctl.recipe.gpus import Gpu, known_gpu
from dpoctl.recipe.schema import LoraSection, QuantizationSection, Recipe
from dpoctl.tasks.estimate import CPU_CONTEXT, Division, Estimator, MemoryEstimate, Work, work_of
from dpoctl.tasks.fit import refuse_states, remedies, too_large
from dpoctl.tasks.footprint import Subject
from dpoctl.tasks.setup import quiet_libraries, read_data
from dpoctl.tasks.speed import MeasuredSteps, Rate, measure, rate_of
from dpoctl.tasks.task import build_task

WHOLE = Division()
KINDS = ("full", "lora", "qlora")
GB = 1e9
WRITING = 0.5e9
"""Bytes a second in which the last checkpoint and the model are written; earlier ones are written beside the steps."""


@dataclass(frozen=True)
class Target:
    """A place for a run: a GPU by name, or this machine's CPU.

    Attributes:
        gpu: None is the CPU.
        processes: their number.
        capacity: bytes that a process may take.
    """

    gpu: Gpu | None
    processes: int
    capacity: float

    @classmethod
    def of(cls, gpu: str, processes: int) -> "Target":
        """Return a GPU by its name; `auto` is the GPU of this machine, or its CPU if it has none."""
        if gpu == "auto" and not torch.cuda.is_available():
            return cls(None, processes, free_bytes(torch.device("cpu")) / max(1, processes))
        known = machine_gpu() if gpu == "auto" else known_gpu(gpu)
        return cls(known, processes, known.memory)

    @property
    def kind(self) -> str:
        """`cuda` or `cpu`."""
        return "cpu" if self.gpu is None else "cuda"

    @property
    def context(self) -> int:
        """Bytes that are taken before the first tensor."""
        return CPU_CONTEXT if self.gpu is None else GPU_CONTEXT

    @property
    def words(self) -> str:
        """The place, in words."""
        name = "this CPU" if self.gpu is None else self.gpu.name
        return name if self.processes == 1 else f"{self.processes} x {name}"

    def dtype(self, recipe: Recipe) -> torch.dtype:
        """Return the precision of the computation, as `compute_dtype` would there.

        Raises:
            UsageError: The weights are to be bfloat16, and the GPU has no bfloat16.
        """
        half = torch.bfloat16 if self.gpu is None or self.gpu.has_bfloat16 else torch.float16
        if recipe.training.param_dtype == "bfloat16":
            if half != torch.bfloat16:
                raise UsageError(
                    f"training.param_dtype: {self.words} has no bfloat16", hint="remove training.param_dtype"
                )
            return torch.bfloat16
        if recipe.model.dtype != "auto":
            dtype: torch.dtype = getattr(torch, recipe.model.dtype)
            return dtype
        return torch.float32 if self.gpu is None else half


@dataclass(frozen=True)
class Forecast:
    """A run before it runs.

    Attributes:
        place: where.
        estimate: of its memory.
        division: how the model lies on the processes.
        dtype: the precision of its computation.
        plan: its steps.
        work: its operations.
        measured: what some steps took there, if they were taken.
    """

    place: Target
    estimate: MemoryEstimate
    division: Division
    dtype: torch.dtype
    plan: Plan
    work: Work
    measured: MeasuredSteps | None = None

    @cached_property
    def rate(self) -> Rate:
        """Operations a second."""
        return rate_of(self.place.gpu, self.dtype) if self.measured is None else self.measured.rate


def run(
    recipe: Recipe,
    *,
    gpu: str = "auto",
    processes: int = 1,
    measured: bool = False,
    compare: Sequence[str] = (),
    gpus: Sequence[int] = (1,),
    json_output: bool = False,
) -> None:
    """Print the forecast of a run, or a table of alternatives.

    Args:
        recipe: checked and complete.
        gpu: the name of a GPU, or `auto`.
        processes: their number.
        measured: take some real steps, for the rate.
        compare: kinds of training to compare, of `KINDS`; none prints the forecast of the recipe.
        gpus: numbers of processes to compare.
        json_output: print one JSON object.

    Raises:
        UsageError: the run does not fit; with the arithmetic, and the keys that would make it fit.
    """
    quiet_libraries()
    place = Target.of(gpu, processes)
    if measured and (place.processes > 1 or (gpu != "auto")):
        raise UsageError(
            "--measure takes steps in one process on this machine", hint="leave out --gpu and --num-processes"
        )
    if not compare:
        refuse_before_data(recipe, place)
    tokenizer, data = read_data(recipe)
    if compare:
        _compare(recipe, tokenizer, data, gpu, compare, gpus, json_output=json_output)
        return
    found = measure(recipe, tokenizer, data) if measured else None
    forecast = forecast_of(recipe, tokenizer, data, place, found)
    refuse(recipe, tokenizer, data, forecast)
    numbers = as_numbers(recipe, forecast)
    if found is not None and found.peak is not None:
        numbers["memory"]["measured"] = found.peak
    if json_output:
        console.emit(json.dumps(numbers))
        return
    for line in as_lines(recipe, forecast):
        console.emit(line)
    if found is not None and found.peak is not None:
        console.emit(f"measured in {found.count} steps: {found.peak / GB:.2f} GB")


def refuse_before_data(recipe: Recipe, place: Target) -> None:
    """Refuse a run whose weights, gradients and optimizer state alone do not fit, before its data are prepared.

    Raises:
        UsageError: they do not fit.
    """
    shards = _shards(recipe, place.processes)
    refuse_states(recipe, place.dtype(recipe), place.capacity - place.context, place.words, shards)


def _shards(recipe: Recipe, processes: int) -> int:
    """Return the most processes that may share the model."""
    training = recipe.training
    return 1 if training.sharding == "none" else max(1, processes // training.replicas)


def forecast_of(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    place: Target,
    measured: MeasuredSteps | None = None,
) -> Forecast:
    """Return the forecast of a run.

    Args:
        recipe: checked and complete.
        tokenizer: of the recipe.
        data: of the recipe.
        place: where it would run.
        measured: what some steps took there.
    """
    estimator = _estimator(recipe, tokenizer, data, place)
    estimate, training = estimator.choose(), recipe.training
    shares = _shards(recipe, place.processes)
    if shares > 1 and (training.sharding == "full" or not estimate.fits):
        estimator = _estimator(recipe, tokenizer, data, place, Division(shares, training.cpu_offload))
        estimate = estimator.choose()
    plan = estimator.subject.plan(estimate.budget)
    cached = build_task(recipe).needs_reference and not recipe.dpo.reference.is_live
    evals = [Lengths.of(store) for store in data.evals.values()]
    evaluations = _evaluations(recipe, plan) if evals else 0
    work = work_of(estimate.footprint, plan.lengths, plan, has_reference=cached, evals=evals, evaluations=evaluations)
    return Forecast(place, estimate, estimator.division, estimator.subject.dtype, plan, work, measured)


def _evaluations(recipe: Recipe, plan: Plan) -> int:
    """Return how often a run evaluates; before the first step only what the reference does not tell already."""
    training, reference = recipe.training, recipe.dpo.reference
    is_known = build_task(recipe).needs_reference and reference.path is None
    at_start = training.eval_on_start and not is_known
    return at_start + (-(-plan.num_steps // training.eval_steps) if training.eval_steps else 1)


def _estimator(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    place: Target,
    division: Division = WHOLE,
) -> Estimator:
    lengths, cache = Lengths.of(data.train), Cache(cache_dir())
    subject = Subject(
        recipe, tokenizer, data.train, lengths, place.kind, place.dtype(recipe), place.processes, cache=cache
    )
    return Estimator(subject, place.capacity, division, place.context)


def refuse(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, data: PreparedData, forecast: Forecast) -> None:
    """Refuse a run that does not fit with any micro-batch.

    Raises:
        UsageError: it does not fit; with the arithmetic, and the keys that would make it fit.
    """
    estimate, place = forecast.estimate, forecast.place
    if estimate.fits:
        return

    def peak(changed: Recipe) -> int:
        estimator = _estimator(changed, tokenizer, data, place, forecast.division)
        every = checkpointing_choices()[-1]
        return estimator.at(int(estimator.subject.lengths.tokens.max()), every).peak

    found = remedies(recipe, peak, place.capacity, forecast.division.shards, steps=True)
    raise too_large(estimate.parts, place.capacity, place.words, found)


def as_numbers(recipe: Recipe, forecast: Forecast) -> dict[str, Any]:
    """Return a forecast as numbers, ready for JSON."""
    estimate, plan, work = forecast.estimate, forecast.plan, forecast.work
    ranks = forecast.place.processes
    sizes = disk(recipe, forecast)
    writing = (sizes["checkpoint"] + sizes["model"]) / WRITING
    low, usual, high = (seconds + writing for seconds in forecast.rate.seconds(work, ranks))
    slow, speed, fast = forecast.rate.tokens_per_second(work, ranks)
    return {
        "gpu": forecast.place.words,
        "processes": ranks,
        "shards": forecast.division.shards,
        "memory": {
            "parts": {name: size for name, size in estimate.parts.items() if size},
            "peak": estimate.peak,
            "at": estimate.phase,
            "capacity": int(estimate.capacity),
            "fits": estimate.fits,
            "method": estimate.footprint.method,
        },
        "micro_batch": {"budget": estimate.budget, "fullest": estimate.footprint.tokens},
        "recomputed": estimate.every,
        "parameters": estimate.footprint.parameters,
        "trained": estimate.footprint.trained,
        "steps": plan.num_steps,
        "tokens": work.tokens,
        "flops": work.steps + work.passes,
        "seconds": {"least": low, "likely": usual, "most": high, "rate": forecast.rate.origin},
        "tokens_per_second": {"least": slow, "likely": speed, "most": fast},
        "disk": sizes,
    }


def disk(recipe: Recipe, forecast: Forecast) -> dict[str, int]:
    """Return the bytes of a checkpoint, of the model, of all that stays, and those that are free."""
    weight, moments = state_bytes(recipe.training)[0], stored_moments(recipe.training)
    trained = forecast.estimate.footprint.trained
    checkpoint, kept = trained * (weight + moments), recipe.training.save_total_limit or 1
    if recipe.training.save_total_limit is None and recipe.training.save_steps is not None:
        kept = max(1, forecast.plan.num_steps // recipe.training.save_steps)
    output = Path(recipe.training.output_dir).absolute()
    place = next(folder for folder in (output, *output.parents) if folder.is_dir())
    model = trained * weight
    total = checkpoint * kept + model
    return {
        "checkpoint": checkpoint,
        "kept": kept,
        "model": model,
        "total": total,
        "free": shutil.disk_usage(place).free,
    }


def as_lines(recipe: Recipe, forecast: Forecast) -> list[str]:
    """Return a forecast in words."""
    estimate, numbers = forecast.estimate, as_numbers(recipe, forecast)
    room = (estimate.capacity - estimate.peak) / GB
    shared = f", the model divided by {forecast.division.shards}" if forecast.division.shards > 1 else ""
    count = forecast.place.processes
    how = "" if estimate.footprint.method == "trace" else ", by formula"
    lines = [
        f"on {forecast.place.words}, {count} {'process' if count == 1 else 'processes'}{shared}",
        f"memory of a process{how}, fullest in the {estimate.phase}:",
        *(f"  {name}: {size / GB:.2f} GB" for name, size in estimate.parts.items() if size >= GB / 200),
        f"  together: {estimate.peak / GB:.2f} of {estimate.capacity / GB:.1f} GB, {room:.1f} GB to spare",
        f"micro-batch: at most {estimate.budget:,} tokens, the fullest {estimate.footprint.tokens:,}; "
        f"{recomputed(estimate.every)}",
        f"work: {forecast.plan.num_steps:,} steps, {numbers['tokens']:,} tokens, {numbers['flops']:.2e} FLOPs",
    ]
    seconds, speed = numbers["seconds"], numbers["tokens_per_second"]
    times = [console.duration(seconds[name]) for name in ("likely", "least", "most")]
    lines.append(f"time: about {times[0]}, from {times[1]} to {times[2]} ({forecast.rate.origin})")
    lines.append(
        f"speed: about {speed['likely']:,.0f} tokens a second, from {speed['least']:,.0f} to {speed['most']:,.0f}"
    )
    sizes = {name: f"{size / GB:.2f} GB" for name, size in numbers["disk"].items() if name != "kept"}
    lines.append(
        f"disk: a checkpoint is {sizes['checkpoint']}, {numbers['disk']['kept']} are kept, the model is "
        f"{sizes['model']}: {sizes['total']}, and {sizes['free']} are free"
    )
    return lines


def recomputed(every: int) -> str:
    """Say which layers are recomputed."""
    words = {0: "no layer is recomputed", 1: "it fits because all layers are recomputed in backward"}
    return words.get(every, f"it fits because one layer in {every} is recomputed in backward")


def _compare(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    gpu: str,
    kinds: Sequence[str],
    gpus: Sequence[int],
    *,
    json_output: bool,
) -> None:
    """Print a table of kinds of training and numbers of GPUs: what fits, and how long it takes."""
    rows: list[dict[str, Any]] = []
    for kind in kinds:
        changed = _as_kind(recipe, kind)
        for count in gpus:
            forecast = forecast_of(changed, tokenizer, data, Target.of(gpu, count))
            rows.append({"kind": kind, **as_numbers(changed, forecast)})
    if json_output:
        console.emit(json.dumps({"alternatives": rows}))
        return
    heads = ("training", "on", "GB each", "fits", "recomputed", "micro-batch", "time", "from", "to")
    table = [heads, *(_row(row) for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(heads))]
    for line in table:
        console.emit("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _row(row: Mapping[str, Any]) -> tuple[str, ...]:
    memory, seconds = row["memory"], row["seconds"]
    divided = f", divided by {row['shards']}" if row["shards"] > 1 else ""
    first = (row["kind"], row["gpu"] + divided, f"{memory['peak'] / GB:.1f} of {memory['capacity'] / GB:.0f}")
    if not memory["fits"]:
        return (*first, "no", "", "", "", "", "")
    every = {0: "none", 1: "all layers"}.get(row["recomputed"], f"1 layer in {row['recomputed']}")
    times = (console.duration(seconds[name]) for name in ("likely", "least", "most"))
    return (*first, "yes", every, f"{row['micro_batch']['budget']:,}", *times)


def _as_kind(recipe: Recipe, kind: str) -> Recipe:
    """Return a recipe with another kind of training."""
    if kind not in KINDS:
        raise UsageError(f"--compare {kind}: not a kind of training", hint=f"give some of {', '.join(KINDS)}")
    if kind != "full" and recipe.model.from_scratch is not None:
        raise UsageError(f"--compare {kind}: a model built from scratch is trained whole", hint="leave it out")
    lora = None if kind == "full" else recipe.lora or LoraSection()
    packed = QuantizationSection(load_in_4bit=True) if kind == "qlora" else None
    return recipe.model_copy(update={"lora": lora, "quantization": packed})

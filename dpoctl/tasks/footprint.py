"""The footprint of a training step: traced at two depths on fake tensors, and extended to the whole model.

Every layer of a model takes as much as the others, so bytes and FLOPs grow linearly with their number. A model that
cannot be traced, or cannot be cut, gets a formula in place of a trace, and says so.
Traces are kept in the cache folder.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import accelerate
import numpy as np
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

import dpoctl
from dpoctl.core.logps import Scorer
from dpoctl.core.optim import build_optimizer, state_bytes
from dpoctl.core.planner import ATTENTION_COST, Lengths, Plan, Step
from dpoctl.core.reader import Reader
from dpoctl.core.trace import Phase, Trace, TracedStep, trace_step
from dpoctl.data.cache import Cache
from dpoctl.data.store import TokenStore
from dpoctl.errors import SetupError, UserError
from dpoctl.files import write_atomically
from dpoctl.model.from_config import build_skeleton, decoder_config
from dpoctl.model.load import weight_dtype
from dpoctl.model.memory import activation_bytes_per_token, set_gradient_checkpointing, simulating
from dpoctl.model.modules import is_trainable, outside_of_layers
from dpoctl.model.probe import ProbeResult
from dpoctl.model.traced import traced_policy
from dpoctl.recipe.schema import Recipe
from dpoctl.tasks.task import Task, build_task

KIND = "estimates"
"""The folder of the cache."""
HOST = torch.device("cpu")
STEPS_SEARCHED = 64
"""Steps of a plan in which its fullest micro-batch is looked for."""
MOST_RECORDS = 20_000
FOUR_BITS = 0.55
"""Bytes of a weight of 4 bits, with its share of the scales; in the formula only."""


@dataclass(frozen=True)
class Footprint:
    """The bytes and FLOPs of a process in a step, if the model is not divided.

    Attributes:
        trace: bytes and FLOPs of its fullest micro-batch.
        tokens: of that micro-batch.
        scored: tokens of it that are predicted.
        area: pairs of a query and a key in it.
        parameters: of the model.
        trained: those of them that are trained.
        method: `trace`, or `formula` if it could not be traced.
    """

    trace: Trace
    tokens: int
    scored: int
    area: int
    parameters: int
    trained: int
    method: str = "trace"


@dataclass(frozen=True)
class Subject:
    """A run to trace: the recipe, its rows, and the kind of machine.

    Attributes:
        recipe: checked and complete.
        tokenizer: of the recipe.
        store: the training rows.
        lengths: of them.
        kind: `cuda` or `cpu`: the device whose kernels run.
        dtype: the precision of the computation.
        ranks: number of processes.
        layout: of the batches.
        own_head: see `ProbeResult`.
        cache: keeps what was traced.
        model: a model that the recipe does not describe; only the formula is used for it.
    """

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    store: TokenStore
    lengths: Lengths
    kind: str
    dtype: torch.dtype
    ranks: int
    layout: Any = "shared"
    own_head: bool = True
    cache: Cache | None = None
    model: PreTrainedModel | None = None

    @cached_property
    def config(self) -> PretrainedConfig:
        """The configuration of the model."""
        return self.model.config if self.model is not None else decoder_config(self.recipe, self.tokenizer)

    @property
    def depth(self) -> int:
        """The number of decoder layers."""
        return int(self.config.num_hidden_layers)

    def plan(self, tokens: int) -> Plan:
        """Return the plan for a token budget."""
        training = self.recipe.training
        return Plan(
            self.lengths,
            training.global_batch_size,
            self.ranks,
            tokens,
            self.layout,
            seed=training.seed,
            num_epochs=training.num_train_epochs,
            max_steps=training.max_steps,
        )


def measure_footprint(subject: Subject, tokens: int, every: int) -> Footprint:
    """Return what the fullest micro-batch of a token budget takes.

    Args:
        subject: the run.
        tokens: the most tokens in a micro-batch.
        every: one layer in so many is recomputed; 0 is none.
    """
    records, several = fullest(subject.plan(tokens))
    key = _key(subject, records, every, several)
    found = _read(subject.cache, key)
    if found is None:
        found = _measured(subject, records, every, several)
        _write(subject.cache, key, found)
    return found


def fullest(plan: Plan) -> tuple[tuple[int, ...], bool]:
    """Return the records of the fullest micro-batch of a plan, and whether a step has several micro-batches."""
    best: tuple[int, ...] = ()
    most, several = -1, False
    count = max(1, min(plan.num_steps, STEPS_SEARCHED, MOST_RECORDS // plan.global_batch_size))
    for number in np.unique(np.linspace(0, plan.num_steps - 1, count).astype(int)):
        schedule = plan.step(int(number)).schedule
        several |= len(schedule[0]) > 1
        for batch in (batch for rank in schedule for batch in rank if batch):
            if (size := plan.tokens_of(batch)) > most:
                best, most = batch, size
    return best, several


def _measured(subject: Subject, records: Sequence[int], every: int, several: bool) -> Footprint:
    try:
        return _traced(subject, records, every, several)
    except UserError:
        raise
    except Exception:  # a model's own code can raise anything on tensors without numbers
        return formula(subject, records, every)


def _traced(subject: Subject, records: Sequence[int], every: int, several: bool) -> Footprint:
    depth, group = subject.depth, max(1, every)
    small, large = 2 * group, 4 * group
    if depth <= large:
        return _one_depth(subject, records, every, several, depth)
    first, second = (_one_depth(subject, records, every, several, layers) for layers in (small, large))
    return _extended(first, second, (depth - small) / (large - small))


def _one_depth(subject: Subject, records: Sequence[int], every: int, several: bool, layers: int) -> Footprint:
    """Trace a model of some layers."""
    recipe, task = subject.recipe, _traceable(build_task(subject.recipe), subject.recipe)
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    with simulating(subject.kind):
        policy = traced_policy(recipe, subject.tokenizer, fakes, subject.dtype, layers)
        set_gradient_checkpointing(policy.causal, every)
        verdict = ProbeResult(subject.layout, subject.own_head, "")
        scorer = Scorer(policy.model, policy.causal, verdict, confidence="confidence" in task.needs).train()
        responses = np.linspace(-90, -30, int(subject.store.response_start[-1]), dtype=np.float32)
        reader = Reader(
            subject.store,
            subject.layout,
            HOST,
            int(subject.tokenizer.pad_token_id or 0),
            ref_logps=responses if task.needs_reference else None,
            ref_head_logps=responses if "head" in task.needs else None,
        )
        lengths, at = subject.lengths, np.array(records)
        counts = {item: int(numbers[at].sum()) for item, numbers in lengths.items.items()}
        step = Step(0, tuple(records), int(lengths.tokens[at].sum()), ((tuple(records),),), counts)
        batches = reader.batches(step.schedule[0])
        area = int(((lengths.cost[at] - lengths.tokens[at]) / ATTENTION_COST).sum())
        trace = trace_step(
            TracedStep(
                scorer,
                task.terms,
                task.report,
                lambda parameters: build_optimizer(
                    parameters, recipe.training, outside=outside_of_layers(policy.causal)
                ),
                step,
                reader,
                batches,
                subject.dtype,
                area,
                # DDP keeps its buckets of gradients from step to step.
                accumulates=several or subject.ranks > 1,
                group=max(1, every),
                copies=_copies(recipe),
            ),
            fakes,
        )
    sizes = [(p.numel(), p.requires_grad) for p in policy.model.parameters()]
    trained = sum(size for size, is_trained in sizes if is_trained)
    scored, tokens = len(batches[0].score_pos), int(batches[0].input_ids.numel())
    return Footprint(trace, tokens, scored, area, _unpacked(sum(n for n, _ in sizes), policy.model), trained)


def _unpacked(count: int, model: torch.nn.Module) -> int:
    """Return the number of parameters of a model whose packed weights hold two in a byte."""
    packed = [p for p in model.parameters() if type(p).__name__ == "Params4bit"]
    shapes: list[Any] = [vars(parameter)["quant_state"].shape for parameter in packed]
    return int(count + sum(map(math.prod, shapes)) - sum(parameter.numel() for parameter in packed))


def _copies(recipe: Recipe) -> int:
    """Return the number of copies of the trained weights that stay beside the model."""
    reference = recipe.dpo.reference
    moves = recipe.method == "dpo" and reference.sync_steps is not None
    return int(moves or (recipe.method == "dpo" and recipe.lora is None and reference.is_live))


def _traceable(task: Task, recipe: Recipe) -> Task:
    """Return the task, or a plain one in its place where a loss reads numbers on the host."""
    reads = any(type(term.loss).couples_batch for term in task.terms if hasattr(type(term.loss), "couples_batch"))
    if not reads:
        return task
    plain = recipe.model_copy(update={"dpo": recipe.dpo.model_copy(update={"loss": {"type": "sigmoid"}})})
    return build_task(plain)


def _extended(small: Footprint, large: Footprint, times: float) -> Footprint:
    """Return the footprint of a deeper model: what the larger has more than the smaller, so many times."""

    def line(first: int, second: int) -> int:
        return round(first + (second - first) * times)

    def phase(first: Phase, second: Phase) -> Phase:
        return Phase(
            *(line(getattr(first, name), getattr(second, name)) for name in ("peak", "gradients", "workspace"))
        )

    a, b = small.trace, large.trace
    trace = Trace(
        **{name: line(getattr(a, name), getattr(b, name)) for name in ("weights", "optimizer", "extra", "kept")},
        phases={name: phase(found, b.phases[name]) for name, found in a.phases.items() if name in b.phases},
        flops={name: line(found, b.flops.get(name, 0)) for name, found in a.flops.items()},
    )
    parameters, trained = line(small.parameters, large.parameters), line(small.trained, large.trained)
    return replace(small, trace=trace, parameters=parameters, trained=trained)


def formula(subject: Subject, records: Sequence[int], every: int) -> Footprint:
    """Return a footprint by closed formulas, for models that cannot be traced, and for those too small to matter."""
    recipe, at = subject.recipe, np.array(records)
    weights, gradients, optimizer, parameters, trained = static_bytes(
        recipe, subject.tokenizer, subject.dtype, subject.model
    )
    config = subject.config
    tokens, scored = int(subject.lengths.tokens[at].sum()), int(subject.lengths.items["tokens"][at].sum())
    kept = tokens * activation_bytes_per_token(config, subject.dtype, every)
    cast = 2 * trained if subject.dtype != torch.float32 and recipe.training.param_dtype == "float32" else 0
    head = 4 * min(scored, 4096) * min(int(config.vocab_size), 16384)
    peak = weights + gradients + optimizer + kept + cast + head
    phases = {"head": Phase(peak, gradients, 0), "update": Phase(weights + gradients + optimizer, gradients, 0)}
    forward = 2 * tokens * parameters
    flops = {"layers": 2 * forward + 2 * tokens * trained, "forward": forward}
    trace = Trace(weights, optimizer, _copies(recipe) * 4 * trained, kept + cast, phases, flops)
    area = int(((subject.lengths.cost[at] - subject.lengths.tokens[at]) / ATTENTION_COST).sum())
    return Footprint(trace, tokens, scored, area, parameters, trained, "formula")


def static_bytes(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None, dtype: torch.dtype, model: PreTrainedModel | None = None
) -> tuple[int, int, int, int, int]:
    """Return the bytes of weights, gradients and optimizer state of a model, and its numbers of parameters.

    Args:
        recipe: checked and complete.
        tokenizer: of the recipe; a model that is not built from scratch needs none.
        dtype: the precision of the computation.
        model: the model, if it is there already.

    Returns:
        Bytes of weights, of gradients, of optimizer state; the number of parameters, and of trained ones.
    """
    model = build_skeleton(recipe, tokenizer) if model is None else model
    sizes = {True: 0, False: 0}
    packed = 0
    is_packed = recipe.quantization is not None and recipe.quantization.load_in_4bit
    ends = {id(p) for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None
            for p in layer.parameters()}  # fmt: skip
    for name, parameter in model.named_parameters():
        is_adapter = ".lora_" in name or ".modules_to_save." in name
        trained = is_adapter if recipe.lora else is_trainable(name, recipe.training.trainable)
        sizes[trained] += parameter.numel()
        packed += parameter.numel() * (is_packed and not trained and parameter.ndim == 2 and id(parameter) not in ends)
    weight, gradient, moments = state_bytes(recipe.training)
    frozen = packed * FOUR_BITS + (sizes[False] - packed) * weight_dtype(recipe, dtype).itemsize
    return (
        int(frozen + sizes[True] * weight),
        sizes[True] * gradient,
        sizes[True] * moments,
        sizes[True] + sizes[False],
        sizes[True],
    )


def states_of(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None, dtype: torch.dtype, model: PreTrainedModel | None = None
) -> dict[str, int]:
    """Return the bytes of what a model needs however short its rows are, by what they are for."""
    weights, gradients, optimizer, _, trained = static_bytes(recipe, tokenizer, dtype, model)
    is_cast = dtype != torch.float32 and recipe.training.param_dtype == "float32" and recipe.lora is None
    names = {"weights": weights, "gradients": gradients, "optimizer state": optimizer}
    return names | ({"copies in another precision": 2 * trained} if is_cast else {})


def _key(subject: Subject, records: Sequence[int], every: int, several: bool) -> str:
    """Return a name for everything that a footprint depends on."""
    recipe, store = subject.recipe, subject.store
    training, starts = recipe.training, store.response_start
    answers = [range(starts[record], starts[record + 1]) for record in records]
    what = {
        "versions": [module.__version__ for module in (dpoctl, torch, transformers, accelerate)],
        "config": subject.config.to_dict(),
        "vocabulary": len(subject.tokenizer),
        "recipe": recipe.model_dump(mode="json", include={"method", "dpo", "sft", "lora", "quantization"}),
        "model": recipe.model.model_dump(mode="json", include={"disable_dropout"}),
        "training": [training.optim, training.param_dtype, training.torch_compile, training.trainable],
        "machine": [subject.kind, str(subject.dtype), subject.ranks > 1, subject.layout, subject.own_head],
        "prompts": store.shared_len[list(records)].tolist(),
        "answers": [[(int(store.suffix_len[n]), int(store.num_tokens[n])) for n in numbers] for numbers in answers],
        "recomputed": every,
        "accumulates": several,
    }
    return hashlib.sha256(json.dumps(what, default=str, sort_keys=True).encode()).hexdigest()[:32]


def _read(cache: Cache | None, key: str) -> Footprint | None:
    """Return a footprint that was traced before; None if there is none, or it cannot be read."""
    for folder in cache.folders(KIND) if cache is not None else []:
        with suppress(OSError, ValueError, TypeError, KeyError):
            found = json.loads((folder / f"{key}.json").read_text(encoding="utf-8"))
            trace = found.pop("trace")
            phases = {name: Phase(**phase) for name, phase in trace.pop("phases").items()}
            return Footprint(trace=Trace(phases=phases, **trace), **found)
    return None


def _write(cache: Cache | None, key: str, found: Footprint) -> None:
    """Keep a footprint; where nothing can be written it is traced again."""
    if cache is not None:
        with suppress(OSError, SetupError):
            write_atomically(cache.writable(KIND) / f"{key}.json", json.dumps(asdict(found)))

"""The setup of a run: its data, its accelerator, its token budget, and `Setup`, from which the rest is built."""

import os
import platform
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
    parse_flag_from_env,
)
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import PreTrainedTokenizerBase

from dpoctl import console
from dpoctl.core.guard import require_same, tensor_checksum
from dpoctl.core.logps import Result, Scorer
from dpoctl.core.objective import Objective, RunningReference
from dpoctl.core.optim import rate_scales, state_bytes
from dpoctl.core.planner import Lengths, Plan
from dpoctl.core.reader import Reader
from dpoctl.data.cache import Cache, cache_dir
from dpoctl.data.mismatched import Mismatched
from dpoctl.data.prepare import PreparedData, iter_texts, prepare
from dpoctl.data.store import TokenStore
from dpoctl.errors import SetupError
from dpoctl.model.lazy_weights import is_lazy
from dpoctl.model.load import compute_dtype
from dpoctl.model.memory import activation_bytes_per_token, free_bytes
from dpoctl.model.modules import outside_of_layers
from dpoctl.model.policy import Policy
from dpoctl.model.probe import ProbeResult, probe
from dpoctl.model.routers import require_routers
from dpoctl.model.sharding import Gradients, Sharding, part
from dpoctl.model.tokenizer import load_tokenizer, stop_tokens
from dpoctl.recipe.schema import Recipe
from dpoctl.tasks import fsdp_options
from dpoctl.tasks.estimate import CPU_CONTEXT, Division, Estimator, MemoryEstimate, useful_tokens
from dpoctl.tasks.extensions import NO_EXTENSIONS, Extensions
from dpoctl.tasks.fit import Remedy, refuse_states, remedies, too_large
from dpoctl.tasks.footprint import Subject
from dpoctl.tasks.launchers import check_environment
from dpoctl.tasks.task import Task, build_task

MIXED_PRECISION = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}
# One rank may tokenize for hours while the others wait for it.
START_TIMEOUT = timedelta(hours=3)
READING_SHARE = 0.6
"""The share of free memory that a pass without gradients may take."""


@dataclass(frozen=True)
class Setup:
    """A model on this machine, under a recipe: builds the readers, plans, scorers and objectives of a run.

    Attributes:
        recipe: checked and complete.
        accelerator: ranks, device and precision.
        tokenizer: the tokenizer of the model.
        policy: the model.
        probe: the layout and the head of the model, the same on all ranks.
        extensions: the user's code.
        sharding: the division of the model over the ranks; None if each rank holds all of it.
        sharded: the scorer of a sharded model, through which everything must go; None if it is not sharded.
    """

    recipe: Recipe
    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase
    policy: Policy
    probe: ProbeResult
    extensions: Extensions = NO_EXTENSIONS
    sharding: Sharding | None = None
    sharded: Scorer | None = None

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        accelerator: Accelerator,
        tokenizer: PreTrainedTokenizerBase,
        policy: Policy,
        extensions: Extensions = NO_EXTENSIONS,
        sharding: Sharding | None = None,
    ) -> Self:
        """Shard a model, if it is to be, and probe it; every rank calls this, and all use the first rank's result."""
        sharded = None if sharding is None else _shard(policy, sharding, accelerator, recipe)
        with accelerator.autocast():
            found = _inside(sharded, lambda: probe(policy.causal, max_length=recipe.data.max_length))
        (result,) = broadcast_object_list([found])
        if sharded is not None:
            sharded.use(result)
        return cls(recipe, accelerator, tokenizer, policy, result, extensions, sharding, sharded)

    def with_model(self, policy: Policy) -> Self:
        """Return the setup of another model under the same recipe."""
        return self.of(self.recipe, self.accelerator, self.tokenizer, policy, self.extensions, self.sharding)

    @cached_property
    def task(self) -> Task:
        """The losses and metrics of the recipe."""
        return build_task(self.recipe)

    @property
    def starts_at_reference(self) -> bool:
        """Whether the reference is the policy before training: then the first loss is known."""
        return self.task.needs_reference and self.recipe.dpo.reference.path is None

    def plan(self, lengths: Lengths, max_tokens: int | None = None) -> Plan:
        """Return the plan of training on some records.

        Args:
            lengths: the lengths of the records.
            max_tokens: the token budget of a micro-batch; None is one for passes that keep no graph.
        """
        budget = self.reading_tokens(lengths) if max_tokens is None else max_tokens
        world_size, layout = self.accelerator.num_processes, self.probe.layout
        return replace(training_plan(self.recipe, lengths), world_size=world_size, max_tokens=budget, layout=layout)

    def estimate(self, store: TokenStore) -> MemoryEstimate:
        """Estimate the run, and choose the token budget and which layers are recomputed; the same on all ranks.

        The weights are loaded already, and so is a reference that runs beside the policy.

        Raises:
            UsageError: it does not fit, whatever is recomputed.
        """
        policy, device = self.policy, self.accelerator.device
        held = [part(tensor) for tensor in [*policy.model.parameters(), *policy.model.buffers()]]
        resident = sum(tensor.untyped_storage().nbytes() for tensor in {id(t): t for t in held}.values())
        free = (free_bytes(device) + resident) / (local_ranks() if device.type == "cpu" else 1)
        capacity = torch.tensor([free], dtype=torch.float64, device=device)
        estimate = None
        least = float(self.accelerator.gather(capacity).min())
        if self.accelerator.is_main_process:
            estimate = self._estimator(store, least).choose()
        found: list[MemoryEstimate | None] = broadcast_object_list([estimate])
        (estimate,) = found
        assert estimate is not None
        if estimate.live > estimate.capacity:
            remedies = self._remedies(store, least) if self.accelerator.is_main_process else []
            raise too_large(estimate.parts, estimate.capacity, f"this {device.type}", remedies)
        return estimate

    def _remedies(self, store: TokenStore, capacity: float) -> list[Remedy]:
        """Return the changes that would make the run fit."""

        def peak(changed: Recipe) -> int:
            estimator = replace(self, recipe=changed)._estimator(store, capacity)
            return estimator.at(int(estimator.subject.lengths.tokens.max()), 1).peak

        shards = 1 if self.sharding is None else self.sharding.shards
        return remedies(self.recipe, peak, capacity, shards, steps=True)

    def _estimator(self, store: TokenStore, capacity: float) -> Estimator:
        """Return the estimator of this run."""
        sharding = self.sharding
        division = Division() if sharding is None else Division(sharding.shards, sharding.offload)
        subject = Subject(
            self.recipe,
            self.tokenizer,
            store,
            Lengths.of(store),
            self.accelerator.device.type,
            self.policy.dtype,
            self.accelerator.num_processes,
            self.probe.layout,
            self.probe.own_head,
            Cache(cache_dir()),
            None if self.extensions.model_init is None else self.policy.causal,
        )
        if Estimator(subject, capacity).is_small:
            # Loaded, it need not be built again to be counted.
            subject = replace(subject, model=self.policy.causal)
        # What is free on a GPU is so beside its context.
        return Estimator(subject, capacity, division, CPU_CONTEXT if subject.kind == "cpu" else 0)

    def reading_tokens(self, lengths: Lengths) -> int:
        """Return the token budget of passes that keep no graph: activations of one layer at a time."""
        budget = self.recipe.training.max_tokens_per_device
        if budget != "auto":
            return budget
        config, device = self.policy.causal.config, self.accelerator.device
        size = activation_bytes_per_token(config, self.policy.dtype, 1)
        free = torch.tensor([free_bytes(device)], dtype=torch.float64, device=device)
        fits = int(float(self.accelerator.gather(free).min()) * READING_SHARE // size)
        return max(1, min(fits, useful_tokens(int(config.hidden_size), device.type)))

    @property
    def state_bytes(self) -> tuple[int, int, int, int]:
        """Bytes of each trained parameter: weight, gradient, optimizer state, and its cast under autocast."""
        weight, gradient, moments = state_bytes(self.recipe.training)
        return weight, gradient, moments, 2 if weight == 4 and self.policy.dtype != torch.float32 else 0

    def reader(self, store: TokenStore, name: str) -> Reader:
        """Return the reader of a token store.

        Args:
            store: the records.
            name: the name of the eval set; any other name means the training set.
        """
        # A set that `eval_size` holds out has the sources of the training set.
        sources = self.recipe.data.eval.get(name, self.recipe.data.train)
        return Reader(
            store,
            self.probe.layout,
            self.accelerator.device,
            int(self.tokenizer.pad_token_id or 0),
            collate=self.extensions.collator,
            names={number: source.metrics for number, source in enumerate(sources) if source.metrics is not None},
        )

    def scorer(self, *, is_reference: bool = False) -> Scorer:
        """Return the module that computes log-probabilities, and token confidences if the loss needs the policy's.

        A sharded model has one scorer for both.
        """
        if self.sharded is not None:
            return self.sharded
        confidence = "confidence" in self.task.needs and not is_reference
        return Scorer(
            self.policy.model,
            self.policy.causal,
            self.probe,
            confidence=confidence,
            noise_alpha=noise_alpha(self.recipe),
            balances=balance_coef(self.recipe) is not None,
        )

    def inside(self, action: Callable[[], Result]) -> Result:
        """Run an action that calls the model and not the scorer; the ranks of a sharded model call it in step."""
        return _inside(self.sharded, action)

    def prepare(self) -> tuple[nn.Module, Any, Callable[[float], Tensor]]:
        """Return the scorer and the optimizer, wrapped for all ranks, and what clips the gradient to a norm."""
        policy, training = self.policy, self.recipe.training
        parameters = [(name, p) for name, p in policy.model.named_parameters() if p.requires_grad]
        special: Any = {
            "outside": outside_of_layers(policy.causal),
            "scales": rate_scales(self.recipe.lora, parameters),
        }
        if self.sharding is None:
            optimizer = self.extensions.build_optimizer(parameters, training, **special)
            scorer, optimizer = self.accelerator.prepare(self.scorer().train(), optimizer)
            return scorer, optimizer, lambda bound: self.accelerator.clip_grad_norm_(scorer.parameters(), bound)
        gradients = Gradients(self.sharding, parameters)
        optimizer = self.extensions.build_optimizer(gradients.parts(), training, **special)
        # Offloaded parts stay in host memory.
        optimizer = self.accelerator.prepare_optimizer(optimizer, device_placement=False)
        return self.scorer().train(), optimizer, gradients.clip

    def objective(self, scorer: nn.Module, reference: RunningReference | None = None) -> Objective:
        """Return the objective of the recipe.

        Args:
            scorer: the scorer, wrapped for training or not.
            reference: a reference that runs beside the policy.
        """
        report = self.extensions.report(self.task.report)
        seed, coefficient = self.recipe.training.seed, balance_coef(self.recipe)
        if coefficient is not None:
            require_routers(self.policy.causal)
        return Objective(self.accelerator, scorer, self.task.terms, report, reference, seed, coefficient)


def noise_alpha(recipe: Recipe) -> float | None:
    """Return the alpha of NEFTune, if there is noise in the training."""
    return recipe.sft.neftune_noise_alpha if recipe.method == "sft" else None


def balance_coef(recipe: Recipe) -> float | None:
    """Return the factor of the load-balancing loss of experts, if it is part of the training."""
    return recipe.sft.router_aux_loss_coef if recipe.method == "sft" else None


def _shard(policy: Policy, sharding: Sharding, accelerator: Accelerator, recipe: Recipe) -> Scorer:
    """Divide a model over the ranks, and return the scorer that runs it."""
    unknown = ProbeResult("padded", own_head=False, reason="not probed yet")
    confidence = "confidence" in build_task(recipe).needs
    scorer = Scorer(policy.model, policy.causal, unknown, confidence=confidence, noise_alpha=noise_alpha(recipe))
    # Of a model that is still in its files these are compared.
    if not any(is_lazy(parameter) for parameter in policy.model.parameters()):
        require_same(accelerator, "model", tensor_checksum(policy.model.parameters()))
    sharding.divide(scorer)
    # Shards and replicas are groups of their own, with the time limits of torch.
    set_rank_timeout(START_TIMEOUT.total_seconds())
    register_fsdp_forward_method(scorer, "inside")
    # Autocast, and no DDP.
    prepared: Scorer = accelerator.prepare_model(scorer, device_placement=False, evaluation_mode=True)
    return prepared


def _inside(sharded: Scorer | None, action: Callable[[], Result]) -> Result:
    return action() if sharded is None else sharded.inside(action)


def training_plan(recipe: Recipe, lengths: Lengths) -> Plan:
    """Return the steps of a training, not yet cut into micro-batches: the same on every machine."""
    training = recipe.training
    return Plan(
        lengths,
        training.global_batch_size,
        seed=training.seed,
        num_epochs=training.num_train_epochs,
        max_steps=training.max_steps,
    )


def read_data(
    recipe: Recipe, accelerator: Accelerator | None = None, *, spare: Path | None = None, only_eval: bool = False
) -> tuple[PreTrainedTokenizerBase, PreparedData]:
    """Load the tokenizer and the token stores, in the form that the loss needs.

    Args:
        recipe: checked and complete.
        accelerator: the ranks: the first one builds the stores, the others read them.
        spare: the folder for new files where the cache folder is read-only; None refuses to go on there.
        only_eval: leave the training set out.
    """
    task = build_task(recipe)
    with nullcontext() if accelerator is None else accelerator.main_process_first():
        tokenizer = load_tokenizer(recipe, lambda: iter_texts(recipe, task.rows))
        data = prepare(
            recipe,
            tokenizer,
            cache_dir=cache_dir(),
            spare=spare,
            wants=task.rows,
            only_eval=only_eval,
            stops=stop_tokens(recipe, tokenizer),
        )
    return tokenizer, _with_mismatched(data, recipe) if "mismatched" in task.needs else data


def quiet_libraries() -> None:
    """Turn off the progress bars and log messages of the libraries."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def build_accelerator(recipe: Recipe) -> Accelerator:
    """Join the other ranks, on GPUs if there are any, else on CPUs.

    Raises:
        UsageError: A launcher asks for something that dpoctl does not do, or started processes that do not know of
            each other.
        SetupError: The ranks are numbered wrongly, or cannot reach each other.
    """
    # accelerate keeps the precision of the first run in a process for all later ones; its process group stays.
    AcceleratorState._reset_state()
    on_gpu = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    dtype = compute_dtype(recipe, torch.device("cuda" if on_gpu else "cpu"))
    check_environment(os.environ, str(dtype).removeprefix("torch."), recipe.training)
    fsdp_options.take_over(os.environ)
    if sys.platform != "linux":
        console.note(f"dpoctl has not been tried on {sys.platform}; it computes on the CPU, and not on mps")
    if on_gpu:
        _check_gpus(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count())
    try:
        accelerator = Accelerator(
            mixed_precision=MIXED_PRECISION[dtype],
            cpu=not on_gpu,
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(seconds=recipe.training.ddp_timeout)),
                # Experts that get no token of a micro-batch get no gradient.
                DistributedDataParallelKwargs(
                    find_unused_parameters=_has_experts(recipe), gradient_as_bucket_view=True
                ),
            ],
        )
    except (dist.DistError, RuntimeError) as error:
        if "WORLD_SIZE" not in os.environ:
            raise
        raise SetupError(
            f"rank {os.environ.get('RANK')} of {os.environ['WORLD_SIZE']} cannot reach the other ranks: "
            f"{str(error).splitlines()[0][:300]}",
            hint="give all ranks the same MASTER_ADDR and MASTER_PORT, and each rank its own RANK",
        ) from error
    started = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != started:
        raise SetupError(
            f"{started} processes were started, and accelerate joins {accelerator.num_processes} of them",
            hint="start them with torchrun",
        )
    set_rank_timeout(START_TIMEOUT.total_seconds())
    if on_gpu:
        # It makes a new plan for every shape, and no two micro-batches have the same shape.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return accelerator


def _check_gpus(processes: int, visible: int) -> None:
    """Check that each process of this machine has a GPU of its own.

    Raises:
        SetupError: Two would share one, which NCCL cannot do.
    """
    # A launcher may show each process its own GPU only.
    one_each = visible == 1 and "CUDA_VISIBLE_DEVICES" in os.environ
    if processes > visible and not one_each:
        raise SetupError(
            f"{processes} processes were started on {platform.node()}, and there each sees {visible} GPUs",
            hint=f"start at most {visible} there, or show them more in CUDA_VISIBLE_DEVICES",
        )


def refuse_too_large(recipe: Recipe, accelerator: Accelerator) -> None:
    """Refuse a run whose weights, gradients and optimizer state cannot fit, before its data are prepared.

    Raises:
        UsageError: they do not fit.
    """
    device, ranks = accelerator.device, accelerator.num_processes
    free = torch.tensor([free_bytes(device)], dtype=torch.float64, device=device)
    capacity = float(accelerator.gather(free).min()) / (local_ranks() if device.type == "cpu" else 1)
    may_divide = recipe.training.sharding != "none"
    shards = max(1, ranks // recipe.training.replicas) if may_divide else 1
    refuse_states(recipe, compute_dtype(recipe, device), capacity, f"this {device.type}", shards)


def set_rank_timeout(seconds: float) -> None:
    """Set how long this process waits for the other ranks in each collective, also in those of some ranks only."""
    if dist.is_initialized():
        for group in list(dist.distributed_c10d._world.pg_map):
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def local_ranks() -> int:
    """Return the number of processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _with_mismatched(data: PreparedData, recipe: Recipe) -> PreparedData:
    """Give each record a second response, taken from another prompt."""
    longest = recipe.data.max_length
    evals: dict[str, TokenStore] = {name: Mismatched(store, longest) for name, store in data.evals.items()}
    return replace(data, evals=evals, train_store=data.train_store and Mismatched(data.train_store, longest))


def _has_experts(recipe: Recipe) -> bool:
    config = recipe.model.from_scratch.config if recipe.model.from_scratch else {}
    return any("expert" in key for key in config)

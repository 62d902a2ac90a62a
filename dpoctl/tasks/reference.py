"""The reference: log-probabilities that are computed once and cached on disk, or a model that runs beside the policy.

The first step must give the loss of equal policy and reference: every margin is zero before the first update.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PretrainedConfig

from dpoctl import console
from dpoctl.core.batch import Batch
from dpoctl.core.collator import collate
from dpoctl.core.logps import per_response
from dpoctl.core.loop import Metrics
from dpoctl.core.meters import Meter, standard_error
from dpoctl.core.objective import Objective
from dpoctl.core.planner import Lengths, Plan
from dpoctl.core.reader import Reader
from dpoctl.data.cache import Cache, cache_dir
from dpoctl.errors import RunError, UsageError
from dpoctl.losses import Scores
from dpoctl.losses.base import required
from dpoctl.model.load import load_run, weight_dtype
from dpoctl.model.policy import Policy, Snapshot
from dpoctl.recipe.schema import Recipe, ReferenceSection
from dpoctl.tasks.reference_cache import ReferenceCache
from dpoctl.tasks.setup import Setup

# Part of every cache key: raise it when the same inputs give other numbers.
VERSION = 4
# The most records whose numbers are computed together, and then kept.
GROUP = 1024
CHUNK = 1 << 20
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
Ints = NDArray[np.integer[Any]]
Columns = dict[str, Floats]
PROVENANCE = {"_name_or_path", "transformers_version", "architectures", "use_cache"}
Context = Callable[[], AbstractContextManager[object]]
Tensors = Callable[[], Iterable[tuple[str, Tensor]]]
# Allowed relative error of the loss of exactly equal log-probabilities.
ROUNDING = 1e-3
# Rounding error of the log-probability of one token, in nats; the errors of several tokens add up like a random walk.
NOISE_PER_TOKEN = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


class LiveReference:
    """A reference that runs beside the policy; calling it adds the reference's log-probabilities to a batch.

    Args:
        score: computes the log-probabilities of the responses of a batch.
        enter: a context in which `score` uses the weights of the reference.
        moving: the weights of a reference that follows the policy; None for a fixed one.
        section: after how many steps the reference is updated, and how far it moves.
    """

    def __init__(
        self, score: Callable[[Batch], Scores], enter: Context, moving: Snapshot | None, section: ReferenceSection
    ) -> None:
        self._score, self._enter = score, enter
        self._moving, self._section = moving, section

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch with the reference's log-probabilities."""
        with torch.no_grad(), self._enter():
            scores = self._score(batch)
        return replace(batch, ref_logps=scores.logps, ref_head_logps=scores.head_logps)

    def follow(self, step: int) -> None:
        """Move the reference towards the policy if it is due; called with the number of each step that is done."""
        steps = self._section.sync_steps
        if self._moving is not None and steps is not None and step % steps == 0:
            self._moving.move(self._section.sync_alpha)

    def state(self) -> dict[str, Tensor]:
        """Return the tensors for a checkpoint: none for a fixed reference."""
        return {} if self._moving is None else self._moving.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the tensors of a checkpoint."""
        if self._moving is not None:
            self._moving.load_state(state)


class Reference:
    """The model that the policy is compared with.

    Args:
        setup: the policy before its first update; its recipe may name another model as the reference.
        spare: the folder for new files where the cache folder is read-only; None keeps none there.
    """

    def __init__(self, setup: Setup, spare: Path | None = None) -> None:
        policy, self._section = setup.policy, setup.recipe.dpo.reference
        self._accelerator, self._policy = setup.accelerator, policy
        self._needs = setup.task.needs & {"head"}
        # A context in which the scorer uses the weights of the reference, and all tensors that these are.
        self._enter: Context = policy.reference if policy.kind == "lora" else nullcontext
        self._tensors: Tensors = policy.reference_tensors
        # In full fine-tuning the policy itself is the reference, until its first update.
        self._is_fixed = policy.kind == "lora"
        if self._section.path is not None:
            setup = _another_model(setup)
            other = setup.policy
            self._enter, self._is_fixed = nullcontext, True
            self._tensors = lambda: [*other.model.state_dict().items(), *other.adapter_scales()]
        self._scorer = setup.scorer(is_reference=True)
        self._sharding = setup.sharding
        self._cache = Cache(cache_dir(), spare)

    def read_into(self, reader: Reader, max_tokens: int, records: Ints | None = None) -> Reader:
        """Return a reader with the reference's log-probabilities; the arguments are those of `table`."""
        return with_columns(reader, self.table(reader, max_tokens, records))

    def table(self, reader: Reader, max_tokens: int, records: Ints | None = None) -> Columns:
        """Return the reference's numbers of the responses of a store, from the cache on disk where they are there.

        Args:
            reader: the reader of the token store.
            max_tokens: token budget of a micro-batch.
            records: compute only these, in this order; None computes all.

        Returns:
            `logps` `[R]`, and `head_logps` `[R]` if the loss needs them; zero for records that were not asked for.
        """
        store, wanted = reader.store, np.arange(len(reader.store)) if records is None else records
        cache = self._cache_of(reader)
        table, known = self._known(cache, int(store.response_start[-1]))
        missing = int(np.count_nonzero(~known[store.response_start[wanted]]))
        if missing:
            there = f"; {len(wanted) - missing:,} more are in the cache" if missing < len(wanted) else ""
            console.say(f"reference: computing log-probabilities of {missing:,} records{there}")
            self._compute(reader, max_tokens, wanted, table, known, cache)
        else:
            console.say(f"reference: using cached log-probabilities of {len(wanted):,} records")
        return dict(zip(self._columns, table, strict=True))

    def live(self) -> LiveReference:
        """Return a reference that runs beside the policy, with a copy of the trained weights if it needs one."""
        moves = self._section.sync_steps is not None
        if self._is_fixed and not moves:
            return LiveReference(self._score, self._enter, None, self._section)
        snapshot = Snapshot(self._policy)
        return LiveReference(self._score, snapshot.swapped_in, snapshot if moves else None, self._section)

    @property
    def _columns(self) -> tuple[str, ...]:
        return ("logps", "head_logps") if "head" in self._needs else ("logps",)

    @cached_property
    def _identity(self) -> str:
        """Everything that the numbers depend on, except the token store."""
        causal, probed = self._scorer.causal, self._scorer.verdict
        attention = f"{probed.layout} {causal.config._attn_implementation}"
        whole = None if self._sharding is None else self._sharding.whole
        weights, config = fingerprint(self._tensors(), whole), describe_config(causal.config)
        # Weights that are gathered in lower precision give slightly other numbers than those that autocast casts.
        gathered = f" gathered in {self._sharding.dtype}" if self._sharding and self._sharding.dtype else ""
        return f"{VERSION} {attention} {probed.own_head} {self._policy.dtype}{gathered} {weights} {config}"

    def _cache_of(self, reader: Reader) -> ReferenceCache | None:
        """Return the cache of a store, on the rank that reads and writes it; None on others."""
        identity = self._identity
        # The key does not include the user's code, so its results are not cached.
        if not self._accelerator.is_main_process or reader.collate is not collate:
            return None
        text = f"{identity} {reader.store.key} {' '.join(self._columns)}"
        return ReferenceCache(self._cache, hashlib.sha256(text.encode()).hexdigest()[:32], self._columns)

    def _known(self, cache: ReferenceCache | None, num_responses: int) -> tuple[Floats, Bools]:
        """Return the numbers that the first rank finds in the cache, and which are known, on every rank."""
        columns = len(self._columns)
        found = np.zeros((columns + 1, num_responses), dtype=np.float32)
        if cache is not None:
            found[:columns], found[columns] = cache.read(num_responses)
        # The other ranks have zero: the sum is exact.
        whole: Tensor = self._accelerator.reduce(torch.from_numpy(found).to(self._accelerator.device))
        numbers = whole.cpu().numpy()
        return numbers[:columns], numbers[columns] > 0

    def _score(self, batch: Batch) -> Scores:
        # Set the mode of the model, not of the scorer: the policy may run in another scorer.
        with evaluating(self._scorer.model), self._accelerator.autocast():
            return per_response(batch, self._scorer(batch), self._needs)

    def _compute(
        self,
        reader: Reader,
        max_tokens: int,
        wanted: Ints,
        table: Floats,
        known: Bools,
        cache: ReferenceCache | None,
    ) -> None:
        """Fill in the numbers of the records that are not known, group by group; a group's numbers are kept as it ends.

        The groups depend on what is wanted, not on what is known: what an interrupted pass has left to do is computed
        in the micro-batches in which it would have computed it.
        """
        starts, ranks = reader.store.response_start, self._accelerator.num_processes
        plan = Plan(Lengths.of(reader.store), GROUP, ranks, max_tokens, reader.layout)
        total = int(np.count_nonzero(~known[starts[wanted]]))
        # One autocast around the whole pass casts each weight only once.
        with (
            console.WorkProgress("reference", total, "records") as progress,
            torch.no_grad(),
            self._enter(),
            self._accelerator.autocast(),
        ):
            try:
                for group in plan.groups(wanted):
                    records = group[~known[starts[group]]]
                    if len(records):
                        responses = reader.responses(records)
                        table[:, responses] = self._numbers_of(reader, plan, records)
                        if cache is not None:
                            cache.add(responses, table[:, responses])
                    progress.advance(len(records))
            finally:
                if cache is not None:
                    cache.flush()

    def _numbers_of(self, reader: Reader, plan: Plan, records: Ints) -> Floats:
        """Return `[columns, n]`, the numbers of the responses of some records, which all ranks compute together."""
        offsets = np.concatenate([[0], np.cumsum(reader.num_responses(records))])
        place = {int(record): number for number, record in enumerate(records)}
        values = torch.zeros(len(self._columns), int(offsets[-1]), device=self._accelerator.device)
        for own in plan.schedule(records)[self._accelerator.process_index]:
            # The ranks of a sharded model gather it together: one that has no records runs a filler.
            if not own and self._sharding is None:
                continue
            scores = self._score(reader.batch(own))
            if not own:
                continue
            at = np.concatenate([np.arange(offsets[place[r]], offsets[place[r] + 1]) for r in own])
            rows = torch.stack([getattr(scores, column) for column in self._columns])
            values[:, torch.from_numpy(at).to(values.device)] = rows.float()
        # One rank computed each response, and the others have zero: the sum is exact.
        whole: Tensor = self._accelerator.reduce(values)
        return whole.cpu().numpy()


def with_columns(reader: Reader, table: Columns | None) -> Reader:
    """Return a reader that adds the reference's numbers to its batches; None adds nothing."""
    columns = table or {}
    return replace(reader, ref_logps=columns.get("logps"), ref_head_logps=columns.get("head_logps"))


def load_reference(recipe: Recipe, device: torch.device, dtype: torch.dtype, *, lazy: bool = False) -> Policy:
    """Load the model at `dpo.reference.path`, with the settings of the policy.

    Args:
        recipe: a recipe with that key.
        device: the device of the weights.
        dtype: the dtype of the weights.
        lazy: leave weights in their files until the model is divided over the ranks.
    """
    path, section = recipe.dpo.reference.path, recipe.model
    assert path is not None
    return load_run(
        path,
        device,
        dtype,
        attn_implementation=section.attn_implementation,
        quantization=recipe.quantization,
        trust_remote_code=section.trust_remote_code,
        lazy=lazy,
    )


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Keep a module in eval mode while the context lasts: a reference has no dropout."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


def describe_config(config: PretrainedConfig) -> str:
    """Return the config of a model as text, without the keys that do not change its numbers."""
    values = config.to_dict()
    return json.dumps({name: values[name] for name in sorted(values) if name not in PROVENANCE}, default=str)


def fingerprint(tensors: Iterable[tuple[str, Tensor]], whole: Callable[[Tensor], Tensor] | None = None) -> str:
    """Return a digest of names, shapes and bits, computed on the device of each tensor.

    Two integer sums over the bits of a tensor, one of them weighted by position, represent its content. That detects
    every change by training, merging or another checkpoint, and runs at memory speed.

    Args:
        tensors: the tensors by name.
        whole: gathers a tensor that is sharded.
    """
    digest = hashlib.sha256()
    with console.WorkProgress("reference: hashing the weights", unit="tensors") as progress:
        for name, stored in tensors:
            tensor = stored if whole is None else whole(stored)
            # One transfer from the device per tensor.
            checksums = torch.stack([_checksum(chunk) for chunk in _chunks(tensor)]).tolist()
            sums = [f"{plain},{weighted}" for plain, weighted in checksums]
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {' '.join(sums)}\n".encode())
            progress.advance()
    return digest.hexdigest()


@torch.no_grad()
def check_first_step(
    objective: Objective, plan: Plan, reader: Reader, at_init: float | None, dtype: torch.dtype
) -> None:
    """Compare margins and loss of the first micro-batch with their known values.

    Args:
        objective: the objective before the first update.
        plan: the plan of the run.
        reader: the reader of the training data.
        at_init: the loss while policy and reference are equal; None if it depends on the data.
        dtype: the precision of the computation.

    Raises:
        RunError: the first policy is not the reference: a wrong reference, dropout, or a wrong mask; or the loss of
            equal models has a wrong value.
    """
    scores = _first_scores(objective, plan, reader)
    loss = f"first loss {objective.first_loss(scores):.6f}" + ("" if at_init is None else f", expected {at_init:.6f}")
    margin = _check_margins(scores, dtype, detail=f" ({loss})")
    if at_init is not None:
        _check_loss(objective, scores, at_init)
    console.say(f"self-check: {loss}; |margin| <= {margin:.1e}")


@torch.no_grad()
def metrics_at_start(
    objective: Objective, plan: Plan, reader: Reader, name: str, at_init: float | None, dtype: torch.dtype
) -> Metrics | None:
    """Return what an evaluation before the first step would give, without running the model on the whole set.

    Where the policy equals its reference, its log-probabilities are those of the reference, and no reward differs from
    another; that it does is checked on the first micro-batch. An accuracy is not defined then.

    Args:
        objective: the objective before the first update.
        plan: one pass over the set.
        reader: the reader of the set.
        name: the name of the set.
        at_init: the loss while policy and reference are equal; None if it depends on the data.
        dtype: the precision of the computation.

    Returns:
        The metrics; None if they have to be computed: the loss, or the user's collator, may depend on more than these
        log-probabilities.

    Raises:
        RunError: the first policy is not the reference.
    """
    _check_margins(_first_scores(objective, plan, reader), dtype, of=f" of eval set {name!r}")
    if "confidence" in objective.needs or reader.collate is not collate:
        return None
    if reader.ref_logps is None and at_init is None:
        return None
    meter = Meter(objective.accelerator.device)
    for step in plan:
        objective.evaluate_at_reference(step, reader, meter)
    metrics = standard_error(meter.read(lambda totals: totals), len(plan.lengths))
    unknown = ("rewards/accuracies",) if reader.ref_logps is not None else ("rewards/accuracies", "logps/")
    return {key: value for key, value in metrics.items() if not any(word in key for word in unknown)}


def _first_scores(objective: Objective, plan: Plan, reader: Reader) -> Scores:
    """Score the first micro-batch of this rank."""
    records = plan.step(0).schedule[objective.accelerator.process_index][0]
    with evaluating(objective.scorer):
        return objective.score(reader.batch(records))


def _check_margins(scores: Scores, dtype: torch.dtype, *, of: str = "", detail: str = "") -> float:
    """Return the largest margin, in nats, once it is known to be rounding error."""
    margin = float((scores.margins if len(scores.pairs) else scores.log_ratios).abs().max())
    if margin > NOISE_PER_TOKEN[dtype] * float(scores.num_tokens.float().max().sqrt()):
        raise RunError(
            f"self-check: before the first step all margins{of} must be 0, but one is {margin:.3g}{detail}",
            hint="check dpo.reference: the reference is not the model that training starts from",
        )
    return margin


def _another_model(setup: Setup) -> Setup:
    """Return the setup of the model at `dpo.reference.path`, with the batch layout of the policy."""
    # Stored in the same dtype as the policy: where both are the same model, the numbers must be equal.
    stored = weight_dtype(setup.recipe, setup.policy.dtype)
    is_sharded, device = setup.sharding is not None, setup.accelerator.device
    other = setup.with_model(load_reference(setup.recipe, device, stored, lazy=is_sharded))
    layout, probed = setup.probe.layout, other.probe
    if layout not in ("padded", probed.layout):
        raise UsageError(
            f"dpo.reference.path: '{setup.recipe.dpo.reference.path}' cannot use the batch layout of the policy, "
            f"{layout}: {probed.reason}",
            hint="use a model of the policy's architecture",
        )
    return replace(other, probe=replace(probed, layout=layout))


def _chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    chunks: tuple[Tensor, ...] = tensor.detach().contiguous().view(-1).view(bits).split(CHUNK)
    return chunks


def _checksum(bits: Tensor) -> Tensor:
    values = bits.to(torch.int64)
    # Overflow is intended: this is arithmetic modulo 2^64.
    weights = torch.arange(len(values), device=values.device) * 6364136223846793005 + 1442695040888963407
    return torch.stack([values.sum(), (values * weights).sum()])


def _check_loss(objective: Objective, scores: Scores, at_init: float) -> None:
    """Check the loss of a policy that is equal to the reference in every bit."""
    equal = replace(scores, logps=required(scores.ref_logps, "ref_logps"), head_logps=scores.ref_head_logps)
    loss = objective.first_loss(equal)
    if abs(loss - at_init) > ROUNDING * abs(at_init):
        raise RunError(
            f"self-check: the loss of equal models must be {at_init:.6f}, but it is {loss:.6f}",
            hint="use another dpo.loss.type, and report this as a bug",
        )

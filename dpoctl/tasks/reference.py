"""The reference: its log-probabilities computed once and kept on disk, or a model that runs beside the policy."""

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PretrainedConfig

from dpoctl import console
from dpoctl.core.batch import Batch
from dpoctl.core.collator import collate
from dpoctl.core.logps import Responses, Scorer, per_response
from dpoctl.core.planner import Lengths, Plan
from dpoctl.core.reader import Reader
from dpoctl.data.prepare import cache_dir
from dpoctl.data.store import TokenStore
from dpoctl.errors import UsageError
from dpoctl.model.load import load_run
from dpoctl.model.policy import Policy
from dpoctl.model.probe import Verdict, probe
from dpoctl.model.snapshot import Snapshot
from dpoctl.recipe.schema import Recipe, ReferenceSection

# Part of every key: raise it when the same inputs would give other numbers.
VERSION = 3
# Records of one step of the pass; it bounds what a rank plans at once, nothing else.
STEP = 1024
CHUNK = 1 << 20
Columns = dict[str, NDArray[np.float32]]
PROVENANCE = {"_name_or_path", "transformers_version", "architectures", "use_cache"}


Context = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class _Origin:
    """Where a reference's numbers come from.

    Attributes:
        scorer: computes them.
        tensors: everything that they are computed from.
        enter: inside it the scorer computes the reference.
        holds: whether it still does after the policy's first update.
    """

    scorer: Scorer
    tensors: Callable[[], Iterable[tuple[str, Tensor]]]
    enter: Context
    holds: bool

    @classmethod
    def adapters_off(cls, policy: Policy, verdict: Verdict) -> Self:
        """The model under the adapter that is trained, or that with its SFT adapter."""
        scorer = Scorer(policy.model, policy.causal, verdict)
        return cls(scorer, policy.reference_tensors, policy.reference, holds=True)

    @classmethod
    def before_training(cls, policy: Policy, verdict: Verdict) -> Self:
        """A model that is trained whole, as it is at present."""
        scorer = Scorer(policy.model, policy.causal, verdict)
        return cls(scorer, policy.reference_tensors, nullcontext, holds=False)

    @classmethod
    def another_model(cls, recipe: Recipe, policy: Policy, verdict: Verdict, accelerator: Accelerator) -> Self:
        """The model that the recipe names, run as the policy is."""
        # Stored as the policy is stored: the same numbers must come out where both are the same model.
        stored = torch.float32 if recipe.lora is None else policy.dtype
        other = load_named(recipe, accelerator.device, stored)
        with accelerator.autocast():
            own = probe(other.causal, max_length=recipe.data.max_length)
        if verdict.layout not in ("padded", own.layout):
            raise UsageError(
                f"dpo.reference.path: '{recipe.dpo.reference.path}' cannot be run as the policy is: {own.reason}",
                hint="name a model of the policy's architecture",
            )
        scorer = Scorer(other.model, other.causal, replace(own, layout=verdict.layout))
        return cls(
            scorer, lambda: [*other.model.state_dict().items(), *other.adapter_scales()], nullcontext, holds=True
        )


class Live:
    """A reference that runs beside the policy; calling it puts into a batch what the reference says of it.

    Args:
        score: what a batch's responses are worth under the scorer.
        enter: inside it the scorer computes the reference.
        moving: what `enter` puts in place, where that follows the policy.
        section: after how many steps it does, and how far.
    """

    def __init__(
        self, score: Callable[[Batch], Responses], enter: Context, moving: Snapshot | None, section: ReferenceSection
    ) -> None:
        self._score, self._enter = score, enter
        self._moving, self._section = moving, section

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch with the reference's log-probabilities."""
        with torch.no_grad(), self._enter():
            said = self._score(batch)
        return replace(batch, ref_logps=said.logps, ref_head_logps=said.head_logps)

    def follow(self, step: int) -> None:
        """Move towards the policy if it is time: called when a step is done, with its number."""
        steps = self._section.sync_steps
        if self._moving is not None and steps is not None and step % steps == 0:
            self._moving.move(self._section.sync_alpha)

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold of it: nothing where it stays what it was."""
        return {} if self._moving is None else self._moving.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what a checkpoint holds."""
        if self._moving is not None:
            self._moving.load_state(state)


class Reference:
    """What the policy is compared with.

    Args:
        recipe: says whether another model is named, and whether the reference follows the policy.
        policy: as it was before its first update.
        verdict: how models of this kind are run.
        accelerator: ranks and precision.
        needs: what the loss needs of each response besides its log-probability.
    """

    def __init__(
        self,
        recipe: Recipe,
        policy: Policy,
        verdict: Verdict,
        accelerator: Accelerator,
        needs: Collection[str] = (),
    ) -> None:
        self._section, self._policy, self._accelerator = recipe.dpo.reference, policy, accelerator
        self._needs = frozenset(needs) & {"head"}
        if self._section.path is not None:
            self._origin = _Origin.another_model(recipe, policy, verdict, accelerator)
        elif policy.kind == "lora":
            self._origin = _Origin.adapters_off(policy, verdict)
        else:
            self._origin = _Origin.before_training(policy, verdict)

    def read_into(self, reader: Reader, max_tokens: int, limit: int | None = None) -> Reader:
        """Return a reader that knows the reference's log-probabilities, from disk if they are known there.

        Args:
            reader: of a store.
            max_tokens: budget of a micro-batch.
            limit: how many records are asked for, the first ones; the others may be left at zero.
        """
        return with_columns(reader, self.table(reader, max_tokens, limit))

    def table(self, reader: Reader, max_tokens: int, limit: int | None = None) -> Columns:
        """Return what is known of every response of a store; the arguments are those of `read_into`.

        Returns:
            `logps` `[R]`, and `head_logps` `[R]` where the loss needs them.
        """
        if reader.collate is not collate:
            # No key stands for code: what it computes is neither kept nor looked up.
            return self._compute(reader, max_tokens, limit)
        files = {column: self._file(reader.store, column) for column in self._columns}
        known = torch.tensor(int(all(file.is_file() for file in files.values())), device=self._accelerator.device)
        if int(self._accelerator.reduce(known)) < self._accelerator.num_processes:
            table = self._compute(reader, max_tokens, limit)
            if self._accelerator.is_main_process and (limit is None or limit >= len(reader.store)):
                for column, file in files.items():
                    _write_whole(file, table[column])
            return table
        console.say(f"reference: log-probabilities of {len(reader.store):,} records from {files['logps']}")
        return {column: np.load(file, allow_pickle=False) for column, file in files.items()}

    def live(self) -> Live:
        """Return a reference that runs beside the policy, with a copy of what is trained where that is needed."""
        moves = self._section.sync_steps is not None
        if self._origin.holds and not moves:
            return Live(self._score, self._origin.enter, None, self._section)
        snapshot = Snapshot(self._policy)
        return Live(self._score, snapshot.in_place, snapshot if moves else None, self._section)

    @property
    def _columns(self) -> tuple[str, ...]:
        return ("logps", "head_logps") if "head" in self._needs else ("logps",)

    @cached_property
    def _identity(self) -> str:
        """Everything but the store that decides the numbers."""
        causal, verdict = self._origin.scorer.causal, self._origin.scorer.verdict
        run_by = f"{verdict.layout} {causal.config._attn_implementation}"
        weights, config = fingerprint(self._origin.tensors()), describe_config(causal.config)
        return f"{VERSION} {run_by} {verdict.own_head} {self._policy.dtype} {weights} {config}"

    def _file(self, store: TokenStore, column: str) -> Path:
        text = f"{self._identity} {store.key}" + ("" if column == "logps" else f" {column}")
        return cache_dir() / "reference" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npy"

    def _score(self, batch: Batch) -> Responses:
        scorer = self._origin.scorer
        # The model, and not the scorer, knows its mode: the policy may run in a scorer of its own.
        with evaluating(scorer.model), self._accelerator.autocast():
            return per_response(batch, scorer(batch), self._needs)

    def _compute(self, reader: Reader, max_tokens: int, limit: int | None) -> Columns:
        lengths, starts = Lengths.of(reader.store).first(limit), reader.store.response_start
        plan = Plan(lengths, STEP, self._accelerator.num_processes, max_tokens, reader.layout)
        console.say(f"reference: computing log-probabilities of {len(lengths):,} records")
        table = torch.zeros(len(self._columns), int(starts[-1]), device=self._accelerator.device)
        # Autocast around the whole pass casts each weight once.
        with torch.no_grad(), self._origin.enter(), self._accelerator.autocast():
            for step in plan:
                for records in step.schedule[self._accelerator.process_index]:
                    if not records:
                        continue
                    said = self._score(reader.batch(records))
                    at = np.concatenate([np.arange(starts[r], starts[r + 1]) for r in records])
                    rows = torch.stack([getattr(said, column) for column in self._columns])
                    table[:, torch.from_numpy(at).to(table.device)] = rows.float()
        # Each response was computed by one rank and is zero on the others: adding them up is exact.
        whole: Tensor = self._accelerator.reduce(table)
        return dict(zip(self._columns, whole.cpu().numpy(), strict=True))


def with_columns(reader: Reader, table: Columns | None) -> Reader:
    """Return a reader that puts what a table says into its batches."""
    known = table or {}
    return replace(reader, ref_logps=known.get("logps"), ref_head_logps=known.get("head_logps"))


def load_named(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> Policy:
    """Load the model that a recipe names as the reference, as it loads its own.

    Args:
        recipe: with `dpo.reference.path`.
        device: where to put it.
        dtype: what to store it in.
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
    )


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module in eval mode for a while: no dropout in a reference."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


def describe_config(config: PretrainedConfig) -> str:
    """Return what of a model's config can change its numbers: everything but where it came from."""
    values = config.to_dict()
    return json.dumps({name: values[name] for name in sorted(values) if name not in PROVENANCE}, default=str)


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a digest of names, shapes and bits, computed where the tensors are.

    Two integer sums over a tensor's bits, one of them weighted by position, stand for its content: enough to notice
    any change that training, merging or another checkpoint makes, at memory speed.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        # One look at the device a tensor.
        checksums = torch.stack([_checksum(chunk) for chunk in _chunks(tensor)]).tolist()
        sums = [f"{plain},{weighted}" for plain, weighted in checksums]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {' '.join(sums)}\n".encode())
    return digest.hexdigest()


def _chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    chunks: tuple[Tensor, ...] = tensor.detach().contiguous().view(-1).view(bits).split(CHUNK)
    return chunks


def _checksum(bits: Tensor) -> Tensor:
    values = bits.to(torch.int64)
    # Overflow wraps: arithmetic modulo 2^64 is what is wanted.
    weights = torch.arange(len(values), device=values.device) * 6364136223846793005 + 1442695040888963407
    return torch.stack([values.sum(), (values * weights).sum()])


def _write_whole(file: Path, table: NDArray[np.float32]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    with temporary.open("wb") as stream:
        np.save(stream, table, allow_pickle=False)
    temporary.replace(file)

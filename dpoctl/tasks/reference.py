"""The reference: its log-probabilities computed once and kept on disk, or a model that runs beside the policy."""

import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PretrainedConfig

from dpoctl import console
from dpoctl.core.batch import Batch
from dpoctl.core.collator import collate
from dpoctl.core.logps import Scorer
from dpoctl.core.objective import LiveReference
from dpoctl.core.planner import Lengths, Plan
from dpoctl.core.reader import Reader
from dpoctl.data.prepare import cache_dir
from dpoctl.errors import UsageError
from dpoctl.model.load import load_run
from dpoctl.model.policy import Policy
from dpoctl.model.probe import Verdict, probe
from dpoctl.recipe.schema import Recipe

# Part of every key: raise it when the same inputs would give other numbers.
VERSION = 1
# Records of one step of the pass; it bounds what a rank plans at once, nothing else.
STEP = 1024
CHUNK = 1 << 24
PROVENANCE = {"_name_or_path", "transformers_version", "architectures", "use_cache"}


class Reference:
    """What the policy is compared with.

    Args:
        recipe: says whether another model is named.
        policy: as it was before its first update.
        verdict: how models of this kind are run.
        accelerator: ranks and precision.
    """

    def __init__(self, recipe: Recipe, policy: Policy, verdict: Verdict, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._enter: Callable[[], AbstractContextManager[object]] = nullcontext
        self._is_trained = False
        tensors: Iterable[tuple[str, Tensor]]
        if recipe.dpo.reference.path is not None:
            other, verdict = _load_other(recipe, recipe.dpo.reference.path, policy.dtype, verdict, accelerator)
            self.scorer = Scorer(other.model, other.causal, verdict)
            tensors = [*other.model.state_dict().items(), *other.adapter_scales()]
        else:
            self.scorer = Scorer(policy.model, policy.causal, verdict)
            tensors = policy.reference_tensors()
            if policy.kind == "lora":
                self._enter = policy.reference
            else:
                self._is_trained = True
        weights, config = fingerprint(tensors), describe_config(self.scorer.causal.config)
        run_by = verdict.layout if verdict.layout == "shared" else self.scorer.causal.config._attn_implementation
        self._identity = f"{VERSION} {run_by} {verdict.own_head} {policy.dtype} {weights} {config}"

    def table(self, reader: Reader, max_tokens: int, limit: int | None = None) -> NDArray[np.float32]:
        """Return `[R]`, the log-probability of every response of a store, from disk if it is known there.

        Args:
            reader: of the store.
            max_tokens: budget of a micro-batch.
            limit: how many records are asked for, the first ones; the others may be left at zero.
        """
        key = hashlib.sha256(f"{self._identity} {reader.store.key}".encode()).hexdigest()[:32]
        if reader.collate is not collate:
            # No key stands for code: what it computes is neither kept nor looked up.
            return self._compute(reader, max_tokens, limit)
        file = cache_dir() / "reference" / f"{key}.npy"
        known = torch.tensor(int(file.is_file()), device=self._accelerator.device)
        if int(self._accelerator.reduce(known)) < self._accelerator.num_processes:
            table = self._compute(reader, max_tokens, limit)
            if self._accelerator.is_main_process and (limit is None or limit >= len(reader.store)):
                _write_whole(file, table)
            return table
        console.say(f"reference: log-probabilities of {len(reader.store):,} records from {file}")
        loaded: NDArray[np.float32] = np.load(file, allow_pickle=False)
        return loaded

    def live(self) -> LiveReference:
        """Return a reference that runs beside the policy, its own copy of the weights where that is needed."""
        scorer, enter = self.scorer, self._enter
        if self._is_trained:
            scorer = copy.deepcopy(scorer).requires_grad_(False)

        def logps(batch: Batch) -> Tensor:
            with enter(), evaluating(scorer), self._accelerator.autocast():
                return batch.sum_per_response(scorer(batch))

        return logps

    def _compute(self, reader: Reader, max_tokens: int, limit: int | None) -> NDArray[np.float32]:
        lengths, starts = Lengths.of(reader.store).first(limit), reader.store.response_start
        plan = Plan(lengths, STEP, self._accelerator.num_processes, max_tokens, reader.layout)
        console.say(f"reference: computing log-probabilities of {len(lengths):,} records")
        table = torch.zeros(int(starts[-1]), device=self._accelerator.device)
        with torch.no_grad(), self._enter(), evaluating(self.scorer), self._accelerator.autocast():
            for step in plan:
                for records in step.schedule[self._accelerator.process_index]:
                    if not records:
                        continue
                    batch = reader.batch(records)
                    at = np.concatenate([np.arange(starts[r], starts[r + 1]) for r in records])
                    logps = batch.sum_per_response(self.scorer(batch)).float()
                    table[torch.from_numpy(at).to(table.device)] = logps
        # Each response was computed by one rank and is zero on the others: adding them up is exact.
        whole: Tensor = self._accelerator.reduce(table)
        return whole.cpu().numpy()


def _load_other(
    recipe: Recipe, path: str, dtype: torch.dtype, verdict: Verdict, accelerator: Accelerator
) -> tuple[Policy, Verdict]:
    """Load another model as the reference, and see that batches laid out for the policy suit it."""
    section = recipe.model
    other = load_run(
        path,
        accelerator.device,
        # Stored as the policy is stored: the same numbers must come out where both are the same model.
        torch.float32 if recipe.lora is None else dtype,
        attn_implementation=section.attn_implementation,
        quantization=recipe.quantization,
        trust_remote_code=section.trust_remote_code,
    )
    with accelerator.autocast():
        own = probe(other.causal, max_length=recipe.data.max_length)
    if verdict.layout == "shared" and own.layout != "shared":
        raise UsageError(
            f"dpo.reference.path: '{path}' cannot be run as the policy is: {own.reason}",
            hint="name a model of the policy's architecture",
        )
    return other, replace(own, layout=verdict.layout)


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
        sums = [f"{int(plain)},{int(weighted)}" for plain, weighted in map(_checksum, _chunks(tensor))]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {' '.join(sums)}\n".encode())
    return digest.hexdigest()


def _chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    chunks: tuple[Tensor, ...] = tensor.detach().contiguous().view(-1).view(bits).split(CHUNK)
    return chunks


def _checksum(bits: Tensor) -> tuple[Tensor, Tensor]:
    values = bits.to(torch.int64)
    # Overflow wraps: arithmetic modulo 2^64 is what is wanted.
    weights = torch.arange(len(values), device=values.device) * 6364136223846793005 + 1442695040888963407
    return values.sum(), (values * weights).sum()


def _write_whole(file: Path, table: NDArray[np.float32]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    with temporary.open("wb") as stream:
        np.save(stream, table, allow_pickle=False)
    temporary.replace(file)

"""`dpoctl merge RUN`: the adapter of a run in the weights of its base, as one plain model folder."""

import json
import tempfile
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dpoctl import console
from dpoctl.data.prepare import iter_texts
from dpoctl.errors import RunError, UsageError, UserError
from dpoctl.model.load import load_run, resolve_dtype
from dpoctl.model.merge import Agreement, load_merged, logps_of, merge_adapter, save_merged, stored_dtype
from dpoctl.model.policy import Policy
from dpoctl.model.source import base_of, find_adapter, find_source
from dpoctl.model.tokenizer import read_tokenizer
from dpoctl.recipe import Recipe
from dpoctl.tasks.finished import best_device, recipe_of, require_model
from dpoctl.tasks.machine import quiet_libraries
from dpoctl.tasks.task import build_task

TEXTS, TOKENS = 16, 256
"""How much of the run's data the check reads: texts, and tokens of each."""


def run(run: Path, *, output: Path | None = None, dtype: str = "auto", json_output: bool = False) -> None:
    """Merge the adapter of a finished run into its base, and check what was written.

    Args:
        run: the run directory.
        output: the new folder; `merged` in the run directory if absent.
        dtype: the precision of the merged weights; `auto` is the run's, or else the one the base is stored in.
        json_output: print one JSON object.

    Raises:
        UsageError: the run holds no adapter, its base is quantised, or the folder is not empty.
        RunError: the merged model does not compute what base + adapter does; nothing is left behind.
    """
    quiet_libraries()
    recipe, target = recipe_of(run), output if output is not None else run / "merged"
    require_model(run)
    source = find_source(str(run), trust_remote_code=recipe.model.trust_remote_code)
    adapter = find_adapter(source)
    if adapter is None:
        raise UsageError(f"{run} is a whole model: there is no adapter to merge", hint="use it as it is")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UsageError(f"{target} is there already", hint="remove it, or name another folder with -o")
    chosen = dtype if dtype != "auto" else recipe.model.dtype
    stored = stored_dtype(base_of(adapter, trust_remote_code=recipe.model.trust_remote_code))
    precision = stored if chosen == "auto" else resolve_dtype(chosen, best_device())
    try:
        agreement = _merge(run, recipe, target, read_tokenizer(source), precision)
    except torch.OutOfMemoryError as error:
        hint = "the CPU has more: set CUDA_VISIBLE_DEVICES to nothing"
        raise RunError("the unquantised base does not fit into the GPU", hint=hint) from error
    _tell(recipe, target, precision, agreement, json_output=json_output)


def _merge(
    run: Path, recipe: Recipe, target: Path, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
) -> Agreement:
    """Write the merged model, whole and checked, or nothing."""
    device, trusted = best_device(), recipe.model.trust_remote_code
    console.say(f"loading the base unquantised, in {_name(dtype)} on {device.type}")
    # Without the recipe's quantisation: nothing is ever merged into quantised weights.
    policy = load_run(run, device, dtype, trust_remote_code=trusted)
    rows = _rows(recipe, tokenizer, policy)
    with policy.reference():
        base = logps_of(policy.causal, rows, dtype)
    adapted = logps_of(policy.causal.eval(), rows, dtype)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=target.parent) as staging:
        folder = Path(staging) / "merged"
        folder.mkdir()
        save_merged(merge_adapter(policy), folder, tokenizer)
        # One model at a time: the check needs no more memory than the merge.
        del policy
        agreement = Agreement.of(base, adapted, _logps_of_saved(folder, rows, device, dtype, trusted), dtype)
        agreement.check()
        folder.replace(target)
    return agreement


def _logps_of_saved(
    folder: Path, rows: list[list[int]], device: torch.device, dtype: torch.dtype, trusted: bool
) -> Tensor:
    return logps_of(load_merged(folder, device, trust_remote_code=trusted).eval(), rows, dtype)


def _rows(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, policy: Policy) -> list[list[int]]:
    """Token ids to compare on: of the run's data, or drawn at random where that is not at hand."""
    try:
        texts = list(islice(iter_texts(recipe, build_task(recipe).rows), TEXTS))
    except UserError as error:
        console.note(f"the run's data cannot be read ({error.message}); the check uses random tokens")
        texts = []
    rows = [list(tokenizer(text)["input_ids"])[:TOKENS] for text in texts]
    if enough := [row for row in rows if len(row) > 1]:
        return enough
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, int(policy.causal.config.vocab_size), (4, 64), generator=draw).tolist()


def _tell(recipe: Recipe, target: Path, dtype: torch.dtype, agreement: Agreement, *, json_output: bool) -> None:
    if recipe.quantization is not None:
        console.note("the adapter was trained over quantised weights; over the original ones it computes a little else")
    console.say(
        f"check: over {agreement.tokens:,} tokens the merged model differs from base + adapter by "
        f"{agreement.error:.1e} nats a token (allowed {agreement.allowed:.1e}; "
        f"the adapter moves {agreement.effect:.1e})"
    )
    if agreement.loses_much:
        console.warn(
            f"rounding to {_name(dtype)} loses a good part of what this adapter does; "
            "--dtype float32 keeps it, or use base + adapter"
        )
    if json_output:
        numbers = {"error": agreement.error, "allowed": agreement.allowed, "effect": agreement.effect}
        console.emit(json.dumps({"output": str(target), "dtype": _name(dtype), **numbers, "tokens": agreement.tokens}))
    else:
        console.say(f"done: {target} ({_name(dtype)}); AutoModelForCausalLM.from_pretrained({str(target)!r}) loads it")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

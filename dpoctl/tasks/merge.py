"""`dpoctl merge RUN`: merge the adapter of a run into its base model, as one plain model folder."""

import glob
import json
from itertools import islice
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from dpoctl import console
from dpoctl.data.prepare import iter_texts
from dpoctl.errors import RunError, UsageError, UserError, writing
from dpoctl.files import remove_torn, temporary_folder
from dpoctl.model.load import load_run, resolve_dtype
from dpoctl.model.merge import Agreement, load_merged, logps_of, merge_adapter, save_merged, stored_dtype
from dpoctl.model.policy import Policy
from dpoctl.model.source import base_of, find_adapter, find_source
from dpoctl.model.tokenizer import read_tokenizer
from dpoctl.recipe import Recipe
from dpoctl.tasks.earlier_step import with_model
from dpoctl.tasks.finished_run import best_device, recipe_of, require_model
from dpoctl.tasks.setup import quiet_libraries
from dpoctl.tasks.task import build_task

TEXTS, TOKENS = 16, 256
"""Number of texts of the run's data that the check uses, and of tokens of each."""


def run(run: Path, *, output: Path | None = None, dtype: str = "auto", json_output: bool = False) -> None:
    """Merge the adapter of a finished run into its base, and check the result.

    Args:
        run: the run directory.
        output: the new folder; the default is `merged` in the run directory.
        dtype: the precision of the merged weights; `auto` is the one in the recipe, or that of the base.
        json_output: print one JSON object.

    Raises:
        UsageError: the run has no adapter, its base is quantised, or the folder is not empty.
        RunError: the output of the merged model differs from that of base and adapter; the folder is deleted.
    """
    quiet_libraries()
    run = with_model(run)
    recipe, target = recipe_of(run), output if output is not None else run / "merged"
    require_model(run)
    source = find_source(str(run), trust_remote_code=recipe.model.trust_remote_code)
    adapter = find_adapter(source)
    if adapter is None:
        raise UsageError(f"{run} has no adapter: all weights were trained", hint="load the run directory as it is")
    if target.is_symlink():
        raise UsageError(f"{target} is a symbolic link", hint="remove it, or choose another folder with -o")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UsageError(f"{target} already exists", hint="delete it, or choose another folder with -o")
    chosen = dtype if dtype != "auto" else recipe.model.dtype
    stored = stored_dtype(base_of(adapter, trust_remote_code=recipe.model.trust_remote_code))
    precision = stored if chosen == "auto" else resolve_dtype(chosen, best_device())
    try:
        with console.WorkProgress("merging"), writing(target.parent):
            agreement = _merge(run, recipe, target, read_tokenizer(source), precision)
    except torch.OutOfMemoryError as error:
        hint = "merge on the CPU: set CUDA_VISIBLE_DEVICES to an empty value"
        raise RunError("out of memory: the unquantised base model does not fit on the GPU", hint=hint) from error
    _report(recipe, target, precision, agreement, json_output=json_output)


def _merge(
    run: Path, recipe: Recipe, target: Path, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
) -> Agreement:
    """Write the merged model after checking it, or write nothing."""
    device, trusted = best_device(), recipe.model.trust_remote_code
    console.say(f"loading the unquantised base model, in {_name(dtype)} on {device.type}")
    # Without the recipe's quantisation: merging into quantised weights would lose precision.
    policy = load_run(run, device, dtype, trust_remote_code=trusted)
    rows = _rows(recipe, tokenizer, policy)
    with policy.reference():
        base = logps_of(policy.causal, rows, dtype)
    adapted = logps_of(policy.causal.eval(), rows, dtype)
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_torn(target.parent, f".{glob.escape(target.name)}.*.tmp")
    with temporary_folder(target) as folder:
        save_merged(merge_adapter(policy), folder, tokenizer)
        # One model at a time: the check needs no more memory than the merge.
        del policy
        saved = load_merged(folder, device, trust_remote_code=trusted).eval()
        agreement = Agreement.of(base, adapted, logps_of(saved, rows, dtype), dtype)
        agreement.check()
        folder.replace(target)
    return agreement


def _rows(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, policy: Policy) -> list[list[int]]:
    """Return token ids for the check: of the run's data, or random ones if the data cannot be read."""
    try:
        texts = list(islice(iter_texts(recipe, build_task(recipe).rows), TEXTS))
    except UserError as error:
        console.note(f"the run's data cannot be read: {error.message}; the check uses random tokens")
        texts = []
    rows = [list(tokenizer(text)["input_ids"])[:TOKENS] for text in texts]
    if enough := [row for row in rows if len(row) > 1]:
        return enough
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, int(policy.causal.config.vocab_size), (4, 64), generator=draw).tolist()


def _report(recipe: Recipe, target: Path, dtype: torch.dtype, agreement: Agreement, *, json_output: bool) -> None:
    if recipe.quantization is not None:
        console.note(
            "the adapter was trained on quantised weights; on the original weights its output is slightly different"
        )
    console.say(
        f"check: on {agreement.tokens:,} tokens the merged model differs from base and adapter by "
        f"{agreement.error:.1e} nats per token (allowed: {agreement.allowed:.1e}; "
        f"effect of the adapter: {agreement.effect:.1e})"
    )
    if agreement.loses_much:
        console.warn(
            f"rounding to {_name(dtype)} loses a large part of the effect of this adapter; "
            "use --dtype float32, or use base and adapter without merging"
        )
    if json_output:
        numbers = {"error": agreement.error, "allowed": agreement.allowed, "effect": agreement.effect}
        console.emit(json.dumps({"output": str(target), "dtype": _name(dtype), **numbers, "tokens": agreement.tokens}))
    else:
        console.say(
            f"done: {target} ({_name(dtype)}); load it with AutoModelForCausalLM.from_pretrained({str(target)!r})"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

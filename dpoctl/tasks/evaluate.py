"""`dpoctl eval RUN`: the finished model on held-out data, against its reference, with a confidence interval."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from dpoctl import console
from dpoctl.core.logps import Scorer
from dpoctl.core.loop import EvalSet, Metrics, evaluate
from dpoctl.core.losses import Item
from dpoctl.core.objective import Objective
from dpoctl.core.planner import Lengths, Plan
from dpoctl.core.reader import Reader
from dpoctl.data.sources import has_splits
from dpoctl.data.store import TokenStore
from dpoctl.errors import UsageError
from dpoctl.model.load import load_policy
from dpoctl.model.policy import Policy
from dpoctl.model.probe import probe
from dpoctl.recipe import Recipe
from dpoctl.runs.files import to_json, write_atomically
from dpoctl.runs.report import refresh_report
from dpoctl.tasks.finished import FinishedRun, recipe_of, require_known_start, require_model
from dpoctl.tasks.judge import wilson_interval
from dpoctl.tasks.machine import build_accelerator, quiet_libraries, token_budget
from dpoctl.tasks.prepared import metric_names, read_data
from dpoctl.tasks.reference import Columns, Reference, with_columns
from dpoctl.tasks.samples import FOLDER, Sample, sample_finished, show, write
from dpoctl.tasks.task import build_task


def run(run: Path, *, data: str | None = None, limit: int | None = None, json_output: bool = False) -> None:
    """Evaluate a finished run on its own evaluation sets, or on other data.

    Args:
        run: the run directory.
        data: a file or hub id instead of the recipe's evaluation sets.
        limit: use no more rows than this of each set.
        json_output: print one JSON object.
    """
    quiet_libraries()
    recipe = _recipe_of(run, data)
    accelerator = build_accelerator(recipe)
    tokenizer, prepared = read_data(recipe, accelerator, only_eval=True)
    tables = {}
    if build_task(recipe).needs_reference:
        require_known_start(run, recipe)
        _say_where_the_reference_stood(recipe)
        tables = _reference_tables(recipe, accelerator, tokenizer, prepared.evals, limit)
    # Stored as in training: all weights in float32, or a frozen base in the dtype of the computation.
    finished = FinishedRun.load(run, accelerator.device, torch.float32 if recipe.lora is None else None)
    results = _evaluate(finished.policy, recipe, accelerator, tokenizer, prepared.evals, tables, limit)
    sampled, samples = sample_finished(finished, recipe, accelerator, prepared.evals, limit)
    if not accelerator.is_main_process:
        return
    main = results.pop("eval", {})
    report: dict[str, Any] = {"run": str(run), **main, **({"sets": results} if results else {}), **sampled}
    if samples:
        write(run / FOLDER / "eval.jsonl", samples, {})
    write_atomically(run / "eval.json", to_json(report))
    refresh_report(run)
    if json_output:
        console.emit(json.dumps(report))
    else:
        _show({**({"eval": main} if main else {}), **results})
        _show_samples(samples, sampled)


def _recipe_of(run: Path, data: str | None) -> Recipe:
    """Read the recipe of a finished run, with its evaluation data replaced if asked for."""
    recipe = recipe_of(run)
    require_model(run)
    if data is not None:
        source = {"path": data} | ({"split": "test"} if has_splits(data) else {})
        evals, cadence = json.dumps({"eval": [source]}), recipe.training.eval_steps or 1
        return recipe_of(run, [f"data.eval={evals}", "data.eval_size=null", f"training.eval_steps={cadence}"])
    if not recipe.data.eval and recipe.data.eval_size is None:
        raise UsageError(f"{run}: its recipe has no evaluation data", hint="name some with --data FILE")
    return recipe


def _say_where_the_reference_stood(recipe: Recipe) -> None:
    if recipe.dpo.reference.sync_steps is not None:
        console.note("the reference moved in training; the model is compared with the one that training started from")


def _reference_tables(
    recipe: Recipe,
    accelerator: Accelerator,
    tokenizer: PreTrainedTokenizerBase,
    stores: Mapping[str, TokenStore],
    limit: int | None,
) -> dict[str, Columns]:
    """Return the reference's log-probabilities of every evaluation set; the model is freed again."""
    policy = load_policy(recipe, tokenizer, accelerator.device)
    with accelerator.autocast():
        verdict = probe(policy.causal, max_length=recipe.data.max_length)
    reference = Reference(recipe, policy, verdict, accelerator, build_task(recipe).needs)
    pad = int(tokenizer.pad_token_id or 0)
    tables = {}
    for name, store in stores.items():
        budget, _ = token_budget(recipe, policy, Lengths.of(store), accelerator)
        tables[name] = reference.table(Reader(store, verdict.layout, accelerator.device, pad), budget, limit)
    return tables


def _evaluate(
    policy: Policy,
    recipe: Recipe,
    accelerator: Accelerator,
    tokenizer: PreTrainedTokenizerBase,
    stores: Mapping[str, TokenStore],
    tables: Mapping[str, Columns],
    limit: int | None,
) -> dict[str, dict[str, Any]]:
    """Return the metrics of every evaluation set."""
    task, device, pad = build_task(recipe), accelerator.device, int(tokenizer.pad_token_id or 0)
    results = {}
    with accelerator.autocast():
        verdict = probe(policy.causal, max_length=recipe.data.max_length)
        scorer = Scorer(policy.model, policy.causal, verdict, confidence="confidence" in task.needs)
        objective = Objective(accelerator, scorer, task.terms, task.report, seed=recipe.training.seed)
        for name, store in stores.items():
            lengths = Lengths.of(store).first(limit)
            reader = Reader(store, verdict.layout, device, pad, names=metric_names(recipe, name))
            reader = with_columns(reader, tables.get(name))
            budget, _ = token_budget(recipe, policy, lengths, accelerator)
            batch_size = recipe.training.global_batch_size
            plan = Plan(lengths, batch_size, accelerator.num_processes, budget, verdict.layout)
            counts = {item: int(numbers.sum()) for item, numbers in lengths.items.items()}
            results[name] = _describe(evaluate(objective, EvalSet(reader, plan)), counts)
    return results


def _describe(metrics: Metrics, counts: Mapping[Item, int]) -> dict[str, Any]:
    """Add to the means how many items they are over, and what that leaves uncertain."""
    if "rewards/chosen" not in metrics:
        nats = metrics.get("nll_loss", metrics["loss"])
        return {**metrics, "perplexity": math.exp(nats), "num_tokens": counts["tokens"]}
    if "rewards/accuracies" not in metrics:
        return {**metrics, "num_records": counts["records"]}
    low, high = wilson_interval(metrics["rewards/accuracies"], counts["pairs"])
    return {**metrics, "rewards/accuracies_ci": [low, high], "num_pairs": counts["pairs"]}


def _show(results: Mapping[str, Mapping[str, Any]]) -> None:
    for name, metrics in results.items():
        table = Table(title=name, title_justify="left", box=None, show_header=False)
        for metric, value in metrics.items():
            if isinstance(value, list):
                continue
            interval = metrics.get(f"{metric}_ci")
            spread = f"  95 % interval {interval[0]:.4f} to {interval[1]:.4f}" if interval else ""
            table.add_row(metric, f"{value:,}" if isinstance(value, int) else f"{value:.4f}{spread}")
        console.say(table)


def _show_samples(samples: Sequence[Sample], numbers: Mapping[str, Any]) -> None:
    """Show the first samples, then what they are like on both sides."""
    if not samples:
        return
    show(samples, "samples")
    sides = ("reference", "policy")
    table = Table("", *sides, title=f"{numbers['samples']['num']:,} samples", title_justify="left", box=None)
    for name in ("finished", "distinct", "median_length"):
        table.add_row(name, *(f"{numbers['samples'][f'{name}_{side}']:g}" for side in sides))
    if judge := numbers.get("judge"):
        for category in sorted(judge["policy"], key=lambda name: name != judge["target"]):
            mark = " (target)" if category == judge["target"] else ""
            table.add_row(Text(category + mark), *(_interval(judge[side][category]) for side in sides))
    console.say(table)


def _interval(counted: Mapping[str, Any]) -> str:
    low, high = counted["ci"]
    return f"{counted['share']:.3f}  ({low:.3f} to {high:.3f})"

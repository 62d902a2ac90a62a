"""`dpoctl eval RUN`: evaluate a finished run on held-out data, against its reference, with confidence intervals."""

import gc
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from dpoctl import console
from dpoctl.core.loop import evaluate
from dpoctl.core.planner import Lengths
from dpoctl.data.pipeline import open_source
from dpoctl.data.prepare import PreparedData
from dpoctl.data.sources import has_splits
from dpoctl.data.store import TokenStore
from dpoctl.errors import SetupError, UsageError, writing
from dpoctl.losses import Item
from dpoctl.model.load import compute_dtype, load_policy, weight_dtype
from dpoctl.model.sharding import Sharding
from dpoctl.model.source import read_json
from dpoctl.recipe import Recipe
from dpoctl.recipe.data_section import Source
from dpoctl.recipe.eval_sections import BenchmarkSection
from dpoctl.runs.best import model_step
from dpoctl.runs.gates import check_gates
from dpoctl.runs.metrics import STANDARD_ERROR
from dpoctl.runs.model_card import refresh_card
from dpoctl.runs.names import RESOLVED_RECIPE
from dpoctl.runs.record_values import RecordValues
from dpoctl.runs.report import NAME as REPORT
from dpoctl.runs.report import refresh_report
from dpoctl.runs.results import Provenance, fingerprint, in_words, write_result
from dpoctl.runs.statistics import Z
from dpoctl.runs.text_metrics import DIFFERENCE, NUMBERS, SIDES
from dpoctl.runs.verdicts import share_difference
from dpoctl.tasks.baselines import Baseline, reference_overrides
from dpoctl.tasks.benchmarks import check_benchmarks, run_benchmarks
from dpoctl.tasks.earlier_step import with_model
from dpoctl.tasks.eval_samples import Writers, judge_of, sample_finished
from dpoctl.tasks.extensions import recorded_extensions
from dpoctl.tasks.finished_run import (
    STEP,
    FinishedRun,
    home_of,
    is_model_only,
    model_recipe,
    recipe_of,
    require_known_start,
    require_model,
)
from dpoctl.tasks.judging import judge_verdicts
from dpoctl.tasks.pair_groups import ACCURACY, accuracy_by_group, accuracy_of
from dpoctl.tasks.record_values import RecordWatch
from dpoctl.tasks.reference import Columns, Reference, with_columns
from dpoctl.tasks.samples import Sample, show, to_lines
from dpoctl.tasks.served import Client
from dpoctl.tasks.setup import Setup, build_accelerator, quiet_libraries, read_data
from dpoctl.tasks.sharding import WHOLE_EVAL, choose_eval_sharding, refuse_undividable
from dpoctl.tasks.task import build_task

Stores = Mapping[str, TokenStore]
DEMONSTRATIONS = {
    *("messages", "sharegpt", "alpaca", "capybara-conversation", "prompt-completion", "prompt-response", "text")
}
"""Formats without pairs: a model without a recipe is measured by its likelihood on them."""


def run(
    run: Path,
    *,
    data: str | None = None,
    limit: int | None = None,
    json_output: bool = False,
    overrides: Sequence[str] = (),
    repeats: int = 1,
    served: Client | None = None,
    baseline: Baseline | None = None,
    output: Path | None = None,
) -> bool:
    """Evaluate a finished run on its own eval sets, or on other data.

    Args:
        run: the run directory.
        data: a file, folder or hub id to use instead of the recipe's eval sets.
        limit: use only the first rows of each set.
        json_output: print one JSON object.
        overrides: `key=value` texts that replace values of the recipe's section `eval`.
        repeats: draw and judge all texts so often, for the noise of the evaluation itself.
        served: a server that has the same model, and writes its texts.
        baseline: what the run is compared with; None for its reference.
        output: the folder that keeps the result of a model that no run describes, in `evals/`.

    Returns:
        Whether all gates of the recipe passed; True on ranks that print nothing.
    """
    quiet_libraries()
    run = with_model(run)
    check_output(output, run)
    recipe = _recipe_of(run, data, overrides)
    if changes := reference_overrides(run, recipe, baseline):
        recipe = _recipe_of(run, data, overrides, changes)
    check_benchmarks(recipe.eval.benchmarks, has_baseline=baseline is not None)
    judge = judge_of(recipe.eval)
    accelerator = build_accelerator(recipe)
    tokenizer, prepared = read_data(recipe, accelerator, only_eval=True)
    sharding = _sharding(run, recipe, accelerator, tokenizer, baseline)
    tables = _reference_tables(run, recipe, accelerator, tokenizer, prepared.evals, limit, sharding)
    finished = _load(run, recipe, accelerator, sharding)
    setup = Setup.of(recipe, accelerator, finished.tokenizer, finished.policy, sharding=sharding)
    results, values = _evaluate(setup, prepared, tables, limit)
    writers = Writers(served, _opponent(baseline, recipe, accelerator, sharding), repeats)
    sampled, samples = sample_finished(setup, finished, prepared.evals, limit, judge=judge, writers=writers)
    if not accelerator.is_main_process:
        return True
    is_compared = bool(tables) or any(one.reference is not None for one in samples)
    against = baseline.name if baseline is not None else _baseline(recipe) if is_compared else None
    origin = _origin(run, prepared, limit, settings_of(overrides, repeats, served), against, is_own=data is None)
    origin = replace(origin, official=origin.official and baseline is None)
    report = _report(origin, results, sampled) | _benchmarks(finished, recipe.eval.benchmarks)
    gates = check_gates(report, recipe.eval.gates)
    report |= {"gates": [gate.to_dict() for gate in gates]} if gates else {}
    folder = output if is_model_only(run) else home_of(run)
    where = keep_result(run, folder, origin, report, to_lines(samples), values)
    show_result(report, results, samples, sampled, [*map(str, gates), where], as_json=json_output)
    return all(gate.passed for gate in gates)


def _report(origin: Provenance, results: Mapping[str, Mapping[str, Any]], sampled: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a result says of the eval sets and of the samples; the metrics of the set `eval` are at its root."""
    sets = {name: value for name, value in results.items() if name != "eval"}
    return {**origin.to_dict(), **results.get("eval", {}), **({"sets": sets} if sets else {}), **sampled}


def settings_of(overrides: Sequence[str], repeats: int, served: Client | None) -> list[str]:
    """Return what of a command line changes the numbers of its result; gates change none."""
    settings = [text for text in overrides if not text.startswith("eval.gates=")]
    settings += [f"repeats={repeats}"] if repeats > 1 else []
    return [*settings, *([f"texts of {served.endpoint.name}"] if served else [])]


def show_result(
    report: Mapping[str, Any],
    results: Mapping[str, Mapping[str, Any]],
    samples: Sequence[Sample],
    sampled: Mapping[str, Any],
    last: Sequence[str],
    *,
    as_json: bool,
) -> None:
    """Print a result as JSON, or as tables, what they allow to say, and the last lines."""
    if as_json:
        console.emit(json.dumps(report))
        return
    console.say(in_words(report))
    _show(results)
    _show_samples(samples, sampled)
    if (benchmarks := report.get("benchmarks")) is not None:
        _show_benchmarks(benchmarks)
    for line in (*verdicts(results, sampled.get("judge")), *last):
        console.say(line)


def _benchmarks(finished: FinishedRun, benchmarks: Sequence[BenchmarkSection]) -> dict[str, Any]:
    """Run benchmarks on the policy, and on its reference if there is one."""
    if not benchmarks:
        return {}
    reference = None if is_model_only(finished.path) else finished.reference()
    causal, tokenizer = finished.policy.causal, finished.tokenizer
    return {"benchmarks": run_benchmarks(benchmarks, tokenizer, causal, reference)}


def check_output(output: Path | None, run: Path | None = None) -> None:
    """Refuse a folder for results that is not needed, or that belongs to something else.

    Raises:
        UsageError: RUN keeps its results itself, or the folder is a run or a file.
    """
    if output is None:
        return
    if run is not None and not is_model_only(run):
        raise UsageError("--output-dir: a run keeps its results itself", hint="leave it out")
    if (output / RESOLVED_RECIPE).is_file():
        raise UsageError(f"--output-dir: {output} is a run, and keeps its own results only", hint="name another folder")
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output-dir: {output} is not a folder", hint="name another one")


def keep_result(
    name: Path | str,
    folder: Path | None,
    origin: Provenance,
    report: Mapping[str, Any],
    samples: str,
    values: Mapping[str, RecordValues],
) -> str:
    """Write a result into a folder, if there is one, and say where; a run has pages that show it, too."""
    if folder is None:
        return f"{name} belongs to no run, so the result is not saved: save it with --output-dir DIR, or use --json"
    with writing(folder):
        said = f"result: {write_result(folder, origin, report, samples, values)}"
    if not (folder / RESOLVED_RECIPE).is_file():
        return said
    refresh_report(folder)
    refresh_card(folder)
    return f"{said}; report: {folder / REPORT}"


def _origin(
    run: Path,
    prepared: PreparedData,
    limit: int | None,
    settings: Sequence[str],
    against: str | None,
    *,
    is_own: bool,
) -> Provenance:
    """Return the origin of the numbers; the run's own data are those that its training evaluated on."""
    trained_on = _trained_keys(home_of(run))
    earlier = STEP.fullmatch(run.name)
    data = {}
    for name, store in prepared.evals.items():
        sources = [source["path"] for source in prepared.report["evals"][name]["sources"]]
        used = len(store) if limit is None else min(limit, len(store))
        data[name] = {"sources": sources, "key": store.key, "records": used}
        if is_own and trained_on.get(name, store.key) != store.key:
            is_own = False
            console.warn(f"{name}: {', '.join(sources)} gives other rows than in training: this is another eval set")
    return Provenance(
        run=str(run),
        model=fingerprint(run),
        step=int(earlier[1]) if earlier else model_step(run),
        data=data,
        limit=limit,
        baseline=against,
        official=is_own and limit is None and not settings and (run / RESOLVED_RECIPE).is_file(),
        settings=tuple(settings),
    )


def _trained_keys(run: Path) -> dict[str, Any]:
    """Return the keys of the tokens of the eval sets that a run was evaluated on in training, by name."""
    path = run / "data_report.json"
    if not path.is_file():
        return {}
    evals = read_json(path).get("evals")
    if evals is not None and not (isinstance(evals, dict) and all(isinstance(one, dict) for one in evals.values())):
        raise SetupError(f"'{path}' is not as `dpoctl` wrote it: evals is no table of eval sets", hint="restore it")
    return {name: one["key"] for name, one in (evals or {}).items() if "key" in one}


def _baseline(recipe: Recipe) -> str:
    """Name the model that the policy is compared with."""
    if recipe.method == "dpo" and recipe.dpo.reference.path is not None:
        return recipe.dpo.reference.path
    model = recipe.model
    if model.model_name_or_path is None:
        return "the new model before training"
    return model.model_name_or_path + (f"@{model.revision}" if model.revision else "")


def _sharding(
    run: Path,
    recipe: Recipe,
    accelerator: Accelerator,
    tokenizer: PreTrainedTokenizerBase,
    baseline: Baseline | None,
) -> Sharding | None:
    """Decide whether to divide the models of an evaluation over the ranks.

    Raises:
        UsageError: they have to be divided, and something that is asked for cannot be done then.
    """
    other = None if baseline is None else baseline.folder
    has_reference = baseline is None and not is_model_only(run)
    # The reference of an adapter is in the same model, and that of other weights is needed beside them for texts only.
    writes_beside = recipe.eval.samples is not None and (other is not None or (has_reference and recipe.lora is None))
    is_pair = writes_beside or (recipe.method == "dpo" and recipe.dpo.reference.path is not None)
    is_known = not recorded_extensions(home_of(run)).get("model_init")
    sharding = choose_eval_sharding(recipe, accelerator, tokenizer, models=2 if is_pair else 1, is_known=is_known)
    if sharding is None:
        return None
    if recipe.eval.benchmarks:
        raise UsageError(
            "eval.benchmarks: one process runs them, and it holds only a part of a sharded model",
            hint="leave them out with --set 'eval.benchmarks=[]', or use one process",
        )
    if other is not None:
        theirs = recipe_of(other)
        refuse_undividable(theirs, compute_dtype(theirs, accelerator.device), WHOLE_EVAL)
    return sharding


def _load(run: Path, recipe: Recipe, accelerator: Accelerator, sharding: Sharding | None) -> FinishedRun:
    """Load a run, ready to be divided over the ranks if it is to be."""
    dtype = weight_dtype(recipe, compute_dtype(recipe, accelerator.device))
    if sharding is not None:
        # The accelerator keeps the parts of the model that gave the reference's numbers, and their hooks are cycles.
        accelerator.free_memory()
        gc.collect()
    finished = FinishedRun.load(run, accelerator.device, dtype, lazy=sharding is not None)
    if sharding is not None and recipe.eval.samples is not None:
        finished.load_reference_adapter()
    return finished


def _opponent(
    baseline: Baseline | None, recipe: Recipe, accelerator: Accelerator, sharding: Sharding | None
) -> Client | FinishedRun | None:
    """Return what writes the texts of a baseline."""
    if baseline is None or baseline.folder is None or recipe.eval.samples is None:
        return None if baseline is None else baseline.client
    dtype = weight_dtype(recipe, compute_dtype(recipe, accelerator.device))
    return FinishedRun.load(baseline.folder, accelerator.device, dtype, lazy=sharding is not None)


def refuse_other_sections(overrides: Sequence[str]) -> None:
    """Refuse values of sections that an evaluation cannot change.

    Raises:
        UsageError: there is one.
    """
    for text in overrides:
        if not text.startswith("eval."):
            raise UsageError(
                f"--set {text.partition('=')[0]}: an evaluation can only change keys of the section eval",
                hint="for example --set eval.samples.num=100",
            )


def _recipe_of(run: Path, data: str | None, overrides: Sequence[str], changed: Sequence[str] = ()) -> Recipe:
    """Read the recipe of a finished run; replace its eval data if other data are given, and what else is asked for.

    Raises:
        UsageError: the run or its eval data are missing, or an override is about another section than `eval`.
    """
    refuse_other_sections(overrides)
    recipe = recipe_of(run)
    require_model(run)
    if data is not None:
        source = {"path": data} | ({"split": "test"} if has_splits(data) else {})
        evals, cadence = json.dumps({"eval": [source]}), recipe.training.eval_steps or 1
        changes = [f"data.eval={evals}", "data.eval_size=null", f"training.eval_steps={cadence}"]
        changes += [*overrides, *changed]
        if is_model_only(run):
            format = open_source(Source.model_validate(source))[0].format
            method = "sft" if format in DEMONSTRATIONS else "dpo"
            return model_recipe(run, method=method, overrides=changes)
        return recipe_of(run, changes)
    if is_model_only(run):
        raise UsageError(f"{run} is a model that no run describes: it has no eval data", hint="pass --data SOURCE")
    if not recipe.data.eval and recipe.data.eval_size is None:
        raise UsageError(f"{run}: its recipe has no eval data", hint="pass some with --data SOURCE")
    return recipe_of(run, [*overrides, *changed]) if overrides or changed else recipe


def _reference_tables(
    run: Path,
    recipe: Recipe,
    accelerator: Accelerator,
    tokenizer: PreTrainedTokenizerBase,
    stores: Stores,
    limit: int | None,
    sharding: Sharding | None,
) -> dict[str, Columns]:
    """Return the reference's log-probabilities of every eval set, if they are needed; the model is freed at the end."""
    if not build_task(recipe).needs_reference:
        return {}
    require_known_start(run, recipe)
    if recipe.dpo.reference.sync_steps is not None:
        console.note("the reference moved in training; here it is the model that training started from")
    if is_model_only(run):
        # Against another model, which the recipe names; an adapter has no recipe that says how to train it.
        policy = _load(run, recipe, accelerator, sharding).policy
    else:
        policy = load_policy(recipe, tokenizer, accelerator.device, lazy=sharding is not None)
    setup = Setup.of(recipe, accelerator, tokenizer, policy, sharding=sharding)
    reference = Reference(setup)
    return {
        name: reference.table(
            setup.reader(store, name), setup.reading_tokens(Lengths.of(store)), np.arange(len(store))[:limit]
        )
        for name, store in stores.items()
    }


def _evaluate(
    setup: Setup, prepared: PreparedData, tables: Mapping[str, Columns], limit: int | None
) -> tuple[dict[str, dict[str, Any]], dict[str, RecordValues]]:
    """Return the metrics of every eval set, and those of each of its records."""
    results, values, stores = {}, {}, prepared.evals
    sources = {name: [source["path"] for source in prepared.report["evals"][name]["sources"]] for name in stores}
    with setup.accelerator.autocast():
        objective = setup.objective(setup.scorer())
        for name, store in stores.items():
            lengths = Lengths.of(store).first(limit)
            reader = with_columns(setup.reader(store, name), tables.get(name))
            counts = {item: int(numbers.sum()) for item, numbers in lengths.items.items()}
            watch, one_pass = RecordWatch(setup.task), setup.plan(lengths).one_pass(lengths)
            metrics = evaluate(objective, reader, one_pass, watch=watch)
            values[name] = watch.values(store)
            results[name] = _describe(metrics, counts, values[name])
            groups = accuracy_by_group(values[name], store, sources[name])
            results[name] |= {"groups": groups} if groups else {}
    return results, values


def _describe(metrics: Mapping[str, Any], counts: Mapping[Item, int], values: RecordValues) -> dict[str, Any]:
    """Add the number of items and the confidence intervals to the mean metrics."""
    if (error := metrics.get(f"loss{STANDARD_ERROR}")) is not None:
        metrics = {**metrics, "loss_ci": [metrics["loss"] - Z * error, metrics["loss"] + Z * error]}
    if "rewards/chosen" not in metrics:
        nats = metrics.get("nll_loss", metrics["loss"])
        return {**metrics, "perplexity": math.exp(nats), "num_tokens": counts["tokens"]}
    if ACCURACY not in metrics:
        return {**metrics, "num_records": counts["records"]}
    return {**metrics, **accuracy_of(values).named(ACCURACY), "num_pairs": counts["pairs"]}


def _show(results: Mapping[str, Mapping[str, Any]]) -> None:
    for name, metrics in results.items():
        table = Table(title=name, title_justify="left", box=None, show_header=False)
        for metric, value in metrics.items():
            if isinstance(value, list | dict | str) or metric.endswith(STANDARD_ERROR):
                continue
            interval = metrics.get(f"{metric}_ci")
            spread = f"  95 % interval {interval[0]:.4f} to {interval[1]:.4f}" if interval else ""
            table.add_row(metric, f"{value:,}" if isinstance(value, int) else f"{value:.4f}{spread}")
        for column, groups in metrics.get("groups", {}).items():
            for value, found in groups.items():
                low, high = found["rewards/accuracies_ci"]
                interval = f"  95 % interval {low:.4f} to {high:.4f}, {found['num_pairs']:,} pairs"
                table.add_row(Text(f"accuracy, {column} {value}"), f"{found['rewards/accuracies']:.4f}{interval}")
        console.say(table)


def _show_benchmarks(benchmarks: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    table = Table("", "reference", "policy", "difference", title="benchmarks", title_justify="left", box=None)
    for task, metrics in benchmarks.items():
        for metric, one in metrics.items():
            spread = f"  ({one['delta_ci'][0]:+.4f} to {one['delta_ci'][1]:+.4f})" if "delta_ci" in one else ""
            cells = (f"{one[side]:.4f}" if side in one else "" for side in ("reference", "policy"))
            delta = f"{one['delta']:+.4f}{spread}" if "delta" in one else ""
            table.add_row(Text(f"{task} {metric}"), *cells, delta)
    console.say(table)


def verdicts(results: Mapping[str, Mapping[str, Any]], judge: Mapping[str, Any] | None) -> Iterator[str]:
    """Say in words whether training helped: what the intervals of accuracies and of the judge's shares allow.

    Args:
        results: the metrics of every eval set.
        judge: the shares of each category among the answers of reference and policy, and the target; or the numbers
            of a judge that compares.
    """
    for name, metrics in results.items():
        if (interval := metrics.get("rewards/accuracies_ci")) is None:
            continue
        of = "" if name == "eval" else f" of {name}"
        share = f"the chosen answer has the higher reward in {metrics['rewards/accuracies']:.1%} of the pairs{of}"
        if metrics["rewards/margins"] == metrics["rewards/accuracies"] == 0:
            yield f"verdict: no reward{of} differs from another: the policy is its reference"
        else:
            yield f"verdict: {share}, {_compared(interval, 0.5, 'chance')}"
    if judge is not None and "type" in judge:
        yield from judge_verdicts(judge)
    elif judge is not None and "reference" in judge:
        target = judge["target"]
        before, after = (judge[side][target] for side in ("reference", "policy"))
        change = f"{target} answers {before['share']:.1%} -> {after['share']:.1%}"
        yield f"verdict: {change}, {_compared(share_difference(before, after), 0.0, 'chance')}"


def _compared(interval: Sequence[float], value: float, what: str) -> str:
    low, high = interval
    if low <= value <= high:
        return f"which {what} would explain too"
    return f"{'more' if low > value else 'less'} than {what} explains"


def _show_samples(samples: Sequence[Sample], numbers: Mapping[str, Any]) -> None:
    """Show the first samples, then the statistics of all samples of both models."""
    if not samples:
        return
    show(samples, "samples")
    found = numbers["samples"]
    title = f"{found['num']:,} samples, lengths in words"
    sides = [side for side in SIDES if any(f"{name}_{side}" in found for name in NUMBERS)]
    table = Table("", *sides, *([DIFFERENCE] if len(sides) > 1 else []), title=title, title_justify="left", box=None)
    for name in NUMBERS:
        cells = [_text_number(name, found, side) for side in sides]
        if any(cells):
            table.add_row(name, *cells, *([_text_number(name, found, DIFFERENCE, sign="+")] if len(sides) > 1 else []))
    if "kl" in numbers:
        # A single prompt has no interval.
        spread = "  ({:.4f} to {:.4f})".format(*numbers["kl_ci"]) if "kl_ci" in numbers else ""
        table.add_row("kl per token", *[""] * (len(sides) - 1), f"{numbers['kl']:.4f}{spread}")
    judge = numbers.get("judge")
    if judge and "type" not in judge:
        for category in sorted(judge["policy"], key=lambda name: name != judge["target"]):
            mark = " (target)" if category == judge["target"] else ""
            cells = [_interval(judge[side][category]) if side in judge else "" for side in sides]
            table.add_row(Text(category + mark), *cells)
    console.say(table)


def _text_number(name: str, numbers: Mapping[str, Any], side: str, sign: str = "") -> str:
    """Write a number of the texts of a side, with its interval if it has one."""
    if (value := numbers.get(f"{name}_{side}")) is None:
        return ""
    form = sign + {"length": ".1f", "median_length": ".4g", "distinct": ".4g"}.get(name, ".3f")
    interval = numbers.get(f"{name}_{side}_ci")
    return f"{value:{form}}" + (f"  ({interval[0]:{form}} to {interval[1]:{form}})" if interval else "")


def _interval(counted: Mapping[str, Any]) -> str:
    low, high = counted["ci"]
    return f"{counted['share']:.3f}  ({low:.3f} to {high:.3f})"

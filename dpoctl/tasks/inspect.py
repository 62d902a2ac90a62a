"""`dpoctl inspect` and `--dry-run`: training rows as the model sees them, checks of the rows, and the training plan.

No weights are loaded, and a dry run writes nothing.
"""

import json
from collections import Counter
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dpoctl import console
from dpoctl.core.planner import Lengths
from dpoctl.core.schedule import warmup_steps
from dpoctl.data.cache import cache_dir
from dpoctl.data.prepare import PreparedData, iter_texts, prepare
from dpoctl.data.preview import CHECKS, RecordCheck, Verifier, decode_runs, mask_preview, name_of, show_record
from dpoctl.data.row_report import TEMPLATE_NOTES, announce_split_template
from dpoctl.data.store import TokenStore
from dpoctl.errors import UsageError
from dpoctl.model.tokenizer import load_tokenizer, stop_tokens
from dpoctl.recipe.advice import advise, show_warnings
from dpoctl.recipe.consistency import resolved_yaml
from dpoctl.recipe.document import Document
from dpoctl.recipe.schema import Recipe
from dpoctl.tasks.check import facts_of
from dpoctl.tasks.plan import Forecast, Target, as_lines, as_numbers, forecast_of, refuse
from dpoctl.tasks.setup import quiet_libraries, read_data, training_plan
from dpoctl.tasks.task import build_task

CHECKED = 1000
"""Number of records that the checks of a set use, evenly spaced."""
WIDTH = 120
ROWS_SHOWN = 2
PLAN_NAMES = {"rows": "rows used", "dropped": "rows dropped"}


def run(recipe: Recipe, *, row: int | None = None, rows: int = 2, ids: bool = False, json_output: bool = False) -> None:
    """Print records of the training set, and check them and a sample of the set.

    Args:
        recipe: checked and complete.
        row: show only this record; the first one is 1.
        rows: show this many records from the start, if `row` is None.
        ids: show token ids too.
        json_output: print one JSON object.

    Raises:
        UsageError: there is no such row.
    """
    quiet_libraries()
    wants = build_task(recipe).rows
    tokenizer = load_tokenizer(recipe, lambda: iter_texts(recipe, wants))
    stops = stop_tokens(recipe, tokenizer)
    data = prepare(recipe, tokenizer, cache_dir=cache_dir(), wants=wants, stops=stops)
    store = data.train
    if row is not None and row > len(store):
        raise UsageError(f"--row {row}: the training set has only {len(store):,} rows")
    indices = [row - 1] if row is not None else list(range(min(rows, len(store))))
    loss_on = recipe.sft.loss_on if recipe.method == "sft" else recipe.dpo.loss_on
    verifier = Verifier(tokenizer, recipe.data.chat_template_kwargs, stops, loss_on)
    checks = verifier.verify(store, indices)
    sample = sorted({int(index) for index in np.linspace(0, len(store) - 1, CHECKED)})
    summary = _summary(recipe, data, verifier.verify(store, sample))
    announce_split_template("train", data.report["train"])
    if json_output:
        shown = [_as_json(store, tokenizer, *pair, ids=ids) for pair in zip(indices, checks, strict=True)]
        console.emit(json.dumps({"records": shown, "set": summary}, ensure_ascii=False))
        return
    for index, check in zip(indices, checks, strict=True):
        console.emit_styled(show_record(store, tokenizer, index, boxes=True, ids=ids), width=WIDTH)
        console.emit(f"{_check_lines(check)}\n")
    _emit_summary(summary)


def show_plan(
    recipe: Recipe,
    *,
    document: Document | None = None,
    json_output: bool = False,
    verbose: bool = False,
    processes: int = 1,
) -> None:
    """Print the training plan, token statistics, and some rows with their masks, all on stdout.

    Args:
        recipe: checked and complete.
        document: the recipe's YAML, for the lines in the advice.
        json_output: print the numbers and the advice as one JSON object.
        verbose: print the recipe with every default, too.
        processes: their number.
    """
    tokenizer, data = read_data(recipe)
    advice = advise(recipe, document, facts_of(recipe, tokenizer, data))
    numbers = _plan_numbers(recipe, data)
    forecast = forecast_of(recipe, tokenizer, data, Target.of("auto", processes))
    if json_output:
        with_recipe = {"recipe": yaml.safe_load(resolved_yaml(recipe))} if verbose else {}
        numbers["forecast"] = {"memory": {"fits": True}} if _is_rough(forecast) else as_numbers(recipe, forecast)
        console.emit(json.dumps({**numbers, "advice": [one.to_dict() for one in advice], **with_recipe}))
        return
    console.emit(f"plan of a run in {numbers.pop('output_dir')}")
    tokens = numbers.pop("tokens")
    for name, value in numbers.items():
        console.emit(f"{PLAN_NAMES.get(name, name.replace('_', ' '))}: {_in_words(value)}")
    console.emit(f"tokens: {tokens.pop('total'):,} per epoch; a shared prompt counts once")
    for name, value in tokens.items():
        console.emit(f"  {name}: {_in_words(value)}")
    _emit_forecast(recipe, tokenizer, data, forecast)
    console.emit("")
    console.emit_styled(mask_preview(data.train, tokenizer, rows=ROWS_SHOWN), width=WIDTH)
    if verbose:
        console.emit(f"\nthe recipe with every default:\n{resolved_yaml(recipe)}", end="")
    show_warnings(advice)
    console.say(f"dry run: nothing was trained, and nothing was written to {recipe.training.output_dir}")


def _is_rough(forecast: Forecast) -> bool:
    """Whether an estimate says little more than that the run fits."""
    return forecast.estimate.footprint.method == "formula" and forecast.estimate.fits


def _emit_forecast(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, data: PreparedData, forecast: Forecast) -> None:
    """Print memory, work and time of a run on this machine; of one that does not fit, what would make it fit."""
    if _is_rough(forecast):
        console.emit("memory: it fits; the model is too small, or too unusual, for more than a rough estimate")
        return
    for line in as_lines(recipe, forecast):
        console.emit(line)
    try:
        refuse(recipe, tokenizer, data, forecast)
    except UsageError as error:
        console.warn(str(error))


def _summary(recipe: Recipe, data: PreparedData, checks: list[RecordCheck]) -> dict[str, Any]:
    account = data.report["train"]
    passed, failed = Counter[str](), Counter[str]()
    for check in checks:
        for name, result in check.checks.items():
            passed[name] += result is True
            failed[name] += result is False
    return {
        "looked_at": len(checks),
        "checks": {name: {"passed": passed[name], "failed": failed[name]} for name in CHECKS},
        "template": account["template"],
        "eos_added": account["eos_added"],
        "tokens": account["tokens"],
        "max_length": recipe.data.max_length,
        "overlong": recipe.data.overlong,
        "too_long": account["rejected"].get("too_long", 0),
        "prompts_truncated": account["prompts_truncated"],
        "answers_truncated": account["answers_truncated"],
        "dropped": account["rejected"],
    }


def _as_json(
    store: TokenStore, tokenizer: PreTrainedTokenizerBase, index: int, check: RecordCheck, *, ids: bool
) -> dict[str, Any]:
    example, record = store.example(index), store.texts(index)
    responses = []
    for number, (suffix, flags) in enumerate(zip(example.suffixes, example.suffixes_scored, strict=True)):
        tokens = np.concatenate([example.shared, suffix]).tolist()
        scored = np.concatenate([example.shared_scored, flags]).tolist()
        runs = [{"text": run.text, "scored": run.kind} for run in decode_runs(tokenizer, tokens, scored)]
        details = {"ids": tokens, "scored": [int(flag) for flag in scored]} if ids else {}
        name = name_of(number, len(example.suffixes))
        responses.append({"name": name, "tokens": len(tokens), "scored_tokens": sum(scored), "runs": runs, **details})
    return {
        "row": index + 1,
        "file": record.source,
        "line": record.line,
        "responses": responses,
        "checks": check.checks,
        "notes": list(check.notes),
    }


def _check_lines(check: RecordCheck) -> str:
    marks = {True: "ok", False: "FAILED", None: "does not apply"}
    lines = [f"  {marks[result]}: {CHECKS[name]}" for name, result in check.checks.items()]
    return "\n".join(lines + [f"  note: {TEMPLATE_NOTES[note]}" for note in check.notes])


def _emit_summary(summary: dict[str, Any]) -> None:
    console.emit(f"training set, {summary['looked_at']:,} rows checked:")
    for name, counts in summary["checks"].items():
        total = counts["passed"] + counts["failed"]
        result = f"{counts['passed']:,} of {total:,}" if total else "does not apply"
        console.emit(f"  {result}: {CHECKS[name]}")
    tokens = summary["tokens"]
    for name in ("prompt", *(name for name in tokens if name not in ("prompt", "total", "scored"))):
        console.emit(f"  tokens of {name}: {_in_words(tokens[name])}")
    if summary["overlong"] == "truncate":
        effect = f"{summary['prompts_truncated']:,} prompts and {summary['answers_truncated']:,} answers are truncated"
    elif not summary["too_long"]:
        effect = "no row is longer"
    else:
        rows = "1 row is" if summary["too_long"] == 1 else f"{summary['too_long']:,} rows are"
        effect = f"{rows} longer and dropped; set data.overlong: truncate to shorten instead"
    console.emit(f"  data.max_length {summary['max_length']:,}: {effect}")


def _plan_numbers(recipe: Recipe, data: PreparedData) -> dict[str, Any]:
    training, lengths = recipe.training, Lengths.of(data.train)
    plan = training_plan(recipe, lengths)
    return {
        "method": recipe.method,
        "output_dir": recipe.training.output_dir,
        "rows": len(data.train),
        "eval_rows": {name: len(store) for name, store in data.evals.items()},
        "dropped": _dropped(data),
        "steps": plan.num_steps,
        "steps_per_epoch": plan.steps_per_epoch,
        "warmup_steps": warmup_steps(training, plan.num_steps),
        "global_batch_size": training.global_batch_size,
        "tokens": {"total": int(lengths.tokens.sum()), **_token_statistics(data.train)},
    }


def _dropped(data: PreparedData) -> dict[str, int]:
    """Count the rows of all sets that are not used, by reason."""
    accounts = [data.report["train"], *data.report["evals"].values()]
    return dict(sum((Counter(account["rejected"]) for account in accounts), Counter()))


def _token_statistics(store: TokenStore) -> dict[str, dict[str, int]]:
    rows = np.diff(store.response_start)
    per_row = np.repeat(store.shared_len, rows) + store.suffix_len
    statistics = {"row": _percentiles(per_row)}
    if store.pairs.size:
        statistics["chosen"], statistics["rejected"] = map(_percentiles, store.pair_lengths())
    else:
        statistics["scored"] = _percentiles(store.num_tokens)
    return statistics


def _percentiles(values: NDArray[np.int64]) -> dict[str, int]:
    return {f"p{p}": int(np.percentile(values, p, method="lower")) for p in (5, 50, 95)} | {"max": int(values.max())}


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {number:,}" for name, number in value.items()) or "none"
    return str(value)

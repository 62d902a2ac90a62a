"""`--dry-run`: what would be trained, on what, in how many steps; no weights are loaded and nothing is written."""

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpoctl import console
from dpoctl.core.optim import warmup_steps
from dpoctl.core.planner import Lengths, Plan
from dpoctl.data.prepare import PreparedData
from dpoctl.data.preview import mask_preview
from dpoctl.data.store import TokenStore
from dpoctl.recipe.advice import advise, show_warnings
from dpoctl.recipe.document import Document
from dpoctl.recipe.schema import Recipe
from dpoctl.tasks.check import facts_of
from dpoctl.tasks.prepared import read_data

ROWS_SHOWN = 2


def show_plan(recipe: Recipe, *, document: Document | None = None, json_output: bool = False) -> None:
    """Resolve the recipe, load and count the data, and show steps, batches, lengths and the masks of some rows.

    Args:
        recipe: checked and complete.
        document: where its keys stand, for advice.
        json_output: print the numbers as one JSON object instead.
    """
    if not json_output:
        console.say(recipe.to_yaml())
    tokenizer, data = read_data(recipe)
    show_warnings(advise(recipe, document, facts_of(recipe, tokenizer, data)))
    numbers = _numbers(recipe, data)
    if json_output:
        console.emit(json.dumps(numbers))
        return
    tokens = numbers.pop("tokens")
    for name, value in numbers.items():
        console.say(f"{name.replace('_', ' ')}: {_words(value)}")
    console.say(f"tokens: {tokens.pop('total'):,} an epoch, each prompt counted once")
    for name, value in tokens.items():
        console.say(f"  {name}: {_words(value)}")
    console.say(mask_preview(data.train, tokenizer, rows=ROWS_SHOWN))
    console.say(f"dry run: nothing was trained, and nothing written to {recipe.training.output_dir}")


def _numbers(recipe: Recipe, data: PreparedData) -> dict[str, Any]:
    training, lengths = recipe.training, Lengths.of(data.train)
    plan = Plan(lengths, training.global_batch_size, num_epochs=training.num_train_epochs, max_steps=training.max_steps)
    return {
        "method": recipe.method,
        "rows": len(data.train),
        "eval_rows": {name: len(store) for name, store in data.evals.items()},
        "rejected": data.report["rejected"],
        "steps": plan.num_steps,
        "steps_per_epoch": plan.steps_per_epoch,
        "warmup_steps": warmup_steps(training, plan.num_steps),
        "global_batch_size": training.global_batch_size,
        "tokens": {"total": int(lengths.tokens.sum()), **_token_statistics(data.train)},
    }


def _token_statistics(store: TokenStore) -> dict[str, dict[str, int]]:
    rows = np.diff(store.response_start)
    per_row = np.repeat(store.shared_len, rows) + store.suffix_len
    statistics = {"row": _percentiles(per_row)}
    if store.pairs.size:
        starts = np.repeat(store.response_start[:-1], np.diff(store.pair_start))
        statistics["chosen"] = _percentiles(store.num_tokens[starts + store.pairs[:, 0]])
        statistics["rejected"] = _percentiles(store.num_tokens[starts + store.pairs[:, 1]])
    else:
        statistics["scored"] = _percentiles(store.num_tokens)
    return statistics


def _percentiles(values: NDArray[np.int64]) -> dict[str, int]:
    return {f"p{p}": int(np.percentile(values, p, method="lower")) for p in (5, 50, 95)} | {"max": int(values.max())}


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {number:,}" for name, number in value.items()) or "none"
    return str(value)

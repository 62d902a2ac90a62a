"""`dpoctl inspect`: rows as the model sees them, and whether they are what it should learn; no weights are loaded."""

import io
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpoctl import console
from dpoctl.data.account import TEMPLATE_NOTES
from dpoctl.data.prepare import PreparedData, cache_dir, iter_texts, prepare
from dpoctl.data.preview import decode_runs, name_of, show_record
from dpoctl.data.store import TokenStore
from dpoctl.data.verify import CHECKS, Verdict, Verifier
from dpoctl.errors import UsageError
from dpoctl.model.source import find_source, read_json
from dpoctl.model.tokenizer import load_tokenizer
from dpoctl.recipe.schema import Recipe
from dpoctl.tasks.machine import quiet_libraries
from dpoctl.tasks.task import build_task

LOOK_AT = 1000
"""Records that the checks of a set are made on, evenly spread over it."""
WIDTH = 120


def run(recipe: Recipe, *, row: int | None = None, rows: int = 2, ids: bool = False, json_output: bool = False) -> None:
    """Show records of the training set, and check them and the set.

    Args:
        recipe: checked and complete.
        row: the one record to show, counted from 1.
        rows: how many records to show, the first ones, where no row is named.
        ids: show token ids too.
        json_output: print one JSON object instead.

    Raises:
        UsageError: there is no such row.
    """
    quiet_libraries()
    wants = build_task(recipe).rows
    tokenizer = load_tokenizer(recipe, lambda: iter_texts(recipe, wants))
    data = prepare(recipe, tokenizer, cache_dir=cache_dir(), wants=wants)
    store = data.train
    if row is not None and row > len(store):
        raise UsageError(f"--row {row}: the training set has {len(store):,} records")
    indices = [row - 1] if row is not None else list(range(min(rows, len(store))))
    verifier = Verifier(tokenizer, recipe.data.chat_template_kwargs, _stops(recipe))
    verdicts = verifier.verify(store, indices)
    looked_at = sorted({int(index) for index in np.linspace(0, len(store) - 1, LOOK_AT)})
    summary = _summary(recipe, data, verifier.verify(store, looked_at))
    if json_output:
        shown = [_as_json(store, tokenizer, *pair, ids=ids) for pair in zip(indices, verdicts, strict=True)]
        console.emit(json.dumps({"records": shown, "set": summary}, ensure_ascii=False))
        return
    for index, verdict in zip(indices, verdicts, strict=True):
        _emit(show_record(store, tokenizer, index, boxes=True, ids=ids))
        console.emit(f"{_words(verdict)}\n")
    _emit_summary(summary)


def _stops(recipe: Recipe) -> set[int] | None:
    """The ids that the model's own generation_config stops at, where the model is a folder that has one."""
    if recipe.model.model_name_or_path is None:
        return None
    source = find_source(recipe.model.model_name_or_path, revision=recipe.model.revision)
    path = Path(source.name) / "generation_config.json"
    if not path.is_file():
        return None
    found = read_json(path).get("eos_token_id")
    return None if found is None else set(found if isinstance(found, list) else [found])


def _summary(recipe: Recipe, data: PreparedData, verdicts: list[Verdict]) -> dict[str, Any]:
    account = data.report["train"]
    passed, failed = Counter[str](), Counter[str]()
    for verdict in verdicts:
        for name, result in verdict.checks.items():
            passed[name] += result is True
            failed[name] += result is False
    return {
        "looked_at": len(verdicts),
        "checks": {name: {"passed": passed[name], "failed": failed[name]} for name in CHECKS},
        "template": account["template"],
        "eos_added": account["eos_added"],
        "tokens": account["tokens"],
        "max_length": recipe.data.max_length,
        "overlong": recipe.data.overlong,
        "too_long": account["rejected"].get("too_long", 0),
        "prompts_truncated": account["prompts_truncated"],
        "answers_truncated": account["answers_truncated"],
        "rejected": account["rejected"],
    }


def _as_json(
    store: TokenStore, tokenizer: PreTrainedTokenizerBase, index: int, verdict: Verdict, *, ids: bool
) -> dict[str, Any]:
    example, record = store.example(index), store.texts(index)
    responses = []
    for number, (suffix, flags) in enumerate(zip(example.suffixes, example.suffixes_scored, strict=True)):
        tokens = np.concatenate([example.shared, suffix]).tolist()
        scored = np.concatenate([example.shared_scored, flags]).tolist()
        runs = [{"text": run.text, "scored": run.kind} for run in decode_runs(tokenizer, tokens, scored)]
        told = {"ids": tokens, "scored": [int(flag) for flag in scored]} if ids else {}
        name = name_of(number, len(example.suffixes))
        responses.append({"name": name, "tokens": len(tokens), "scored_tokens": sum(scored), "runs": runs, **told})
    return {
        "row": index + 1,
        "file": record.source,
        "line": record.line,
        "responses": responses,
        "checks": verdict.checks,
        "notes": list(verdict.notes),
    }


def _words(verdict: Verdict) -> str:
    marks = {True: "ok", False: "FAILED", None: "does not apply"}
    lines = [f"  {marks[result]}: {CHECKS[name]}" for name, result in verdict.checks.items()]
    return "\n".join(lines + [f"  note: {TEMPLATE_NOTES[note]}" for note in verdict.notes])


def _emit_summary(summary: dict[str, Any]) -> None:
    console.emit(f"the set, by {summary['looked_at']:,} records spread over it:")
    for name, counts in summary["checks"].items():
        total = counts["passed"] + counts["failed"]
        result = f"{counts['passed']:,} of {total:,}" if total else "does not apply"
        console.emit(f"  {result}: {CHECKS[name]}")
    tokens = summary["tokens"]
    for name in ("prompt", *(name for name in tokens if name not in ("prompt", "total", "scored"))):
        told = ", ".join(f"{key} {value:,}" for key, value in tokens[name].items())
        console.emit(f"  tokens of {name}: {told}")
    if summary["overlong"] == "truncate":
        cut = f"{summary['prompts_truncated']:,} prompts and {summary['answers_truncated']:,} answers are cut"
    else:
        cut = f"{summary['too_long']:,} rows are longer and dropped; data.overlong: truncate would cut them"
    console.emit(f"  data.max_length {summary['max_length']:,}: {cut}")


def _emit(shown: Any) -> None:
    """Write styled text to stdout, plain where that is no terminal."""
    from rich.console import Console  # noqa: PLC0415 - start-up time

    out = io.StringIO()
    is_terminal = sys.stdout.isatty()
    Console(file=out, force_terminal=is_terminal, width=WIDTH, soft_wrap=True, highlight=False).print(shown, end="")
    console.emit(out.getvalue(), end="")

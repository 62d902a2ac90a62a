"""`dpoctl check`: gather facts about a recipe's data, tokenizer and model, from which advice is given."""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpoctl.data.cache import cache_dir
from dpoctl.data.prepare import PreparedData, count_rows, iter_texts, prepare
from dpoctl.data.records import Record, strings_of
from dpoctl.data.store import TokenStore
from dpoctl.errors import DataError, SetupError, UsageError, UserError
from dpoctl.losses import LOSSES
from dpoctl.model.from_config import build_skeleton
from dpoctl.model.modules import linear_layers
from dpoctl.model.policy import Policy
from dpoctl.model.tokenizer import load_tokenizer, stop_tokens
from dpoctl.recipe.diagnostics import Diagnostic, KeyPath
from dpoctl.recipe.facts import AnswerLengths, Facts, RowCounts
from dpoctl.recipe.schema import Recipe
from dpoctl.tasks.paths import find_wrong_paths
from dpoctl.tasks.plan import Target, forecast_of, recomputed, refuse, refuse_before_data
from dpoctl.tasks.setup import quiet_libraries
from dpoctl.tasks.task import build_task

CHECKED = 200
"""Number of rows whose text is searched."""
CONTROL_TOKEN = re.compile(r"<\|[A-Za-z0-9_]+\|>")
TEMPLATE_MARKS = re.compile(
    r"<\|(im_start|im_end|user|assistant|system|eot_id|start_header_id|end)\|>|\[/?INST\]|<start_of_turn>"
)
"""Marks that chat templates write and people do not."""
SYSTEM_TURN = re.compile(r"<\|im_start\|>system|<\|system\|>|<<SYS>>|<\|start_header_id\|>system")


def gather_facts(recipe: Recipe, *, is_sound: bool, file: Path | None = None, gpu: str | None = None) -> Facts:
    """Read the data, the tokenizer and the model configuration of a recipe, but no weights.

    What cannot be read is reported in the facts, as `troubles`.

    Args:
        recipe: complete.
        is_sound: False if the recipe has errors: then its rows are only counted.
        file: the file of the recipe, if it has one, beside which missing files may be.
        gpu: the GPU that the run must fit on; None is that of this machine.
    """
    quiet_libraries()
    troubles: list[Diagnostic] = []
    tokenizer = data = skeleton = None
    wants = build_task(recipe).rows if is_sound else None
    if file is not None:
        for error in find_wrong_paths(recipe, file):
            troubles.append(Diagnostic("error", "refused", _path_of(error, recipe), str(error)))
    if is_sound and not troubles:
        troubles += _states_that_do_not_fit(recipe, gpu)
    if is_sound and not any(trouble.severity == "error" for trouble in troubles):
        with _collecting_errors(troubles, recipe):
            tokenizer = load_tokenizer(recipe, lambda: iter_texts(recipe, wants))
    if tokenizer is not None:
        with _collecting_errors(troubles, recipe):
            stops = stop_tokens(recipe, tokenizer)
            data = prepare(recipe, tokenizer, cache_dir=cache_dir(), wants=wants, stops=stops)
        with _collecting_errors(troubles, recipe):
            skeleton = build_skeleton(recipe, tokenizer)
    facts = Facts(coupling=_coupling(recipe))
    if tokenizer is not None and data is not None:
        facts = facts_of(recipe, tokenizer, data)
    elif not any(trouble.path[0] == "data" for trouble in troubles):
        with _collecting_errors(troubles, recipe):
            rows, eval_rows = count_rows(recipe, wants)
            facts = replace(facts, rows=rows, eval_rows=eval_rows)
    if tokenizer is not None and data is not None and skeleton is not None:
        with _collecting_errors(troubles, recipe):
            troubles += _memory_notes(recipe, tokenizer, data, gpu)
    if skeleton is not None:
        facts = replace(facts, **_model_facts(recipe, skeleton))
    return replace(facts, diagnostics=tuple(troubles))


def _states_that_do_not_fit(recipe: Recipe, gpu: str | None) -> Iterator[Diagnostic]:
    """Yield the refusal of weights, gradients and optimizer state that do not fit.

    On a machine without a GPU it is a note: a recipe is often checked where it is written, and not where it will run.
    """
    place = Target.of(gpu or "auto", 1)
    try:
        refuse_before_data(recipe, place)
    except UsageError as error:
        is_certain = gpu is not None or place.gpu is not None
        words = str(error) if is_certain else f"{error}; for another machine: dpoctl check --gpu NAME"
        yield Diagnostic("error" if is_certain else "note", "does-not-fit", ("model",), words)


def _memory_notes(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, data: PreparedData, gpu: str | None
) -> Iterator[Diagnostic]:
    """Yield whether a run does not fit on a GPU, or fits because layers are recomputed."""
    place = Target.of(gpu or "auto", 1)
    if place.gpu is None:
        return
    forecast = forecast_of(recipe, tokenizer, data, place)
    path = ("training", "gradient_checkpointing")
    try:
        refuse(recipe, tokenizer, data, forecast)
    except UsageError as error:
        yield Diagnostic("error", "does-not-fit", ("model",), str(error))
    else:
        if forecast.estimate.every:
            yield Diagnostic("note", "recomputed", path, f"on {place.words} {recomputed(forecast.estimate.every)}")


def facts_of(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, data: PreparedData, policy: Policy | None = None
) -> Facts:
    """Return the facts about loaded data, a tokenizer and a model.

    Args:
        recipe: complete.
        tokenizer: the tokenizer of the recipe.
        data: the data, with the training set.
        policy: the policy before training, if it is loaded.
    """
    counts = data.report["train"]
    records = [data.train.texts(index) for index in range(min(CHECKED, len(data.train)))]
    as_messages = not isinstance(records[0].prompt, str)
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    eval_rows = {name: int(store.pair_start[-1]) or len(store) for name, store in data.evals.items()}
    split = counts["markers"]["template"]
    marked = sum(_has_template_marks(record) for record in records)
    return Facts(
        rows=len(data.train),
        train=_row_counts(counts),
        evals={name: _row_counts(account) for name, account in data.report["evals"].items()},
        eval_rows=eval_rows,
        lengths=_answer_lengths(data.train),
        looked_at=len(records),
        rendered=marked if as_messages else 0,
        doubled=0 if as_messages else sum(_has_two_beginnings(record, tokenizer.bos_token) for record in records),
        plain_text=not as_messages and not marked and bool(template),
        split_tokens=tuple(dict.fromkeys([*_split_tokens(tokenizer, template), *split])) if as_messages else (),
        split_rows=max((found["rows"] for found in split.values()), default=0),
        ends_turns="eos_token" in template or str(tokenizer.eos_token) in template,
        coupling=_coupling(recipe),
        labels=_labels(data),
        **({} if policy is None else _model_facts(recipe, policy.causal)),
    )


def _row_counts(account: Mapping[str, Any]) -> RowCounts:
    dropped = {reason: count for reason, count in account["rejected"].items() if reason != "duplicate"}
    return RowCounts(used=account["used"], dropped=dropped, unfinished=account["rows_without_eos"])


def _answer_lengths(store: TokenStore) -> AnswerLengths | None:
    if not store.pairs.size:
        return None
    chosen, rejected = store.pair_lengths()
    gaps = (chosen - rejected).astype(np.float64)
    error = float(gaps.std(ddof=1) / math.sqrt(len(gaps))) if len(gaps) > 1 else math.inf
    return AnswerLengths(pairs=len(gaps), chosen=float(chosen.mean()), rejected=float(rejected.mean()), gap_error=error)


def _model_facts(recipe: Recipe, causal: PreTrainedModel) -> dict[str, Any]:
    unmatched: tuple[str, ...] = ()
    if recipe.lora is not None:
        from dpoctl.model.lora import unmatched_targets  # noqa: PLC0415 - peft takes a second to import

        unmatched = unmatched_targets(causal, recipe.lora)
    return {
        "parameters": int(causal.num_parameters()),
        "context_length": getattr(causal.config, "max_position_embeddings", None),
        "unmatched_targets": unmatched,
        "linear_layers": linear_layers(causal) if unmatched else (),
    }


def _coupling(recipe: Recipe) -> tuple[str, ...]:
    """Return the losses that compare the rows of a step with each other."""
    kinds = [spec["type"] for _, spec in recipe.dpo.losses] if recipe.method == "dpo" else []
    return tuple(kind for kind in kinds if kind in LOSSES and LOSSES[kind].couples_batch)


def _labels(data: PreparedData) -> tuple[int, int] | None:
    """Return the numbers of desirable and undesirable training rows, if the rows have labels."""
    label = data.train.label
    return (int((label == 1).sum()), int((label == 0).sum())) if label.max(initial=-1) >= 0 else None


def _split_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[str, ...]:
    vocabulary = tokenizer.get_vocab()
    return tuple(token for token in dict.fromkeys(CONTROL_TOKEN.findall(template)) if token not in vocabulary)


def _has_template_marks(record: Record) -> bool:
    return any(TEMPLATE_MARKS.search(text) for text in strings_of(record.prompt, *record.responses))


def _has_two_beginnings(record: Record, bos: str | None) -> bool:
    """Whether a template was applied to parts of a conversation that were joined afterwards."""
    text = "".join(strings_of(record.prompt))
    return len(SYSTEM_TURN.findall(text)) > 1 or (bool(bos) and text.count(str(bos)) > 1)


@contextmanager
def _collecting_errors(troubles: list[Diagnostic], recipe: Recipe) -> Iterator[None]:
    """Collect errors that the user can fix, with their keys; something that cannot be reached here becomes a note."""
    try:
        yield
    except SetupError as error:
        path = _path_of(error, recipe)
        what = "data" if path[0] == "data" else "model"
        troubles.append(Diagnostic("note", "not-seen", path, f"the {what} was not checked: {error}"))
    except UserError as error:
        troubles.append(Diagnostic("error", "refused", _path_of(error, recipe), str(error)))


def _path_of(error: UserError, recipe: Recipe) -> KeyPath:
    """Return the recipe key of an error, found by its text."""
    for path, source in recipe.data.sources:
        if str(Path(source.path)) in error.message:
            return path
    for path in (("dpo", "reference", "path"), ("model", "chat_template"), ("model", "model_name_or_path")):
        if error.message.startswith(f"{'.'.join(path)}: "):
            return path
    if isinstance(error, DataError):
        return ("model", "chat_template") if "template" in error.message else ("data", "train")
    for key, path in (
        ("lora.modules_to_save", ("lora", "modules_to_save")),
        ("lora", ("lora", "target_modules")),
        ("chat template", ("model", "chat_template")),
    ):
        if error.message.startswith(key):
            return path
    return ("model", "from_scratch" if recipe.model.from_scratch is not None else "model_name_or_path")

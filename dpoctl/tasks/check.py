"""What a recipe's data, tokenizer and model show before anything is trained: the facts that advice is made from."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpoctl.core.losses import LOSSES
from dpoctl.data.prepare import PreparedData, cache_dir, count_rows, iter_texts, prepare
from dpoctl.data.records import Record, Text
from dpoctl.errors import DataError, SetupError, UserError
from dpoctl.model.modules import linear_layers
from dpoctl.model.policy import Policy
from dpoctl.model.skeleton import build_skeleton
from dpoctl.model.tokenizer import load_tokenizer
from dpoctl.recipe.expect import Path as KeyPath
from dpoctl.recipe.facts import Facts, Remark
from dpoctl.recipe.schema import Recipe
from dpoctl.tasks.machine import quiet_libraries
from dpoctl.tasks.task import build_task

LOOK_AT = 200
CONTROL_TOKEN = re.compile(r"<\|[A-Za-z0-9_]+\|>")
MARKS = re.compile(
    r"<\|(im_start|im_end|user|assistant|system|eot_id|start_header_id|end)\|>|\[/?INST\]|<start_of_turn>"
)
"""What chat templates write, and people do not."""
SYSTEM_TURN = re.compile(r"<\|im_start\|>system|<\|system\|>|<<SYS>>|<\|start_header_id\|>system")


def look(recipe: Recipe, *, is_sound: bool) -> Facts:
    """Look at the data, the tokenizer and the model's configuration of a recipe; no weights are read.

    What cannot be looked at is among the troubles of the facts.

    Args:
        recipe: complete.
        is_sound: whether nothing is wrong with it; otherwise its rows are counted and no more.
    """
    quiet_libraries()
    troubles: list[Remark] = []
    tokenizer = data = skeleton = None
    wants = build_task(recipe).rows if is_sound else None
    if is_sound:
        with _noting(troubles, recipe):
            tokenizer = load_tokenizer(recipe, lambda: iter_texts(recipe, wants))
    if tokenizer is not None:
        with _noting(troubles, recipe):
            data = prepare(recipe, tokenizer, cache_dir=cache_dir(), wants=wants)
        with _noting(troubles, recipe):
            skeleton = build_skeleton(recipe, tokenizer)
    facts = Facts(coupling=_coupling(recipe))
    if tokenizer is not None and data is not None:
        facts = facts_of(recipe, tokenizer, data)
    elif not any(trouble.path[0] == "data" for trouble in troubles):
        with _noting(troubles, recipe):
            rows, eval_rows = count_rows(recipe, wants)
            facts = replace(facts, rows=rows, eval_rows=eval_rows)
    if skeleton is not None:
        facts = replace(facts, **_of_the_model(recipe, skeleton))
    return replace(facts, troubles=tuple(troubles))


def facts_of(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, data: PreparedData, policy: Policy | None = None
) -> Facts:
    """Gather what loaded data, a tokenizer and a model show.

    Args:
        recipe: complete.
        tokenizer: the recipe's.
        data: with its training set.
        policy: as it starts, where it is loaded.
    """
    account = data.report["train"]
    records = [data.train.texts(index) for index in range(min(LOOK_AT, len(data.train)))]
    as_messages = not isinstance(records[0].prompt, str)
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    eval_rows = {name: int(store.pair_start[-1]) or len(store) for name, store in data.evals.items()}
    marked = sum(_holds_marks(record) for record in records)
    return Facts(
        rows=len(data.train),
        used=account["used"],
        eval_rows=eval_rows,
        rejected={reason: count for reason, count in account["rejected"].items() if reason != "duplicate"},
        unfinished=account["rows_without_eos"],
        looked_at=len(records),
        rendered=marked if as_messages else 0,
        doubled=0 if as_messages else sum(_begins_twice(record, tokenizer.bos_token) for record in records),
        plain_text=not as_messages and not marked and bool(template),
        split_tokens=_split_tokens(tokenizer, template) if as_messages else (),
        ends_turns="eos_token" in template or str(tokenizer.eos_token) in template,
        coupling=_coupling(recipe),
        labels=_labels(data),
        **({} if policy is None else _of_the_model(recipe, policy.causal)),
    )


def _of_the_model(recipe: Recipe, causal: PreTrainedModel) -> dict[str, Any]:
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
    """The losses that compare the rows of a step."""
    kinds = [spec["type"] for _, spec in recipe.dpo.losses] if recipe.method == "dpo" else []
    return tuple(kind for kind in kinds if kind in LOSSES and LOSSES[kind].couples_batch)


def _labels(data: PreparedData) -> tuple[int, int] | None:
    """Desirable and undesirable training rows, where they are labelled."""
    label = data.train.label
    return (int((label == 1).sum()), int((label == 0).sum())) if label.max(initial=-1) >= 0 else None


def _split_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[str, ...]:
    vocabulary = tokenizer.get_vocab()
    return tuple(token for token in dict.fromkeys(CONTROL_TOKEN.findall(template)) if token not in vocabulary)


def _holds_marks(record: Record) -> bool:
    return any(MARKS.search(text) for text in _strings(record))


def _begins_twice(record: Record, bos: str | None) -> bool:
    """Whether a template was applied to the parts of a conversation, which then were joined."""
    text = "".join(_strings_of(record.prompt))
    return len(SYSTEM_TURN.findall(text)) > 1 or (bool(bos) and text.count(str(bos)) > 1)


def _strings(record: Record) -> Iterator[str]:
    for text in (record.prompt, *record.responses):
        yield from _strings_of(text)


def _strings_of(text: Text) -> Iterator[str]:
    if isinstance(text, str):
        yield text
    else:
        yield from (message["content"] for message in text)


@contextmanager
def _noting(troubles: list[Remark], recipe: Recipe) -> Iterator[None]:
    """What a user can mend becomes an error at its key; what is out of reach here, a note."""
    try:
        yield
    except SetupError as error:
        path = _path_of(error, recipe)
        what = "data" if path[0] == "data" else "model"
        troubles.append(Remark("note", "not-seen", path, f"the {what} was not looked at: {error}"))
    except UserError as error:
        troubles.append(Remark("error", "refused", _path_of(error, recipe), str(error)))


def _path_of(error: UserError, recipe: Recipe) -> KeyPath:
    """The key that an error is about, by what it says."""
    for path, source in recipe.data.sources:
        if str(Path(source.path)) in error.message:
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

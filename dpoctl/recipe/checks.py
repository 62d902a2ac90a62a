"""What the keys of a recipe must be to one another."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath

from dpoctl.recipe.expect import Path
from dpoctl.recipe.inert import inert_keys
from dpoctl.recipe.loss import Named
from dpoctl.recipe.problems import dotted
from dpoctl.recipe.schema import LOSS, JudgeSection, Recipe


@dataclass(frozen=True, slots=True)
class Finding:
    """A contradiction, at the key that a user would change.

    Args:
        path: The key.
        message: What is wrong.
        involves: The other keys of it; when one of them is wrong by itself, that is said instead.
    """

    path: Path
    message: str
    involves: tuple[Path, ...] = ()


Stands = Callable[[Path, tuple[Path, ...]], bool]
QUANTIZATION: Path = ("quantization",)
LONGEST_NAME, LONGEST_PATH = 255, 4000
"""Bytes of a file's name, and of a whole path with room for what a run puts below it."""
UNDECIDED = "undecided"
"""What a judge calls a text of no category."""
ROWS = {
    "hh": ("pairs",),
    "trl-explicit": ("pairs",),
    "trl-implicit": ("pairs",),
    "ranking": ("pairs", "rankings"),
    "prompt-completion": ("labels",),
    "messages": (),
}
"""What rows of a format are to a loss of preferences; of other formats nothing is known before they are read."""
JUDGED = {"pairs": "pairs of answers", "rankings": "rankings of answers", "labels": "labelled answers"}
WAY_OUT = {
    "pairs": "take other rows, or a loss of these",
    "rankings": "write them in the format ranking",
    "labels": "convert them with `dpoctl convert-data --to unpaired`",
}


def check(recipe: Recipe, command: str, stands: Stands, losses: Sequence[Named]) -> Iterator[Finding]:
    """Find every contradiction.

    Args:
        recipe: A recipe whose keys are right one by one.
        command: The command that reads it: `sft` or `dpo`.
        stands: Whether a key is written down, and was not overruled with one of the other keys.
        losses: Those of preferences; empty where there are none, or something is wrong with them.
    """
    if recipe.method != command:
        yield Finding(
            ("method",),
            f"the method is {recipe.method} and the command is {command}; run `dpoctl {recipe.method}` on it",
        )
    yield from _inert(recipe, stands)
    nameless = list(_names(recipe))
    yield from nameless or _model(recipe)
    yield from _data(recipe)
    yield from _training(recipe)
    if recipe.eval.judge is not None:
        yield from _judge(recipe.eval.judge)
    if losses:
        yield from _batch(recipe, losses)
        yield from _formats(recipe, losses)
        yield from _reference(recipe, losses)


def _inert(recipe: Recipe, stands: Stands) -> Iterator[Finding]:
    for path, inert in inert_keys(recipe).items():
        if stands(path, inert.causes):
            yield Finding(path, f"{dotted(path)} would do nothing: {inert.reason}", inert.causes)


def _names(recipe: Recipe) -> Iterator[Finding]:
    """Names that no file system knows: to ask it about one is an error."""
    names: dict[Path, str | None] = {
        ("model", "model_name_or_path"): recipe.model.model_name_or_path,
        ("dpo", "reference", "path"): recipe.dpo.reference.path,
        ("training", "output_dir"): recipe.training.output_dir,
    }
    for path, name in names.items():
        if name is None:
            continue
        if len(name) > LONGEST_PATH or max(len(part.encode()) for part in name.split("/")) > LONGEST_NAME:
            yield Finding(path, f"{dotted(path)}: a name of {len(name):,} characters is longer than any can be")
        elif name.startswith("~") and os.path.expanduser(name).startswith("~"):  # noqa: PTH111 - pathlib's raises
            yield Finding(path, f"{dotted(path)}: there is no home folder {name.partition('/')[0]}")


def _model(recipe: Recipe) -> Iterator[Finding]:
    name, scratch = recipe.model.model_name_or_path, recipe.model.from_scratch
    either: Path = ("model", "model_name_or_path")
    other: Path = ("model", "from_scratch")
    if name is None and scratch is None:
        yield Finding(("model",), "model needs model_name_or_path, or from_scratch", (either, other))
    if name is not None and scratch is not None:
        yield Finding(other, "give model_name_or_path or from_scratch, not both")
    if name is not None and _same_folder(name, recipe.training.output_dir):
        yield Finding(("training", "output_dir"), "output_dir is the model itself; name another folder", (either,))
    if recipe.quantization is None:
        return
    four, eight = recipe.quantization.load_in_4bit, recipe.quantization.load_in_8bit
    flags: tuple[Path, ...] = ((*QUANTIZATION, "load_in_4bit"), (*QUANTIZATION, "load_in_8bit"))
    if four and eight:
        yield Finding(flags[1], "load_in_4bit and load_in_8bit cannot both be true")
    if not (four or eight):
        yield Finding(
            QUANTIZATION,
            "quantization switches nothing on; set load_in_4bit or load_in_8bit, or drop the section",
            flags,
        )
    elif recipe.lora is None:
        at = flags[0] if four else flags[1]
        yield Finding(at, f"{at[1]} needs a lora section: quantised weights are frozen", (("lora",), QUANTIZATION))


def _data(recipe: Recipe) -> Iterator[Finding]:
    data = recipe.data
    yield from _lengths(("data", "max_prompt_length"), data.max_length, data.max_prompt_length)
    for at, source in data.sources:
        own = [key for key in ("max_prompt_length", "max_length") if getattr(source, key) is not None]
        if own:
            prompt = source.max_prompt_length or data.max_prompt_length
            yield from _lengths((*at, own[0]), source.max_length or data.max_length, prompt)
    if data.eval_size is not None and "eval" in data.eval:
        yield Finding(
            ("data", "eval_size"),
            "eval_size makes an eval set named 'eval', and data.eval has one; give it another name",
            (("data", "eval"),),
        )


def _lengths(at: Path, whole: int, prompt: int | None) -> Iterator[Finding]:
    if prompt is not None and prompt >= whole:
        yield Finding(
            at,
            f"max_prompt_length ({prompt}) must be smaller than max_length ({whole}), which counts prompt and answer",
            ((*at[:-1], "max_length"), ("data", "max_length"), ("data", "max_prompt_length")),
        )


def _training(recipe: Recipe) -> Iterator[Finding]:
    training = recipe.training
    if training.warmup_ratio is not None and training.warmup_steps is not None:
        yield Finding(("training", "warmup_steps"), "give warmup_ratio or warmup_steps, not both")
    if training.eval_steps is None and (recipe.data.eval or recipe.data.eval_size is not None):
        at = "eval" if recipe.data.eval else "eval_size"
        yield Finding(
            ("data", at),
            f"data.{at} needs training.eval_steps, which says how often it is used; e.g. eval_steps: 100",
            (("training", "eval_steps"),),
        )


def _judge(judge: JudgeSection) -> Iterator[Finding]:
    path: Path = ("eval", "judge", "categories")
    if judge.target not in judge.categories:
        known = ", ".join(judge.categories)
        at: Path = ("eval", "judge", "target")
        yield Finding(at, f"target: expected one of the categories, {known}, got {judge.target!r}", (path,))
    if UNDECIDED in judge.categories:
        yield Finding((*path, UNDECIDED), f"{UNDECIDED!r} is what texts of no category are; name it otherwise")
    seen: dict[str, str] = {}
    for name, words in judge.categories.items():
        for word in words:
            if seen.setdefault(word.casefold(), name) != name:
                yield Finding((*path, name), f"{word!r} is a word of {seen[word.casefold()]!r} too; it decides nothing")


def _batch(recipe: Recipe, losses: Sequence[Named]) -> Iterator[Finding]:
    coupled = next((one for one in losses if one.loss.couples_batch), None)
    if coupled is not None and recipe.training.global_batch_size == 1:
        at: Path = ("training", "global_batch_size")
        what = f"the loss {coupled.kind!r} compares the rows of a step, and global_batch_size: 1 is a step of one"
        yield Finding(at, f"{what}; e.g. 64", (LOSS,))


def _formats(recipe: Recipe, losses: Sequence[Named]) -> Iterator[Finding]:
    judging = losses[0]
    wanted = judging.loss.rows
    for path, source in recipe.data.sources:
        if wanted not in ROWS.get(source.format, (wanted,)):
            yield Finding(
                (*path, "format"),
                f"the loss {judging.kind!r} judges {JUDGED[wanted]}, which rows of format {source.format} are not; "
                f"{WAY_OUT[wanted]}",
                (LOSS,),
            )


def _reference(recipe: Recipe, losses: Sequence[Named]) -> Iterator[Finding]:
    reference = recipe.dpo.reference
    needed = next((one for one in losses if one.loss.needs_reference), None)
    mode: Path = ("dpo", "reference", "mode")
    path: Path = ("dpo", "reference", "path")
    if needed and reference.mode == "none":
        yield Finding(mode, f"the loss {needed.kind!r} needs a reference; use auto, or another loss", (LOSS,))
    sync: Path = ("dpo", "reference", "sync_steps")
    if needed:
        yield from _moving_reference(recipe, sync)
        return
    standing = (
        (mode, reference.mode in ("cached", "live")),
        (path, reference.path is not None),
        (sync, reference.sync_steps is not None),
    )
    for at, given in standing:
        if given:
            unread = f"the loss {losses[0].kind!r}" if len(losses) == 1 else "every loss of the list"
            yield Finding(at, f"{dotted(at)} would do nothing: {unread} is set to use no reference", (LOSS,))


def _moving_reference(recipe: Recipe, sync: Path) -> Iterator[Finding]:
    reference = recipe.dpo.reference
    if reference.sync_steps is None:
        return
    if reference.mode == "cached":
        mode: Path = ("dpo", "reference", "mode")
        yield Finding(
            mode, "mode: cached keeps a reference that stands still; with sync_steps use auto or live", (sync,)
        )
    if reference.path is not None:
        path: Path = ("dpo", "reference", "path")
        yield Finding(
            path, "sync_steps mixes the policy into the model it started from; path names another model", (sync,)
        )


def _same_folder(name: str, output_dir: str) -> bool:
    return FilePath(name).expanduser().resolve() == FilePath(output_dir).expanduser().resolve()

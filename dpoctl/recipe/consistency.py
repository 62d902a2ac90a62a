"""Consistency checks: keys of a recipe that contradict each other, and keys that have no effect in it."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dpoctl.recipe.diagnostics import Diagnostic, KeyPath, NoEffect, dotted
from dpoctl.recipe.document import write_yaml
from dpoctl.recipe.eval_metrics import (
    EVAL_DATA,
    NO_EVAL_DATA,
    find_misspelt_expectation,
    find_unknown_metric,
)
from dpoctl.recipe.judge_section import find_judge_errors, unused_judge_keys
from dpoctl.recipe.library_arguments import optimizer_errors, schedule_errors
from dpoctl.recipe.loss_section import NamedLoss
from dpoctl.recipe.schema import LOSS, Recipe

IsInForce = Callable[[KeyPath, tuple[KeyPath, ...]], bool]
# TensorBoard uses the name of the folder.
TRACKERS_WITH_NAMES = {"wandb", "trackio"}
PAIRING = ("pairs", "min_margin", "max_pairs_per_prompt", "ties")
"""The keys of a source that choose pairs."""
MODEL: KeyPath = ("model", "model_name_or_path")
FROM_SCRATCH: KeyPath = ("model", "from_scratch")
QUANTIZATION: KeyPath = ("quantization",)
REFERENCE: KeyPath = ("dpo", "reference")
EVAL_STEPS: KeyPath = ("training", "eval_steps")
MAX_NAME, MAX_PATH = 255, 4000
"""The bytes of a file's name, and of a path with room for the files of a run below it."""
FORMAT_ROWS = {
    "hh": ("pairs",),
    "trl-explicit": ("pairs",),
    "trl-implicit": ("pairs",),
    "ranking": ("pairs", "rankings"),
    "prompt-completion": ("labels",),
    "messages": (),
}
"""The kinds of rows that a format can give to a preference loss; those of other formats depend on the file."""
ROW_NAMES = {"pairs": "pairs of answers", "rankings": "rankings of answers", "labels": "labelled answers"}
ROW_REMEDIES = {
    "pairs": "use other data, or another loss",
    "rankings": "use data in the format ranking",
    "labels": "convert it with `dpoctl convert-data --to unpaired`",
}
NOT_TAKEN: dict[str, tuple[str, ...]] = {
    "rmsprop": ("adam_beta1", "adam_beta2"),
    "adafactor": ("adam_beta1", "adam_beta2", "adam_epsilon"),
    **dict.fromkeys(("lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit"), ("adam_epsilon",)),
}
"""Keys of Adam that other optimizers do not have."""
WHOLE_MATRICES = ("adafactor", "muon")
"""Optimizers whose update of a weight depends on its whole matrix."""
EVAL_KEYS = ("eval_steps", "eval_on_start", "keep_best", "early_stopping")
"""The keys of training that only evaluations read."""


def find_contradictions(
    recipe: Recipe, command: str, is_in_force: IsInForce, losses: Sequence[NamedLoss]
) -> Iterator[Diagnostic]:
    """Find the keys that contradict each other, and those without effect; each at the key to change.

    Args:
        recipe: A recipe whose keys are valid one by one.
        command: The command that reads it: `sft` or `dpo`.
        is_in_force: Whether a key is set, and an override of the other keys did not replace it.
        losses: The preference losses; empty if there are none, or if they have errors.
    """
    if recipe.method != command:
        message = f"the method is {recipe.method}, but the command is {command}; run `dpoctl {recipe.method}` on it"
        yield Diagnostic.error(("method",), message)
    for path, why in unused_keys(recipe).items():
        if is_in_force(path, why.causes):
            yield Diagnostic.error(path, f"{dotted(path)} has no effect: {why.reason}", related=why.causes)
    unusable = list(_names(recipe))
    yield from unusable or _model(recipe)
    yield from _quantization(recipe)
    yield from _lora(recipe)
    yield from _routers(recipe)
    yield from _data(recipe)
    yield from _training(recipe)
    yield from _benchmarks(recipe)
    yield from _gates(recipe)
    if losses or recipe.method == "sft":
        yield from find_unknown_metric(recipe, losses)
        yield from find_misspelt_expectation(recipe, losses)
    if recipe.eval.judge is not None:
        yield from find_judge_errors(recipe.eval.judge)
    if losses:
        yield from _batch(recipe, losses)
        yield from _formats(recipe, losses)
        yield from _reference(recipe, losses)


def unused_keys(recipe: Recipe) -> dict[KeyPath, NoEffect]:
    """Find the keys that nothing reads in this recipe."""
    other = "sft" if recipe.method == "dpo" else "dpo"
    return {
        (other,): NoEffect(f"the method is {recipe.method}", (("method",),)),
        **_unused_in_data(recipe),
        **_unused_in_reference(recipe),
        **_unused_in_model(recipe),
        **_unused_in_lora(recipe),
        **_unused_in_training(recipe),
        **_unused_in_eval(recipe),
    }


def resolved_yaml(recipe: Recipe) -> str:
    """Write a recipe with all defaults and without unused keys; it loads as an equal recipe."""
    resolved = recipe.model_dump(mode="python")
    for *above, key in unused_keys(recipe):
        section: Any = resolved
        for part in above:
            section = section[part] or {}
        section.pop(key, None)
    return write_yaml(resolved)


def _names(recipe: Recipe) -> Iterator[Diagnostic]:
    """Find names that no file system accepts: the other checks would fail on them."""
    names: dict[KeyPath, str | None] = {
        MODEL: recipe.model.model_name_or_path,
        (*REFERENCE, "path"): recipe.dpo.reference.path,
        ("training", "output_dir"): recipe.training.output_dir,
    }
    for path, name in names.items():
        if name is None:
            continue
        if len(name) > MAX_PATH or max(len(part.encode()) for part in name.split("/")) > MAX_NAME:
            yield Diagnostic.error(path, f"{dotted(path)}: the name is too long ({len(name):,} characters)")
        elif name.startswith("~") and os.path.expanduser(name).startswith("~"):  # noqa: PTH111 - pathlib's raises
            yield Diagnostic.error(path, f"{dotted(path)}: there is no home folder {name.partition('/')[0]}")


def _model(recipe: Recipe) -> Iterator[Diagnostic]:
    name, scratch = recipe.model.model_name_or_path, recipe.model.from_scratch
    if name is None and scratch is None:
        message = "model needs model_name_or_path or from_scratch"
        yield Diagnostic.error(("model",), message, related=(MODEL, FROM_SCRATCH))
    if name is not None and scratch is not None:
        yield Diagnostic.error(FROM_SCRATCH, "set model_name_or_path or from_scratch, not both")
    if name is not None and _is_same_folder(name, recipe.training.output_dir):
        message = "output_dir is the folder of the model; use another folder"
        yield Diagnostic.error(("training", "output_dir"), message, related=(MODEL,))


def _quantization(recipe: Recipe) -> Iterator[Diagnostic]:
    if recipe.quantization is None:
        return
    four, eight = recipe.quantization.load_in_4bit, recipe.quantization.load_in_8bit
    flags: tuple[KeyPath, ...] = ((*QUANTIZATION, "load_in_4bit"), (*QUANTIZATION, "load_in_8bit"))
    if four and eight:
        yield Diagnostic.error(flags[1], "load_in_4bit and load_in_8bit cannot both be true")
    if not (four or eight):
        message = "quantization has no effect; set load_in_4bit or load_in_8bit, or remove the section"
        yield Diagnostic.error(QUANTIZATION, message, related=flags)
    elif recipe.lora is None:
        at = flags[0] if four else flags[1]
        message = f"{at[1]} needs a lora section: quantised weights cannot be trained"
        yield Diagnostic.error(at, message, related=(("lora",), QUANTIZATION))


def _lora(recipe: Recipe) -> Iterator[Diagnostic]:
    lora, sharding = recipe.lora, ("training", "sharding")
    if lora is None:
        return
    whole = "use_dora" if lora.use_dora else "init_lora_weights" if lora.changes_base else None
    if whole is not None and recipe.training.sharding == "full":
        message = f"{whole} needs whole weight matrices, and sharding: full divides them; set sharding: none"
        yield Diagnostic.error(("lora", whole), message, related=(sharding,))
    init: KeyPath = ("lora", "init_lora_weights")
    if lora.changes_base and recipe.quantization is not None:
        message = f"init_lora_weights: {lora.init_lora_weights} changes the weights, so these cannot be quantised"
        yield Diagnostic.error(init, message, related=(QUANTIZATION,))
    if lora.changes_base and lora.use_dora:
        message = f"init_lora_weights: {lora.init_lora_weights} cannot be exported with use_dora; remove one of them"
        yield Diagnostic.error(init, message, related=(("lora", "use_dora"),))
    if lora.layers_to_transform is not None and isinstance(lora.target_modules, str) and not lora.adapts_all:
        message = "layers_to_transform has no effect: target_modules is a regular expression, which names the layers"
        yield Diagnostic.error(("lora", "layers_to_transform"), message, related=(("lora", "target_modules"),))


def _routers(recipe: Recipe) -> Iterator[Diagnostic]:
    if recipe.sft.router_aux_loss_coef is not None and recipe.training.sharding == "full":
        message = "router_aux_loss_coef has not been tried with sharding: full; set sharding: none, or remove it"
        yield Diagnostic.error(("sft", "router_aux_loss_coef"), message, related=(("training", "sharding"),))


def _data(recipe: Recipe) -> Iterator[Diagnostic]:
    data = recipe.data
    yield from _lengths(("data", "max_prompt_length"), data.max_length, data.max_prompt_length)
    for at, source in data.sources:
        own = [key for key in ("max_prompt_length", "max_length") if getattr(source, key) is not None]
        if own:
            prompt = source.max_prompt_length or data.max_prompt_length
            yield from _lengths((*at, own[0]), source.max_length or data.max_length, prompt)
    if data.eval_size is not None and "eval" in data.eval:
        message = "eval_size creates the eval set 'eval', but data.eval has one of that name; rename it"
        yield Diagnostic.error(("data", "eval_size"), message, related=(("data", "eval"),))


def _bfloat16_weights(recipe: Recipe) -> Iterator[Diagnostic]:
    path = ("training", "param_dtype")
    if recipe.lora is not None:
        message = "param_dtype: bfloat16 is for full fine-tuning: adapters are always trained in float32; remove it"
        yield Diagnostic.error(path, message, related=(("lora",),))
    if recipe.model.dtype not in ("auto", "bfloat16"):
        message = f"param_dtype: bfloat16 needs model.dtype: auto or bfloat16, not {recipe.model.dtype}"
        yield Diagnostic.error(path, message, related=(("model", "dtype"),))
    if (optim := recipe.training.optim) in ("rmsprop", "adafactor", "muon"):
        message = f"param_dtype: bfloat16 needs AdamW or Lion: {optim} does not round stochastically"
        yield Diagnostic.error(path, message, related=(("training", "optim"),))


def _lengths(at: KeyPath, whole: int, prompt: int | None) -> Iterator[Diagnostic]:
    if prompt is not None and prompt >= whole:
        message = (
            f"max_prompt_length ({prompt}) must be smaller than max_length ({whole}), which counts prompt and answer"
        )
        keys = ("max_prompt_length", "max_length")
        others = tuple((*section, key) for section in (at[:-1], ("data",)) for key in keys)
        yield Diagnostic.error(at, message, related=others)


def _training(recipe: Recipe) -> Iterator[Diagnostic]:
    training = recipe.training
    if training.warmup_ratio is not None and training.warmup_steps is not None:
        yield Diagnostic.error(("training", "warmup_steps"), "set warmup_ratio or warmup_steps, not both")
    yield from schedule_errors(training)
    yield from optimizer_errors(training)
    yield from _whole_matrices(recipe)
    given = {"warmup_ratio": training.warmup_ratio, "warmup_steps": training.warmup_steps}
    for key in (key for key, value in given.items() if value and training.lr_scheduler_type == "constant"):
        message = f"{key}: lr_scheduler_type: constant has no warm-up; set constant_with_warmup"
        yield Diagnostic.error(("training", key), message, related=(("training", "lr_scheduler_type"),))
    if training.trainable is not None and recipe.lora is not None:
        message = "trainable is for full fine-tuning; lora.target_modules and modules_to_save say what is trained here"
        yield Diagnostic.error(("training", "trainable"), message, related=(("lora",),))
    if training.param_dtype == "bfloat16":
        yield from _bfloat16_weights(recipe)
    if training.eval_steps is None and _has_eval_data(recipe):
        key = "eval" if recipe.data.eval else "eval_size"
        message = f"data.{key} needs training.eval_steps, the number of steps between evaluations; e.g. eval_steps: 100"
        yield Diagnostic.error(("data", key), message, related=(EVAL_STEPS,))


def _whole_matrices(recipe: Recipe) -> Iterator[Diagnostic]:
    """Find what an optimizer does not work with that looks at a matrix as a whole."""
    optim = recipe.training.optim
    path, sharding = ("training", "optim"), ("training", "sharding")
    if optim == "muon" and recipe.lora is not None:
        message = "optim: muon is for full fine-tuning: the factors of an adapter are no weight matrices; use adamw"
        yield Diagnostic.error(path, message, related=(("lora",),))
    if optim in WHOLE_MATRICES and recipe.training.sharding == "full":
        message = f"optim: {optim} needs whole matrices, and sharding: full divides them; use adamw, or sharding: none"
        yield Diagnostic.error(path, message, related=(sharding,))


def _benchmarks(recipe: Recipe) -> Iterator[Diagnostic]:
    tasks = [one.task for one in recipe.eval.benchmarks]
    for index, task in enumerate(tasks):
        if task in tasks[:index]:
            at: KeyPath = ("eval", "benchmarks", index)
            yield Diagnostic.error(at, f"{dotted(at)}: {task!r} is in the list already; a task runs once")


def _gates(recipe: Recipe) -> Iterator[Diagnostic]:
    for index, gate in enumerate(recipe.eval.gates):
        at: KeyPath = ("eval", "gates", index)
        if gate.min is None and gate.max is None:
            yield Diagnostic.error(at, f"{dotted(at)}: the gate has no bound; set min, max or both")
        elif gate.min is not None and gate.max is not None and gate.min > gate.max:
            message = f"{dotted(at)}: min ({gate.min:g}) is above max ({gate.max:g}), so no value passes"
            yield Diagnostic.error((*at, "min"), message, related=((*at, "max"),))


def _batch(recipe: Recipe, losses: Sequence[NamedLoss]) -> Iterator[Diagnostic]:
    coupled = next((one for one in losses if one.loss.couples_batch), None)
    if coupled is not None and recipe.training.global_batch_size == 1:
        message = (
            f"the loss {coupled.kind!r} compares the rows of a step, so global_batch_size must be above 1; e.g. 64"
        )
        yield Diagnostic.error(("training", "global_batch_size"), message, related=(LOSS,))


def _formats(recipe: Recipe, losses: Sequence[NamedLoss]) -> Iterator[Diagnostic]:
    kind, wanted = losses[0].kind, losses[0].loss.rows
    for path, source in recipe.data.sources:
        if wanted not in FORMAT_ROWS.get(source.format, (wanted,)):
            message = f"the loss {kind!r} needs {ROW_NAMES[wanted]}, but rows of the format {source.format} have none"
            yield Diagnostic.error((*path, "format"), f"{message}; {ROW_REMEDIES[wanted]}", related=(LOSS,))


def _reference(recipe: Recipe, losses: Sequence[NamedLoss]) -> Iterator[Diagnostic]:
    reference = recipe.dpo.reference
    mode, path, sync = ((*REFERENCE, key) for key in ("mode", "path", "sync_steps"))
    needed = next((one for one in losses if one.loss.needs_reference), None)
    if needed is None:
        given = {
            mode: reference.mode in ("cached", "live"),
            path: reference.path is not None,
            sync: reference.sync_steps is not None,
        }
        unread = f"the loss {losses[0].kind!r} uses" if len(losses) == 1 else "all losses of the list use"
        for at in (at for at, is_given in given.items() if is_given):
            yield Diagnostic.error(at, f"{dotted(at)} has no effect: {unread} no reference", related=(LOSS,))
        return
    if reference.mode == "none":
        free = dotted((*needed.path, "reference_free"))
        without = f"set {free}: true" if hasattr(needed.loss, "reference_free") else "use another loss"
        message = f"the loss {needed.kind!r} needs a reference; set mode: auto, or {without}"
        yield Diagnostic.error(mode, message, related=(LOSS,))
    if reference.sync_steps is not None and reference.mode == "cached":
        message = "mode: cached computes the reference once, but sync_steps changes it; set mode: auto or live"
        yield Diagnostic.error(mode, message, related=(sync,))
    if reference.sync_steps is not None and reference.path is not None:
        message = "sync_steps needs the starting policy as the reference, but path names another model; remove one"
        yield Diagnostic.error(path, message, related=(sync,))


def _is_same_folder(name: str, output_dir: str) -> bool:
    return Path(name).expanduser().resolve() == Path(output_dir).expanduser().resolve()


def _has_eval_data(recipe: Recipe) -> bool:
    return bool(recipe.data.eval) or recipe.data.eval_size is not None


def _unused_in_reference(recipe: Recipe) -> dict[KeyPath, NoEffect]:
    if recipe.method != "dpo" or recipe.dpo.reference.sync_steps is not None:
        return {}
    sync: KeyPath = (*REFERENCE, "sync_steps")
    return {(*REFERENCE, "sync_alpha"): NoEffect("sync_steps is not set, so the reference never moves", (sync,))}


def _unused_in_data(recipe: Recipe) -> dict[KeyPath, NoEffect]:
    unused: dict[KeyPath, NoEffect] = {}
    common: KeyPath = ("data", "overlong")
    reason = "overlong: drop never truncates a prompt"
    dropping = [at for at, source in recipe.data.sources if (source.overlong or recipe.data.overlong) == "drop"]
    if len(dropping) == len(recipe.data.sources):
        unused[("data", "prompt_truncation")] = NoEffect(reason, (common,))
    for at in dropping:
        unused[(*at, "prompt_truncation")] = NoEffect(reason, ((*at, "overlong"), common))
    if recipe.method == "sft":
        why = NoEffect("SFT trains on the best answer of a row", (("method",),))
        unused |= {(*at, key): why for at, _ in recipe.data.sources for key in PAIRING}
    return unused


def _unused_in_model(recipe: Recipe) -> dict[KeyPath, NoEffect]:
    unused: dict[KeyPath, NoEffect] = {}
    if recipe.model.from_scratch:
        why = NoEffect("model.from_scratch loads nothing from the hub", (FROM_SCRATCH,))
        unused |= {("model", key): why for key in ("revision", "trust_remote_code")}
    if recipe.quantization and not recipe.quantization.load_in_4bit:
        why = NoEffect("load_in_4bit is not true", ((*QUANTIZATION, "load_in_4bit"),))
        keys = (key for key in type(recipe.quantization).model_fields if key.startswith("bnb_4bit_"))
        unused |= {(*QUANTIZATION, key): why for key in keys}
    return unused


def _unused_in_lora(recipe: Recipe) -> dict[KeyPath, NoEffect]:
    if recipe.lora is None or recipe.lora.start == "new":
        return {}
    why = NoEffect("start: continue keeps the settings of the existing adapter", (("lora", "start"),))
    kept = ("start", "loraplus_lr_ratio")
    return {("lora", key): why for key in type(recipe.lora).model_fields if key not in kept}


def _unused_in_training(recipe: Recipe) -> dict[KeyPath, NoEffect]:
    training = recipe.training
    unused: dict[str, tuple[str, str]] = {}
    if training.max_steps is not None:
        unused["num_train_epochs"] = "max_steps sets the length of the run", "max_steps"
    for key in NOT_TAKEN.get(training.optim, ()):
        unused[key] = f"optim: {training.optim} has no such parameter", "optim"
    if training.lr_scheduler_type == "constant":
        unused["warmup_from_zero"] = "lr_scheduler_type: constant has no warm-up", "lr_scheduler_type"
    if training.sharding == "none":
        unused |= dict.fromkeys(("replicas", "cpu_offload"), ("sharding: none divides no model", "sharding"))
    if not TRACKERS_WITH_NAMES & set(training.report_to):
        unused["run_name"] = f"report_to has none of {', '.join(sorted(TRACKERS_WITH_NAMES))}", "report_to"
    if training.hub_model_id is None:
        unused["hub_private_repo"] = "hub_model_id is not set, so nothing is uploaded", "hub_model_id"
    found: dict[KeyPath, NoEffect] = {
        ("training", key): NoEffect(reason, (("training", cause),)) for key, (reason, cause) in unused.items()
    }
    if not _has_eval_data(recipe):
        found |= {("training", key): NoEffect(NO_EVAL_DATA, EVAL_DATA) for key in EVAL_KEYS}
    return found


def _unused_in_eval(recipe: Recipe) -> dict[KeyPath, NoEffect]:
    at: KeyPath = ("eval", "samples")
    judge: KeyPath = ("eval", "judge")
    samples = recipe.eval.samples
    if not _has_eval_data(recipe):
        return dict.fromkeys((at, judge), NoEffect(NO_EVAL_DATA, EVAL_DATA))
    if samples is None or samples.num == 0:
        why = NoEffect("there are no samples; set eval.samples.num", (at, (*at, "num")))
        keys = [key for key in type(samples).model_fields if key != "num"] if samples else []
        return {judge: why, **{(*at, key): why for key in keys}}
    unused: dict[KeyPath, NoEffect] = {}
    if recipe.eval.judge is not None:
        unused |= unused_judge_keys(recipe.eval.judge)
    if samples.prompts is not None:
        unused[(*at, "num")] = NoEffect("prompts sets the number of prompts", ((*at, "prompts"),))
    if samples.temperature == 0:
        why = NoEffect("temperature: 0 writes the same text every time", ((*at, "temperature"),))
        unused |= {(*at, key): why for key in ("top_p", "seed", "per_prompt")}
    return unused

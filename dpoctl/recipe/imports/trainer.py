"""Keys of the tools around transformers' Trainer: batches, schedules, precision, adapters, cadence."""

from collections.abc import Mapping
from typing import Any

from dpoctl.recipe.imports.translation import OFF, Translation, fits, short

TRACKERS = ("tensorboard", "wandb", "trackio")
WHOLE = 1_000_000
"""A length that keeps every row whole."""


def carry_batch(job: Translation, micro: tuple[str, ...], *, default: int) -> None:
    """Turn rows per device, accumulation and devices into `training.global_batch_size`.

    Args:
        job: The config.
        micro: The names of the key for rows per device.
        default: The tool's number of rows per device.
    """
    rows, steps = job.take(*micro), job.take("gradient_accumulation_steps")
    given = [f"{micro[0]}: {rows}" if rows is not None else f"{micro[0]}: {default} (its default)"]
    given += [f"gradient_accumulation_steps: {steps}"] if steps is not None else []
    rows, steps = rows if isinstance(rows, int) else default, steps if isinstance(steps, int) else 1
    arithmetic = f"{rows} rows x {steps} {'micro-batch' if steps == 1 else 'micro-batches'} x {job.devices}"
    job.change(", ".join(given), "training.global_batch_size", rows * steps * job.processes, arithmetic)
    for key in ("per_device_eval_batch_size", "eval_batch_size"):
        if (value := job.take(key)) is not None:
            job.drop(f"{key}: {value}", "micro-batches fit themselves to the memory")


def lose_packing(job: Translation, theirs: str) -> None:
    """Say what packing does to the number of rows of a step."""
    job.lose(
        theirs,
        f"there a row of a batch is filled with as many conversations as fit into {job.get('data.max_length')} tokens, "
        "here training.global_batch_size counts conversations: multiply it by their number for steps of the same size",
    )


def carry_schedule(job: Translation, key: str, *, default: str, warmup: tuple[str, float]) -> None:
    """Carry the schedule of the learning rate and its warm-up over.

    Args:
        job: The config.
        key: Its name of `lr_scheduler_type`.
        default: Its schedule if the key is not set.
        warmup: `warmup_steps` or `warmup_ratio`, and its value if neither is set.
    """
    kind = job.take(key)
    theirs = f"{key}: {kind}" if kind is not None else f"{key}: {default} (its default)"
    kind = str(default if kind is None else kind)
    options = job.take("lr_scheduler_kwargs")
    has_warmup = kind != "constant"
    if fits("training.lr_scheduler_type", kind):
        job.put("training.lr_scheduler_type", kind)
        job.note(theirs, f"training.lr_scheduler_type: {kind}")
    else:
        simpler = next((name for name in ("cosine", "linear") if kind.startswith(name)), None)
        job.put("training.lr_scheduler_type", simpler or "cosine")
        job.lose(theirs, f"this schedule is not offered; the recipe has {simpler or 'cosine'}")
    _carry_schedule_options(job, options)
    steps, ratio = job.take("warmup_steps"), job.take("warmup_ratio")
    name = "warmup_ratio"
    if not has_warmup:
        job.put("training.warmup_steps", 0)
        job.drop(f"warm-up of {steps or ratio or 0}", "a constant schedule of transformers has none")
        return
    if isinstance(steps, float) and 0 < steps < 1:
        steps, ratio, name = None, steps, "warmup_steps"
    if steps:
        job.put("training.warmup_steps", int(steps))
        job.note(f"warmup_steps: {steps}", f"training.warmup_steps: {int(steps)}")
        job.put("training.warmup_from_zero", True)
    elif ratio:
        job.put("training.warmup_ratio", float(ratio))
        job.note(f"{name}: {ratio}", f"training.warmup_ratio: {float(ratio)}")
        job.put("training.warmup_from_zero", True)
    else:
        ours, value = ("warmup_steps", 0) if steps == 0 or ratio == 0 else warmup
        said = (
            f"warm-up: {value or 'none'}" if steps == 0 or ratio == 0 else f"warm-up: {value or 'none'} (its default)"
        )
        job.change(said, f"training.{ours}", value, "without this key a recipe warms up over 10 %")
        if value:
            job.put("training.warmup_from_zero", True)


def _carry_schedule_options(job: Translation, options: Any) -> None:
    if options in OFF:
        return
    if fits("training.lr_scheduler_kwargs", options):
        job.put("training.lr_scheduler_kwargs", options)
        job.note(f"lr_scheduler_kwargs: {short(options)}", f"training.lr_scheduler_kwargs: {short(options)}")
    else:
        job.lose(f"lr_scheduler_kwargs: {short(options)}", "schedules have no settings beside the warm-up")


def carry_length(job: Translation, key: str, *, default: float) -> None:
    """Carry the number of steps over or, where there is none, that of epochs.

    Args:
        job: The config.
        key: Its name of `num_train_epochs`.
        default: Its number of epochs if the key is not set.
    """
    steps, epochs = job.take("max_steps"), job.take(key)
    if steps is not None and steps <= 0:
        job.drop(f"max_steps: {steps}", "epochs set the length of the run")
    theirs = f"{key}: {default:g} (its default)" if epochs is None else f"{key}: {epochs}"
    if isinstance(steps, int) and steps > 0:
        job.put("training.max_steps", steps)
        job.note(f"max_steps: {steps}", f"training.max_steps: {steps}")
        if epochs is not None:
            job.drop(theirs, "max_steps sets the length of the run")
        return
    job.put("training.num_train_epochs", float(default if epochs is None else epochs))
    job.note(theirs, f"training.num_train_epochs: {job.get('training.num_train_epochs')}")


def carry_precision(job: Translation, *, default: str, weights: str | None = None) -> None:
    """Turn flags of mixed precision and dtypes of weights into `model.dtype`.

    Args:
        job: The config.
        default: The precision of the tool if nothing is set.
        weights: The dtype that the tool loads weights in, where the config names one.
    """
    flags = {key: job.take(key) for key in ("bf16", "fp16", "pure_bf16", "mixed_precision", "bfloat16", "float16")}
    given = {key: value for key, value in flags.items() if value is not None}
    dtype = str(job.take("torch_dtype", "dtype", "infer_dtype") or weights or "").removeprefix("torch.")
    if dtype in ("bf16", "fp16", "fp32"):
        dtype = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[dtype]
    on = [key for key, value in given.items() if value not in (False, "no", "auto")]
    if any(given.get(key) == "auto" for key in given) and not on:
        precision = "auto"
    elif on:
        precision = (
            "float16" if "fp16" in on or "float16" in on or given.get("mixed_precision") == "fp16" else "bfloat16"
        )
    elif given:
        precision = dtype if dtype in ("bfloat16", "float16") else "float32"
    else:
        precision = dtype if dtype in ("bfloat16", "float16") else default
    said = ", ".join(
        [*(f"{key}: {short(value)}" for key, value in given.items()), *([f"dtype: {dtype}"] if dtype else [])]
    )
    why = "the precision of the computation"
    if dtype in ("bfloat16", "float16"):
        why += "; weights that are trained stay float32, unless training.param_dtype is bfloat16"
    job.change(said or f"{default} (its default)", "model.dtype", precision, why)


def carry_lora(job: Translation, names: Mapping[str, tuple[str, ...]], *, r: int, alpha: float, dropout: float) -> None:
    """Carry LoRA's settings over.

    Args:
        job: The config.
        names: The tool's names of `r`, `lora_alpha`, `lora_dropout`, `modules_to_save`.
        r: The tool's rank if it is not set.
        alpha: Its alpha.
        dropout: Its dropout.
    """
    job.carry(names["r"][0], "lora.r", default=r, also=names["r"][1:])
    job.carry(names["lora_alpha"][0], "lora.lora_alpha", default=alpha, also=names["lora_alpha"][1:])
    if isinstance(job.get("lora.lora_alpha"), int):
        job.put("lora.lora_alpha", float(job.get("lora.lora_alpha")))
    key = names["lora_dropout"][0]
    value = job.take(*names["lora_dropout"])
    theirs = f"{key}: {value if value is not None else f'{dropout} (its default)'}"
    value = dropout if value is None else float(value)
    if value and job.get("method") == "sft":
        job.put("lora.lora_dropout", value)
        job.change(theirs, "model.disable_dropout", False, f"lora.lora_dropout: {value} needs it")
    elif value:
        job.drop(theirs, "preference training turns dropout off, there as here")
    job.carry(names["modules_to_save"][0], "lora.modules_to_save", also=names["modules_to_save"][1:])


def carry_targets(job: Translation, key: str, value: Any, *, everything: tuple[str, ...], default: str) -> None:
    """Carry the names of adapted modules over.

    Args:
        job: The config.
        key: The tool's name of the key.
        value: The modules that it names.
        everything: The tool's words for all linear layers.
        default: The meaning of no value: `all`, or that of peft.
    """
    if value in everything or (value is None and default == "all"):
        job.put("lora.target_modules", "all-linear")
        theirs = f"{key}: {value if value is not None else 'all (its default)'}"
        job.note(theirs, "lora.target_modules: all-linear")
    elif value is None:
        why = "peft's default for Llama, Mistral, Qwen and Gemma; other architectures have other names: check them"
        job.change(f"{key}: not set", "lora.target_modules", ["q_proj", "v_proj"], why)
    else:
        modules = [part.strip() for part in value.split(",")] if isinstance(value, str) else list(value)
        job.put("lora.target_modules", modules)
        job.note(f"{key}: {short(value)}", f"lora.target_modules: {short(modules)}")


def carry_cadence(job: Translation, *, has_eval: bool, unit: int = 100) -> None:
    """Carry the numbers of steps between logging, evaluations and checkpoints over."""
    if has_eval:
        strategy = str(job.take("eval_strategy", "evaluation_strategy", default="steps"))
        steps = job.take("eval_steps")
        if isinstance(steps, int) and steps > 0:
            job.put("training.eval_steps", steps)
            job.note(f"eval_steps: {steps}", f"training.eval_steps: {steps}")
        else:
            said = f"eval_strategy: {strategy}" + (f", eval_steps: {steps}" if steps else "")
            job.change(said, "training.eval_steps", unit, "a recipe has a number of steps: set the one you want")
    else:
        for key in ("eval_strategy", "evaluation_strategy", "eval_steps", "do_eval", "eval_on_start"):
            if job.take(key) not in (None, False, "no"):
                job.drop(key, "there is no data to evaluate on")
    strategy, steps = job.take("save_strategy"), job.take("save_steps")
    if isinstance(steps, int) and steps > 0 and strategy in (None, "steps"):
        job.put("training.save_steps", steps)
        job.note(f"save_strategy: steps, save_steps: {steps}", f"training.save_steps: {steps}")
    elif strategy not in (None, False, "no"):
        said = f"save_strategy: {strategy}" + (f", save_steps: {steps}" if steps else "")
        job.drop(said, "a recipe saves at the end, and every training.save_steps steps")
    limit = job.take("save_total_limit")
    if limit is not None:
        kept = max(2, int(limit))
        job.change(
            f"save_total_limit: {limit}", "training.save_total_limit", kept, "at least 2, in case one is damaged"
        )


def carry_rest(job: Translation) -> None:
    """Carry what all of these tools call by the same name over, and report everything that is left."""
    norm = job.take("max_grad_norm")
    if norm is not None:
        job.put("training.max_grad_norm", float(norm) or None)
        job.note(f"max_grad_norm: {norm}", f"training.max_grad_norm: {float(norm) or None}")
    for key in ("gradient_checkpointing", "enable_gradient_checkpointing"):
        if (value := job.take(key)) is not None:
            job.drop(f"{key}: {short(value)}", "a recipe recomputes as few layers as the memory allows")
    for key in ("deepspeed", "fsdp", "fsdp_config", "fsdp_version"):
        if job.has(key):
            value = short(job.take(key))
            job.drop(f"{key}: {value}", "training.sharding: auto divides a model that does not fit on each device")
    _carry_best(job)
    _carry_trackers(job)
    _carry_upload(job)
    job.finish()


def _carry_best(job: Translation) -> None:
    """Carry the choice of the best checkpoint over."""
    wanted, given = job.take("load_best_model_at_end"), job.take("metric_for_best_model")
    greater, patience = job.take("greater_is_better"), job.take("early_stopping_patience")
    if not wanted:
        for key, value in (("metric_for_best_model", given), ("early_stopping_patience", patience)):
            if value not in OFF:
                job.drop(f"{key}: {value}", "load_best_model_at_end is not true")
        return
    metric = f"eval_{str(given or 'loss').removeprefix('eval_')}"
    mode = "min" if (metric.endswith("loss") if greater is None else not greater) else "max"
    said = f"load_best_model_at_end: true, metric_for_best_model: {given or 'loss (its default)'}"
    if job.get("training.eval_steps") is None:
        job.lose(said, "there is no data to evaluate on")
        return
    job.put("training.keep_best", {"metric": metric, "mode": mode})
    job.note(said, f"training.keep_best: {short(job.get('training.keep_best'))}")
    if patience not in OFF:
        job.put("training.early_stopping", {"patience": int(patience)})
        job.note(f"early_stopping_patience: {patience}", f"training.early_stopping.patience: {patience}")


def _carry_trackers(job: Translation) -> None:
    asked = job.take("report_to")
    asked = [asked] if isinstance(asked, str) else list(asked or [])
    asked += ["wandb"] if job.has("wandb_project", "use_wandb") and "wandb" not in asked else []
    trackers = [name for name in asked if name in TRACKERS]
    if trackers:
        job.put("training.report_to", trackers)
        job.note(f"report_to: {short(asked)}", f"training.report_to: {short(trackers)}")
    if others := [name for name in asked if name not in trackers]:
        job.drop(f"report_to: {', '.join(others)}", f"trackers are {', '.join(TRACKERS)}")
    for key in ("wandb_project", "use_wandb", "wandb_entity", "wandb_watch"):
        if job.has(key):
            job.drop(f"{key}: {short(job.take(key))}", "the environment of wandb decides: WANDB_PROJECT, WANDB_ENTITY")
    key, name = job.take_named("run_name", "wandb_name")
    if name not in OFF and {"wandb", "trackio"} & set(trackers):
        job.put("training.run_name", str(name))
        job.note(f"{key}: {name}", f"training.run_name: {name}")
    elif name not in OFF:
        job.drop(f"{key}: {name}", "it is for wandb and trackio")


def _carry_upload(job: Translation) -> None:
    pushes, name, private = job.take("push_to_hub"), job.take("hub_model_id"), job.take("hub_private_repo")
    said = ", ".join(
        f"{key}: {short(value)}" for key, value in (("push_to_hub", pushes), ("hub_model_id", name)) if value
    )
    if name in OFF and not pushes:
        return
    if pushes is False or "/" not in str(name):
        job.drop(said, "nothing is uploaded: set training.hub_model_id to owner/name for that")
        return
    job.put("training.hub_model_id", str(name))
    job.note(said, f"training.hub_model_id: {name}")
    if private is not None:
        job.put("training.hub_private_repo", bool(private))
        job.note(f"hub_private_repo: {short(private)}", f"training.hub_private_repo: {short(private)}")

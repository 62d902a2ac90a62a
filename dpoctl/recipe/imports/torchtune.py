"""Configs of torchtune."""

import re
from typing import Any

from dpoctl.errors import UsageError
from dpoctl.recipe.imports import trainer
from dpoctl.recipe.imports.reading import Foreign
from dpoctl.recipe.imports.translation import OFF, Translation, short

DATASETS: dict[str, dict[str, Any]] = {
    "alpaca_dataset": {"path": "tatsu-lab/alpaca", "format": "alpaca"},
    "alpaca_cleaned_dataset": {"path": "yahma/alpaca-cleaned", "format": "alpaca"},
    "slimorca_dataset": {"path": "Open-Orca/SlimOrca-Dedup", "format": "sharegpt"},
    "stack_exchange_paired_dataset": {"path": "lvwerra/stack-exchange-paired", "format": "stack-exchange-paired"},
    "hh_rlhf_helpful_dataset": {"path": "RLHFlow/HH-RLHF-Helpful-standard"},
}
"""Data sets that torchtune builds in."""
OPTIMIZERS = {
    "AdamW": "adamw",
    "Adam": "adamw",
    "AdamW8bit": "adamw_8bit",
    "PagedAdamW": "paged_adamw_32bit",
    "PagedAdamW8bit": "paged_adamw_8bit",
    "RMSprop": "rmsprop",
}
MODULES = {"output_proj": "o_proj"}
MLP = ["gate_proj", "up_proj", "down_proj"]
NEEDLESS = {
    "device": "the accelerator of the machine is used",
    "metric_logger": "every run writes metrics.jsonl and report.html",
    "profiler": "no profiler",
    "log_peak_memory_stats": "memory is logged",
    "log_level": "no levels",
    "enable_activation_checkpointing": "as few layers are recomputed as the memory allows",
    "enable_activation_offloading": "as few layers are recomputed as the memory allows",
    "custom_sharded_layers": "training.sharding: auto decides",
    "fsdp_cpu_offload": "set training.cpu_offload: true where memory is short",
    "fsdp_reshard_after_forward": "training.sharding: auto decides",
    "shuffle": "every epoch has its own order",
    "save_adapter_weights_only": "an adapter is saved alone",
    "save_last_epoch_only": "training.save_steps decides",
    "enable_async_checkpointing": "checkpoints are written beside the training",
    "optimizer_in_bwd": "it needs no accumulation; memory is planned otherwise",
    "memory_format": "no such setting",
}


def method_of(foreign: Foreign) -> str:
    """Return the method of a config, by its loss.

    Raises:
        UsageError: It is for a method that dpoctl does not have.
    """
    kind = _component(foreign.config.get("loss"))
    if any(word in kind for word in ("PPO", "GRPO", "Distill", "ForwardKL")):
        raise UsageError(f"loss: {kind} is of a method that dpoctl does not have", hint="it has SFT and DPO")
    return "dpo" if kind in ("DPOLoss", "RSOLoss", "SimPOLoss", "IPOLoss") else "sft"


def translate(job: Translation, foreign: Foreign, method: str) -> None:
    """Turn a config of torchtune into a recipe."""
    _resolve(foreign.config, job)
    job.put("method", method)
    _model(job)
    _data(job, method)
    loss = job.take("loss")
    if method == "dpo":
        _loss(job, dict(loss))
    elif loss:
        job.note(f"loss: {_component(loss)}", "the negative log-likelihood of the answers")
    output = job.take("output_dir")
    job.put("training.output_dir", str(output or "runs/torchtune"))
    job.note(f"output_dir: {output}", f"training.output_dir: {output}")
    trainer.carry_batch(job, ("batch_size",), default=2)
    _length_of_run(job)
    _optimizer(job)
    clip = job.take("clip_grad_norm")
    norm = None if clip in (None, "null") else float(clip)
    if norm is None:
        job.change("clip_grad_norm: null", "training.max_grad_norm", None, "without this key a recipe clips to 1.0")
    else:
        job.put("training.max_grad_norm", norm)
        job.note(f"clip_grad_norm: {clip}", f"training.max_grad_norm: {norm}")
    if (seed := job.take("seed")) is not None:
        job.put("training.seed", int(seed))
        job.note(f"seed: {seed}", f"training.seed: {seed}")
    else:
        job.drop("seed: null", "a recipe always has a seed: 42")
    job.carry("log_every_n_steps", "training.logging_steps")
    job.carry("compile", "training.torch_compile")
    for key, why in NEEDLESS.items():
        if (value := job.take(key)) not in OFF:
            said = _component(value) if isinstance(value, dict) else short(value)
            job.drop(f"{key}: {said}", why)
    job.finish()


def _component(section: Any) -> str:
    """Return the last part of the component of a section; empty if it has none."""
    return str(section.get("_component_", "")).rpartition(".")[2] if isinstance(section, dict) else ""


def _resolve(config: dict[str, Any], job: Translation) -> None:
    """Replace `${key}` in the texts of the sections that are still to be read."""
    texts = {key: str(value) for key, value in config.items() if isinstance(value, str | int)}

    def resolved(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: resolved(item) for key, item in value.items()}
        if isinstance(value, list):
            return [resolved(item) for item in value]
        return (
            re.sub(r"\$\{(\w+)\}", lambda found: texts.get(found[1], found[0]), value)
            if isinstance(value, str)
            else value
        )

    job.replace(resolved)


def _model(job: Translation) -> None:
    model, checkpointer = dict(job.take("model", default={})), dict(job.take("checkpointer", default={}))
    path = str(checkpointer.get("checkpoint_dir") or "").rstrip("/")
    builder = str(model.pop("_component_", ""))
    if not path:
        raise UsageError("the config names no model", hint="it needs checkpointer.checkpoint_dir")
    why = f"the folder of a model in the layout of transformers ({builder})"
    job.change(f"checkpointer.checkpoint_dir: {path}", "model.model_name_or_path", path, why)
    if (
        _component(checkpointer | {"_component_": str(checkpointer.get("_component_", ""))})
        == "FullModelMetaCheckpointer"
    ):
        job.lose("FullModelMetaCheckpointer", "dpoctl reads models in the layout of transformers, not that of Meta")
    dtype = str(job.take("dtype", default="bf16"))
    precision = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(dtype, "auto")
    job.put("model.dtype", precision)
    rank = model.pop("lora_rank", None)
    if rank is None:
        why = "the precision of the computation; weights that are trained stay float32, unless param_dtype is bfloat16"
        job.change(f"dtype: {dtype}", "model.dtype", precision, why)
        return
    job.note(f"dtype: {dtype}", f"model.dtype: {precision}")
    _adapter(job, model, int(rank))
    if "qlora" in builder or model.pop("quantize_base", False):
        job.put("quantization.load_in_4bit", True)
        job.note(builder, "quantization.load_in_4bit: true")
    for key, value in model.items():
        if value not in OFF:
            job.lose(f"model.{key}: {short(value)}", "no such setting of a model or an adapter")


def _adapter(job: Translation, model: dict[str, Any], rank: int) -> None:
    modules = [MODULES.get(name, name) for name in model.pop("lora_attn_modules", [])]
    modules += MLP if model.pop("apply_lora_to_mlp", False) else []
    modules += ["lm_head"] if model.pop("apply_lora_to_output", False) else []
    alpha, dropout = float(model.pop("lora_alpha", 16)), float(model.pop("lora_dropout", 0) or 0)
    model.pop("quantize_base", None) if not model.get("quantize_base") else None
    job.put("lora", {"r": rank, "lora_alpha": alpha, "target_modules": modules})
    job.note("model.lora_*", f"lora: {short(job.get('lora'))}")
    if dropout and job.get("method") == "sft":
        job.put("lora.lora_dropout", dropout)
        job.change(f"model.lora_dropout: {dropout}", "model.disable_dropout", False, "lora.lora_dropout needs it")
    elif dropout:
        job.drop(f"model.lora_dropout: {dropout}", "dropout is off in preference training")


def _data(job: Translation, method: str) -> None:
    listed, tokenizer = job.take("dataset"), dict(job.take("tokenizer", default={}))
    sections = listed if isinstance(listed, list) else [listed]
    sources = [_source(job, dict(one), method) for one in sections if one]
    if not sources:
        raise UsageError("the config names no data set", hint="it needs dataset")
    job.put("data.train", sources)
    for source in sources:
        job.note("dataset", f"data.train: {short(source)}")
    length = tokenizer.get("max_seq_len")
    if length is None:
        why = "nothing is cut; longer rows than this would be dropped"
        job.change("tokenizer.max_seq_len: null", "data.max_length", trainer.WHOLE, why)
    else:
        job.put("data.overlong", "truncate")
        why = "longer rows are cut: the prompt first, where it takes more than its share, then the end of the answer"
        job.change(f"tokenizer.max_seq_len: {length}", "data.max_length", int(length), why)


def _source(job: Translation, one: dict[str, Any], method: str) -> dict[str, Any]:
    kind = str(one.pop("_component_", "")).rpartition(".")[2]
    known = DATASETS.get(kind)
    path, files = one.pop("source", None), one.pop("data_files", None)
    if path is None and known is None:
        job.lose(f"dataset: {kind}", "this built-in data set is not known here: write its hub id")
        path = kind
    source: dict[str, Any] = {**(known or {}), **({"path": str(path)} if path is not None else {})}
    if source["path"] in ("json", "csv", "parquet", "text") and files:
        source["path"] = str(files)
    elif split := one.pop("split", None):
        source["split"] = str(split)
    one.pop("split", None)
    columns = one.pop("column_map", None)
    if columns:
        job.alter(f"dataset.column_map: {short(columns)}", "column_map", "by the names of columns in dpoctl's formats")
        source["column_map"] = {str(key): str(value) for key, value in columns.items()}
    if one.pop("packed", False):
        trainer.lose_packing(job, "dataset.packed: true")
    trains_on_input = one.pop("train_on_input", kind in ("alpaca_dataset", "alpaca_cleaned_dataset"))
    if trains_on_input and method == "sft":
        job.lose("dataset.train_on_input: true (its default for alpaca)", "a recipe trains on answers alone")
    for key, value in one.items():
        if value not in OFF:
            job.lose(f"dataset.{key}: {short(value)}", "the format of the rows is detected")
    return source


def _loss(job: Translation, loss: dict[str, Any]) -> None:
    reference = str(dict(job.take("ref_checkpointer", default={})).get("checkpoint_dir") or "").rstrip("/")
    if reference and reference == job.get("model.model_name_or_path"):
        job.drop(f"ref_checkpointer: {reference}", "the reference is the policy as it is before training")
    elif reference:
        job.put("dpo.reference.path", reference)
        job.note(f"ref_checkpointer.checkpoint_dir: {reference}", f"dpo.reference.path: {reference}")
    kind = _component(loss)
    beta, smoothing = float(loss.get("beta", 0.1)), float(loss.get("label_smoothing", 0.0))
    name = {"DPOLoss": "sigmoid", "RSOLoss": "hinge", "IPOLoss": "ipo", "SimPOLoss": "simpo"}[kind]
    spec: dict[str, Any] = {"type": name, "beta": beta}
    if kind == "RSOLoss":
        spec["beta"] = float(loss.get("gamma", 0.1))
    if smoothing and name == "sigmoid":
        spec["label_smoothing"] = smoothing
    if kind == "SimPOLoss":
        beta, gamma = float(loss.get("beta", 2.0)), float(loss.get("gamma", 0.5))
        spec |= {"beta": beta, "gamma_beta_ratio": round(gamma / beta, 10)}
    job.put("dpo.loss", spec)
    job.note(f"loss: {kind}", f"dpo.loss: {short(spec)}")


def _length_of_run(job: Translation) -> None:
    epochs, most = job.take("epochs", default=1), job.take("max_steps_per_epoch")
    if most in (None, "null"):
        job.put("training.num_train_epochs", float(epochs))
        job.note(f"epochs: {epochs}", f"training.num_train_epochs: {float(epochs)}")
    else:
        why = f"{most} steps x {epochs} epochs; a smaller data set ends an epoch earlier there"
        job.change(f"max_steps_per_epoch: {most}, epochs: {epochs}", "training.max_steps", int(most) * int(epochs), why)


def _optimizer(job: Translation) -> None:
    optimizer, schedule = dict(job.take("optimizer", default={})), job.take("lr_scheduler")
    kind = _component(optimizer)
    optimizer.pop("_component_", None)
    name = OPTIMIZERS.get(kind)
    if name is None:
        job.lose(f"optimizer: {kind}", "this optimizer is not offered; the recipe has adamw")
    job.put("training.optim", name or "adamw")
    job.put("training.learning_rate", float(optimizer.pop("lr", 2e-5)))
    decay = float(optimizer.pop("weight_decay", 0.01 if kind in ("AdamW", "AdamW8bit") else 0.0))
    job.put("training.weight_decay", decay)
    ours = {key: job.get(f"training.{key}") for key in ("optim", "learning_rate", "weight_decay")}
    job.note(f"optimizer: {kind}", f"training: {short(ours)}")
    if decay:
        job.change(f"weight_decay: {decay}", "training.weight_decay", decay, "biases and norms have none here")
    optimizer.pop("fused", None)
    for key, value in optimizer.items():
        if value not in OFF:
            job.lose(f"optimizer.{key}: {short(value)}", "no such setting")
    if not isinstance(schedule, dict):
        job.put("training.lr_scheduler_type", "constant")
        job.put("training.warmup_steps", 0)
        job.note("no lr_scheduler", "training.lr_scheduler_type: constant, no warm-up")
        return
    steps = int(schedule.get("num_warmup_steps") or 0)
    job.put("training.lr_scheduler_type", "cosine")
    job.put("training.warmup_steps", steps)
    theirs = f"lr_scheduler: {_component(schedule)}, num_warmup_steps: {steps}"
    job.note(theirs, f"training.lr_scheduler_type: cosine, warmup_steps: {steps}")

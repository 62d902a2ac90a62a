"""Configs of LLaMA-Factory."""

import json
from pathlib import Path
from typing import Any

from dpoctl.errors import UsageError
from dpoctl.recipe.imports import trainer
from dpoctl.recipe.imports.losses import carry_loss
from dpoctl.recipe.imports.reading import Foreign
from dpoctl.recipe.imports.translation import OFF, Translation, short

STAGES = {"sft": "sft", "dpo": "dpo", "kto": "dpo"}
LOSSES = {
    "sigmoid": "sigmoid",
    "hinge": "hinge",
    "ipo": "ipo",
    "kto_pair": "kto_pair",
    "orpo": "orpo",
    "simpo": "simpo",
}
LORA = {
    "r": ("lora_rank",),
    "lora_alpha": ("lora_alpha",),
    "lora_dropout": ("lora_dropout",),
    "modules_to_save": ("additional_target",),
}
FORMATS = {("sharegpt", False): "sharegpt", ("alpaca", False): "alpaca"}
FORMATS |= {("sharegpt", True): "sharegpt-ranking", ("alpaca", True): "alpaca-ranking"}
COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations"}
"""Names of columns in `dataset_info.json`, and those that they have by default."""
TEMPLATES = {"llama3": "llama3", "chatml": "chatml", "zephyr": "zephyr"}


def method_of(foreign: Foreign) -> str:
    """Return the method of a config.

    Raises:
        UsageError: It is for a method that dpoctl does not have.
    """
    stage = str(foreign.config.get("stage") or "sft")
    if stage not in STAGES:
        raise UsageError(f"stage: {stage} is a method that dpoctl does not have", hint=f"it has {', '.join(STAGES)}")
    return STAGES[stage]


def translate(job: Translation, foreign: Foreign, method: str) -> None:
    """Turn a config of LLaMA-Factory into a recipe."""
    stage = job.take("stage", default="sft")
    job.put("method", method)
    job.note(f"stage: {stage}", f"method: {method}")
    if job.has("adapter_name_or_path"):
        job.drop(f"model_name_or_path: {job.take('model_name_or_path')}", "the adapter names its base")
    else:
        job.carry("model_name_or_path", "model.model_name_or_path")
    job.carry("model_revision", "model.revision")
    if job.get("model.revision") == "main":
        job.recipe["model"].pop("revision")
    trainer.carry_precision(job, default="float32")
    _template(job)
    _adapter(job)
    has_eval = _data(job, foreign)
    _loss(job, stage) if method == "dpo" else _sft(job)
    job.carry("output_dir", "training.output_dir", default="saves")
    trainer.carry_batch(job, ("per_device_train_batch_size",), default=8)
    trainer.carry_length(job, "num_train_epochs", default=3.0)
    job.carry("learning_rate", "training.learning_rate", default=5e-5)
    trainer.carry_schedule(job, "lr_scheduler_type", default="linear", warmup=("warmup_steps", 0))
    trainer.carry_cadence(job, has_eval=has_eval)
    trainer.carry_rest(job)


def _template(job: Translation) -> None:
    template = job.take("template")
    flash = job.take("flash_attn")
    if flash not in OFF:
        job.drop(f"flash_attn: {flash}", "an attention that computes shared prompts once is chosen by itself")
    if template in TEMPLATES:
        why = "compare the texts with dpoctl inspect"
        job.change(f"template: {template}", "model.chat_template", TEMPLATES[template], why)
    elif template not in OFF:
        why = "LLaMA-Factory has a template of this name; the tokenizer's own is used here: compare with dpoctl inspect"
        job.alter(f"template: {template}", "model.chat_template: null", why)


def _adapter(job: Translation) -> None:
    kind = job.take("finetuning_type", default="lora")
    if kind not in ("lora", "full"):
        raise UsageError(f"finetuning_type: {kind} is not offered", hint="full and lora are")
    bits, start = job.take("quantization_bit"), job.take("adapter_name_or_path")
    target = job.take("lora_target")
    double, quant = job.take("double_quantization", default=True), job.take("quantization_type", default="nf4")
    if kind == "full":
        job.note("finetuning_type: full", "no section lora")
        return
    job.note("finetuning_type: lora", "lora")
    if start not in OFF:
        why = "the adapter names its base"
        job.change(f"adapter_name_or_path: {start}", "model.model_name_or_path", str(start), why)
        if not job.take("create_new_adapter"):
            job.put("lora.start", "continue")
            job.take("lora_rank", "lora_alpha", "lora_dropout", "additional_target")
            job.note("create_new_adapter: false", "lora.start: continue, which keeps the adapter's settings")
            return
    rank = job.peek("lora_rank", 8)
    trainer.carry_lora(job, LORA, r=8, alpha=2.0 * rank, dropout=0.0)
    trainer.carry_targets(job, "lora_target", target, everything=("all",), default="all")
    if bits in (4, 8):
        job.put(f"quantization.load_in_{bits}bit", True)
        job.note(f"quantization_bit: {bits}", f"quantization.load_in_{bits}bit: true")
    if bits == 4:
        job.put("quantization.bnb_4bit_quant_type", quant)
        job.put("quantization.bnb_4bit_use_double_quant", bool(double))


def _data(job: Translation, foreign: Foreign) -> bool:
    """Carry the data over, and return whether there is any to evaluate on."""
    names, limit = job.take("dataset"), job.take("max_samples")
    folder = foreign.folder / str(job.take("dataset_dir", default="data"))
    if names in OFF:
        raise UsageError("the config names no data set", hint="it needs dataset")
    split = names if isinstance(names, list) else [part.strip() for part in str(names).split(",")]
    job.put("data.train", [_source(job, name, folder, limit) for name in split])
    held, size = job.take("eval_dataset"), job.take("val_size", default=0)
    if held not in OFF:
        parts = held if isinstance(held, list) else [part.strip() for part in str(held).split(",")]
        job.put("data.eval", [_source(job, name, folder, limit) for name in parts])
    elif size:
        value = float(size) if size < 1 else int(size)
        job.change(f"val_size: {size}", "data.eval_size", value, "held out from the training rows by another seed")
    length = job.take("cutoff_len")
    said = f"cutoff_len: {length}" if length else "cutoff_len: 2048 (its default)"
    why = "longer rows are cut: the prompt first, where it takes more than its share, then the end of the answer"
    job.change(said, "data.max_length", int(length or 2048), why)
    job.put("data.overlong", "truncate")
    return held not in OFF or bool(size)


def _source(job: Translation, name: str, folder: Path, limit: Any) -> dict[str, Any]:
    entry = _entry(name, folder)
    more: dict[str, Any] = {"max_samples": int(limit)} if limit else {}
    if more:
        why = "there the first rows, here some in random order, and those that cannot be used do not count"
        job.alter(f"max_samples: {limit}", f"max_samples: {limit} of {name}", why)
    if entry is None:
        why = f"{name} is a name in dataset_info.json, which is not in {folder}: write the file or the hub id here"
        job.lose(f"dataset: {name}", why)
        return {"path": name, **more}
    hub, file = entry.get("hf_hub_url"), entry.get("file_name")
    source: dict[str, Any] = {"path": str(hub) if hub else str(folder / str(file))}
    if hub:
        source |= {key: str(entry[key]) for key in ("split",) if entry.get(key)}
        source |= {"name": str(entry["subset"])} if entry.get("subset") else {}
    kind = FORMATS[(str(entry.get("formatting") or "alpaca"), bool(entry.get("ranking")))]
    columns = {COLUMNS.get(key, key): str(value) for key, value in (entry.get("columns") or {}).items()}
    renamed = {key: value for key, value in columns.items() if key != value}
    source |= {"format": kind, **({"column_map": renamed} if renamed else {}), **more}
    job.note(f"dataset: {name}", short(source))
    return source


def _entry(name: str, folder: Path) -> dict[str, Any] | None:
    try:
        info = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    entry = info.get(name) if isinstance(info, dict) else None
    return entry if isinstance(entry, dict) and (entry.get("hf_hub_url") or entry.get("file_name")) else None


def _loss(job: Translation, stage: str) -> None:
    kind = "kto" if stage == "kto" else str(job.take("pref_loss", default="sigmoid"))
    beta = float(job.peek("pref_beta", job.peek("dpo_beta", 0.1)))
    weight = float(job.take("pref_ftx", "dpo_ftx", default=0) or 0)
    if kind == "kto_pair":
        job.lose(
            "pref_loss: kto_pair", "pairs as labels: convert them with dpoctl convert-data --to unpaired, and use kto"
        )
        kind = "sigmoid"
    if kind == "simpo":
        gamma = float(job.take("simpo_gamma", default=0.5))
        ratio = round(gamma / beta, 10)
        job.put("dpo.loss", {"type": "simpo", "beta": beta, "gamma_beta_ratio": ratio})
        job.note(f"pref_loss: simpo, pref_beta: {beta}", f"dpo.loss: {short(job.get('dpo.loss'))}")
        job.change(f"simpo_gamma: {gamma}", "dpo.loss.gamma_beta_ratio", ratio, f"gamma / beta = {gamma} / {beta}")
    elif kind in ("orpo", "kto"):
        job.put("dpo.loss", {"type": kind, "beta": beta})
        job.note(f"pref_loss: {kind}, pref_beta: {beta}", f"dpo.loss: {short(job.get('dpo.loss'))}")
    else:
        smoothing = float(job.take("dpo_label_smoothing", default=0) or 0)
        carry_loss(job, beta_keys=("pref_beta", "dpo_beta"), kinds=kind, name="pref_loss")
        if smoothing and kind == "sigmoid":
            job.put("dpo.loss.label_smoothing", smoothing)
            theirs = f"dpo_label_smoothing: {smoothing}"
            job.note(theirs, f"dpo.loss.label_smoothing: {smoothing}")
    job.take("pref_beta", "dpo_beta")
    if weight:
        job.put("dpo.loss.sft_weight", weight)
        job.note(f"pref_ftx: {weight}", f"dpo.loss.sft_weight: {weight}")
    if job.has("ref_model"):
        job.carry("ref_model", "dpo.reference.path")


def _sft(job: Translation) -> None:
    if job.take("train_on_prompt"):
        job.lose("train_on_prompt: true", "a recipe trains on answers alone")
    if job.take("mask_history"):
        job.put("sft.loss_on", "last")
        job.note("mask_history: true", "sft.loss_on: last")
    for key in ("packing", "neat_packing"):
        if job.take(key):
            trainer.lose_packing(job, f"{key}: true")

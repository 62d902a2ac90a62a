"""Configs of axolotl."""

from typing import Any

from dpoctl.errors import UsageError
from dpoctl.recipe.imports import trainer
from dpoctl.recipe.imports.losses import carry_loss
from dpoctl.recipe.imports.reading import Foreign
from dpoctl.recipe.imports.translation import OFF, Translation, fits, short

METHODS = {"dpo": "sigmoid", "ipo": "ipo", "orpo": "orpo", "simpo": "simpo", "kto": "kto"}
"""Values of `rl`, and the losses that they are."""
LORA = {
    "r": ("lora_r", "peft_r"),
    "lora_alpha": ("lora_alpha",),
    "lora_dropout": ("lora_dropout",),
    "modules_to_save": ("lora_modules_to_save",),
}
FORMATS = {
    "alpaca": "alpaca",
    "sharegpt": "sharegpt",
    "completion": "text",
    "chatml.intel": "orca",
    "llama3.intel": "orca",
}
"""Types of data sets, and the formats of the same rows; dpoctl detects the others."""
TEMPLATES = ("chatml", "llama3")


def method_of(foreign: Foreign) -> str:
    """Return the method of a config.

    Raises:
        UsageError: It is for a method that dpoctl does not have.
    """
    kind = foreign.config.get("rl")
    if kind in OFF:
        return "sft"
    if kind not in METHODS:
        raise UsageError(f"rl: {kind} is a method that dpoctl does not have", hint=f"it has {', '.join(METHODS)}")
    return "dpo"


def translate(job: Translation, foreign: Foreign, method: str) -> None:
    """Turn a config of axolotl into a recipe."""
    kind = job.take("rl")
    job.put("method", method)
    job.carry("base_model", "model.model_name_or_path")
    job.carry("revision_of_model", "model.revision")
    _tokens(job)
    trainer.carry_precision(job, default="float32")
    _attention(job)
    _template(job)
    _adapter(job)
    has_eval = _data(job)
    if method == "dpo":
        job.note(f"rl: {kind}", f"dpo.loss: {METHODS[kind]}")
        _loss(job, kind)
    else:
        _sft(job)
    job.carry("output_dir", "training.output_dir", default="./model-out")
    trainer.carry_batch(job, ("micro_batch_size",), default=1)
    trainer.carry_length(job, "num_epochs", default=1.0)
    job.carry("learning_rate", "training.learning_rate")
    job.carry("optimizer", "training.optim")
    trainer.carry_schedule(job, "lr_scheduler", default="cosine", warmup=("warmup_ratio", 0.03))
    _cadence(job, has_eval=has_eval)
    trainer.carry_rest(job)


def _attention(job: Translation) -> None:
    for key in ("flash_attention", "xformers_attention", "sdp_attention", "flex_attention", "eager_attention"):
        if job.has(key):
            job.take(key)
            job.drop(f"{key}: true", "an attention that computes shared prompts once is chosen by itself")


def _tokens(job: Translation) -> None:
    """Report the tokens that the config adds to the tokenizer, or changes in it."""
    if job.peek("tokenizer_type") == "AutoTokenizer":
        job.drop(f"tokenizer_type: {job.take('tokenizer_type')}", "it is the model's")
    tokens = job.take("special_tokens")
    if isinstance(tokens, dict) and tokens.pop("pad_token", None):
        job.drop("special_tokens.pad_token", "dpoctl does not pad")
    if tokens not in OFF:
        job.lose(f"special_tokens: {short(tokens)}", "the tokens are those of the tokenizer's files")


def _template(job: Translation) -> None:
    template, text = job.take("chat_template"), job.take("chat_template_jinja")
    if text not in OFF:
        job.templates[job.template] = str(text)
        job.change(f"chat_template_jinja: {short(text)}", "model.chat_template", job.template, "in a file")
    elif template in TEMPLATES:
        job.put("model.chat_template", template)
        job.note(f"chat_template: {template}", f"model.chat_template: {template}")
    elif template not in OFF and not str(template).startswith("tokenizer_default"):
        why = "axolotl has a template of this name; the tokenizer's own is used here: compare them with dpoctl inspect"
        job.alter(f"chat_template: {template}", "model.chat_template: null", why)


def _adapter(job: Translation) -> None:
    adapter = job.take("adapter")
    four, eight = job.take("load_in_4bit"), job.take("load_in_8bit")
    linear, targets = job.take("lora_target_linear"), job.take("lora_target_modules", "peft_target_modules")
    if adapter in OFF:
        for names in LORA.values():
            job.take(*names)
        return
    if adapter not in ("lora", "qlora"):
        raise UsageError(f"adapter: {adapter} is not offered", hint="adapters are lora and qlora")
    job.note(f"adapter: {adapter}", "lora")
    trainer.carry_lora(job, LORA, r=8, alpha=16.0, dropout=0.0)
    value = "all-linear" if linear else targets
    trainer.carry_targets(
        job,
        "lora_target_linear" if linear else "lora_target_modules",
        value,
        everything=("all-linear",),
        default="peft",
    )
    job.carry("peft_use_rslora", "lora.use_rslora")
    job.carry("peft_use_dora", "lora.use_dora") if fits("lora.use_dora", True) else None
    for key, value in (("load_in_4bit", four), ("load_in_8bit", eight)):
        if value:
            job.put(f"quantization.{key}", True)
            job.note(f"{key}: true", f"quantization.{key}: true")
    start = job.take("lora_model_dir")
    if start not in OFF:
        job.put("lora", {"start": "continue"})
        job.change(f"lora_model_dir: {start}", "model.model_name_or_path", str(start), "the adapter names its base")


def _data(job: Translation) -> bool:
    """Carry the data over, and return whether there is any to evaluate on."""
    listed = job.take("datasets") or []
    if not listed:
        raise UsageError("the config names no data set", hint="it needs datasets")
    job.put("data.train", [_source(job, one) for one in listed])
    for one, source in zip(listed, job.get("data.train"), strict=True):
        job.note(f"datasets: {one.get('path')}", f"data.train: {short(source)}")
    held, size = job.take("test_datasets"), job.take("val_set_size", default=0)
    if held not in OFF:
        job.put("data.eval", [_source(job, one) for one in held])
        job.note("test_datasets", f"data.eval: {short(job.get('data.eval'))}")
    elif size:
        value = float(size) if size < 1 else int(size)
        job.change(f"val_set_size: {size}", "data.eval_size", value, "held out from the training rows by another seed")
    length = job.take("sequence_len")
    said = f"sequence_len: {length}" if length else "sequence_len: 512 (its default)"
    strategy = job.take("excess_length_strategy", default="drop")
    job.put("data.max_length", int(length or 512))
    job.note(said, f"data.max_length: {int(length or 512)}")
    overlong = "truncate" if strategy == "truncate" else "drop"
    job.put("data.overlong", overlong)
    job.note(f"excess_length_strategy: {strategy}", f"data.overlong: {overlong}")
    return held not in OFF or bool(size)


def _source(job: Translation, one: dict[str, Any]) -> dict[str, Any]:
    files = one.get("data_files")
    path = str(one.get("path"))
    if path in ("json", "csv", "parquet", "text") and files:
        path, files = str(files[0] if isinstance(files, list) else files), None
    source: dict[str, Any] = {"path": path}
    if "." not in path.rpartition("/")[2] or path.count("/") == 1:
        source |= {"name": str(one["name"])} if one.get("name") else {}
        source |= {"split": str(one["split"])} if one.get("split") else {}
        source |= {"data_files": files if isinstance(files, list) else [files]} if files else {}
    kind = one.get("type")
    if isinstance(kind, str) and kind in FORMATS:
        source["format"] = FORMATS[kind]
        job.note(f"type: {kind}", f"format: {FORMATS[kind]}")
    elif kind not in OFF:
        said = f"type: {short(kind)}"
        job.change(
            said, "data.train.format", "auto", "the format is detected: `dpoctl convert-data FILE --detect` says it"
        )
        job.recipe["data"].pop("train", None)
    columns = {
        name: str(one[key])
        for key, name in (("field_messages", "messages"), ("field_chosen", "chosen"), ("field_rejected", "rejected"))
        if one.get(key) and one[key] != name and name != "messages"
    }
    if columns:
        source["column_map"] = columns
    return source


def _loss(job: Translation, kind: str) -> None:
    kinds = job.take("dpo_loss_type") if kind == "dpo" else None
    if kind == "orpo":
        key, beta = job.take_named("orpo_alpha", "rl_beta")
        beta = 0.1 if beta is None else float(beta)
        job.put("dpo.loss", {"type": "orpo", "beta": beta})
        job.note(f"{key}: {beta}", f"dpo.loss.beta: {beta}")
    elif kind == "simpo":
        beta, gamma = float(job.take("rl_beta", default=2.0)), float(job.take("simpo_gamma", default=0.5))
        ratio = round(gamma / beta, 10)
        job.put("dpo.loss", {"type": "simpo", "beta": beta, "gamma_beta_ratio": ratio})
        job.note(f"rl_beta: {beta}", f"dpo.loss.beta: {beta}")
        job.change(f"simpo_gamma: {gamma}", "dpo.loss.gamma_beta_ratio", ratio, f"gamma / beta = {gamma} / {beta}")
        if weight := job.take("cpo_alpha"):
            job.put("dpo.loss.sft_weight", float(weight))
            job.note(f"cpo_alpha: {weight}", f"dpo.loss.sft_weight: {weight}")
    else:
        carry_loss(job, beta_keys=("rl_beta", "dpo_beta"), kinds=kinds or METHODS[kind])
        if kind == "kto":
            job.carry("kto_desirable_weight", "dpo.loss.desirable_weight")
            job.carry("kto_undesirable_weight", "dpo.loss.undesirable_weight")


def _sft(job: Translation) -> None:
    if job.take("train_on_inputs"):
        job.lose("train_on_inputs: true", "a recipe trains on answers alone")
    roles = job.take("roles_to_train")
    if roles not in OFF and roles != ["assistant"]:
        job.lose(f"roles_to_train: {short(roles)}", "a recipe trains on the assistant's turns alone")
    if job.take("sample_packing"):
        trainer.lose_packing(job, "sample_packing: true")


def _cadence(job: Translation, *, has_eval: bool) -> None:
    for key, theirs in (("eval_steps", "evals_per_epoch"), ("save_steps", "saves_per_epoch")):
        times, steps = job.take(theirs), job.peek(key)
        said = f"{theirs}: {times}"
        if isinstance(steps, float) and 0 < steps < 1:
            times, said = job.take(key), f"{key}: {steps} of the run"
            steps = None
        if times and steps is None and (has_eval or key == "save_steps"):
            job.change(said, f"training.{key}", 100, "a recipe has a number of steps: set the one you want")
        elif times and steps is None:
            job.drop(said, "there is no data to evaluate on")
    if job.get("training.eval_steps") is not None:
        for key in ("eval_strategy", "evaluation_strategy"):
            job.take(key)
        trainer.carry_cadence(job, has_eval=False)
    else:
        trainer.carry_cadence(job, has_eval=has_eval)

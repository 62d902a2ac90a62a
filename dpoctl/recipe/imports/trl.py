"""Configs of TRL and of the alignment-handbook."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpoctl.errors import UsageError
from dpoctl.recipe.imports import trainer
from dpoctl.recipe.imports.losses import carry_loss
from dpoctl.recipe.imports.reading import Foreign
from dpoctl.recipe.imports.translation import OFF, Translation, short

RATES = {"dpo": 1e-6, "sft": 2e-5}
PREFERENCE_KEYS = ("beta", "loss_type", "max_prompt_length", "rpo_alpha", "ref_model_name_or_path", "ld_alpha")
OTHERS = ("num_generations", "reward_funcs", "reward_model_path", "center_rewards_coefficient", "kto_pair")
READERS = ("json", "csv", "parquet", "text")
LORA = {
    "r": ("lora_r",),
    "lora_alpha": ("lora_alpha",),
    "lora_dropout": ("lora_dropout",),
    "modules_to_save": ("lora_modules_to_save",),
}


def method_of(foreign: Foreign) -> str:
    """Return the method of a config: said by a command or a file name, or shown by its keys.

    Raises:
        UsageError: It is for a method that dpoctl does not have.
    """
    if found := next((key for key in OTHERS if key in foreign.config), None):
        raise UsageError(
            f"{found} is for a method that dpoctl does not have", hint="it has SFT and DPO and its relatives"
        )
    if any(key in foreign.config for key in PREFERENCE_KEYS):
        return "dpo"
    return foreign.method or "sft"


def translate(job: Translation, foreign: Foreign, method: str) -> None:
    """Turn a config of TRL into a recipe."""
    job.put("method", method)
    job.carry("model_name_or_path", "model.model_name_or_path")
    job.carry("model_revision", "model.revision")
    if job.get("model.revision") == "main":
        job.recipe["model"].pop("revision")
    trainer.carry_precision(job, default="bfloat16")
    job.carry("attn_implementation", "model.attn_implementation")
    _template(job)
    _adapter(job)
    has_eval = _data(job, foreign)
    if method == "dpo":
        carry_loss(job)
    else:
        _sft(job)
    job.carry("output_dir", "training.output_dir", default="trainer_output")
    trainer.carry_batch(job, ("per_device_train_batch_size",), default=8)
    trainer.carry_length(job, "num_train_epochs", default=3.0)
    job.carry("learning_rate", "training.learning_rate", default=RATES[method])
    trainer.carry_schedule(job, "lr_scheduler_type", default="linear", warmup=("warmup_steps", 0))
    trainer.carry_cadence(job, has_eval=has_eval)
    trainer.carry_rest(job)


def _template(job: Translation) -> None:
    key, template = job.take_named("chat_template", "chat_template_path")
    if template in OFF:
        return
    if "{%" in str(template) or "{{" in str(template):
        job.templates[job.template] = str(template)
        job.change(f"{key}: {short(template)}", "model.chat_template", job.template, "in a file of its own")
    else:
        job.change(f"{key}: {template}", "model.chat_template", str(template), "a name or a .jinja file here")


def _adapter(job: Translation) -> None:
    uses = job.take("use_peft")
    names = [name for keys in LORA.values() for name in keys] + ["lora_target_modules", "use_rslora", "use_dora"]
    if not uses:
        for key in names:
            if (value := job.take(key)) is not None:
                job.drop(f"{key}: {short(value)}", "use_peft is not true")
        return
    trainer.carry_lora(job, LORA, r=16, alpha=32.0, dropout=0.05)
    value = job.take("lora_target_modules")
    value = value[0] if isinstance(value, list) and value == ["all-linear"] else value
    trainer.carry_targets(job, "lora_target_modules", value, everything=("all-linear",), default="peft")
    for key in ("load_in_4bit", "load_in_8bit"):
        if job.take(key):
            job.put(f"quantization.{key}", True)
            job.note(f"{key}: true", f"quantization.{key}: true")
    if job.get("quantization.load_in_4bit"):
        job.carry("bnb_4bit_quant_type", "quantization.bnb_4bit_quant_type")
        job.carry("use_bnb_nested_quant", "quantization.bnb_4bit_use_double_quant", default=False)
        job.drop(
            f"bnb_4bit_compute_dtype: {short(job.take('bnb_4bit_compute_dtype'))}", "it is model.dtype"
        ) if job.has("bnb_4bit_compute_dtype") else None


def _sft(job: Translation) -> None:
    assistant, completion = job.take("assistant_only_loss"), job.take("completion_only_loss")
    if assistant or completion:
        job.note("assistant_only_loss" if assistant else "completion_only_loss", "a recipe trains on answers alone")
    else:
        why = "a recipe trains on answers alone; TRL trains on the prompts of conversations too, unless this is true"
        job.change("assistant_only_loss: false", "sft.loss_on", "assistant", why)
    if job.has("packing"):
        job.take("packing")
        trainer.lose_packing(job, "packing: true")
    for key in ("padding_free", "dataset_kwargs", "eval_packing", "packing_strategy"):
        if (value := job.take(key)) not in OFF:
            job.drop(f"{key}: {short(value)}", "dpoctl does not pad, and templates decide about special tokens")
    kind = job.take("loss_type")
    if kind not in (None, "nll"):
        job.lose(f"loss_type: {kind}", "the loss of SFT is the negative log-likelihood")


def _data(job: Translation, foreign: Foreign) -> bool:
    """Carry the data over, and return whether there is any to evaluate on."""
    asked = job.peek("eval_strategy", job.peek("evaluation_strategy", "no"))
    wants_eval = asked not in OFF or bool(job.take("do_eval"))
    train, test, size = _sources(job)
    if not train:
        raise UsageError("the config names no data set", hint="it needs dataset_name, datasets or dataset_mixture")
    job.put("data.train", [source for source, _ in train])
    for source, said in train:
        job.note(said, f"data.train: {short(source)}")
    has_eval = False
    if wants_eval and size:
        job.change(
            f"test_split_size: {size}", "data.eval_size", size, "held out from the training rows by another seed"
        )
        has_eval = True
    elif wants_eval and test:
        job.put("data.eval", [source for source, _ in test])
        for source, said in test:
            job.note(said, f"data.eval: {short(source)}")
        has_eval = True
    _lengths(job)
    return has_eval


def _lengths(job: Translation) -> None:
    is_set = any(job.peek(key) is not None for key in ("max_length", "max_seq_length"))
    key, given = job.take_named("max_length", "max_seq_length")
    prompt = job.take("max_prompt_length")
    mode = job.take("truncation_mode", default="keep_start")
    length = given if isinstance(given, int) else 1024
    said = f"{key}: {length}" + ("" if is_set else " (its default)")
    why = "longer rows are cut: the prompt first, where it takes more than its share, then the end of the answer"
    job.change(said, "data.max_length", length, why)
    job.put("data.overlong", "truncate")
    if prompt is not None and prompt < length:
        job.put("data.max_prompt_length", prompt)
        job.note(f"max_prompt_length: {prompt}", f"data.max_prompt_length: {prompt}")
    if mode == "keep_end":
        job.note("truncation_mode: keep_end", "data.prompt_truncation: keep_end")
    for key in ("max_completion_length", "max_target_length"):
        if (value := job.take(key)) is not None:
            job.lose(f"{key}: {value}", "max_length counts prompt and answer together")


Named = tuple[dict[str, Any], str]


def _sources(job: Translation) -> tuple[list[Named], list[Named], Any]:
    """Return the sources of training and of evaluation, each with the words of the config, and the size held out."""
    mixture, mixer = job.take("dataset_mixture"), job.take("dataset_mixer")
    listed = job.take("datasets")
    split, test = job.take("dataset_train_split", default="train"), job.take("dataset_test_split", default="test")
    config, size = job.take("dataset_config", "dataset_config_name"), job.take("test_split_size")
    if isinstance(mixture, dict):
        job.take("dataset_name")
        return [_of_mixture(job, one) for one in mixture.get("datasets") or []], [], mixture.get("test_split_size")
    if isinstance(mixer, dict):
        splits = job.take("dataset_splits", default=["train", "test"])
        held = [name for name in splits if "test" in name]
        train = list(_of_mixer(mixer, [name for name in splits if name not in held]))
        return train, list(_of_mixer(dict.fromkeys(mixer, 1.0), held)), None
    if isinstance(listed, list) and listed:
        job.take("dataset_name")
        return [_of_mixture(job, one) for one in listed], [], size
    name = job.take("dataset_name")
    if name is None:
        return [], [], None
    named = {"name": config} if config else {}
    kind = {} if Path(str(name)).suffix else named | {"split": split}
    train = [({"path": str(name), **kind}, f"dataset_name: {name}, split {split}")]
    held = [({"path": str(name), **named, "split": test}, f"dataset_name: {name}, split {test}")]
    return train, held if kind else [], size


def _of_mixture(job: Translation, one: dict[str, Any]) -> Named:
    path, files = str(one.get("id") or one.get("path")), one.get("data_files")
    source: dict[str, Any] = {"path": path}
    if path in READERS and files:
        source["path"] = str(files[0] if isinstance(files, list) else files)
    else:
        if config := one.get("config") or one.get("name"):
            source |= {} if config == "default" else {"name": config}
        source["split"] = one.get("split") or "train"
        source |= {"data_files": files if isinstance(files, list) else [files]} if files else {}
    weight = one.get("weight", one.get("fraction"))
    if weight not in (None, 1, 1.0):
        source["weight"] = float(weight)
        why = "there a fixed part of the rows, here a random part in every epoch"
        job.alter(f"weight {weight} of {path}", f"weight: {float(weight)}", why)
    return source, f"{path}, split {source.get('split', 'train')}"


def _of_mixer(mixer: dict[str, Any], splits: list[str]) -> Iterator[Named]:
    for name, weight in mixer.items():
        for split in splits:
            more = {} if float(weight) == 1.0 else {"weight": float(weight)}
            yield {"path": name, "split": split, **more}, f"dataset_mixer: {name}: {weight}, split {split}"

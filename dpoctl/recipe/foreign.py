"""What other tools, and older recipes, call our keys."""

from collections.abc import Iterable, Mapping
from typing import Any

KEYS: dict[str, str] = {
    "base_model": "model.model_name_or_path",
    "model_id": "model.model_name_or_path",
    "model_name": "model.model_name_or_path",
    "pretrained_model_name_or_path": "model.model_name_or_path",
    "checkpoint_dir": "model.model_name_or_path",
    "adapter_name_or_path": "model.model_name_or_path",
    "model_revision": "model.revision",
    "torch_dtype": "model.dtype",
    "precision": "model.dtype",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "tf32": "model.dtype",
    "flash_attention": "model.attn_implementation",
    "flash_attn": "model.attn_implementation",
    "use_flash_attention_2": "model.attn_implementation",
    "template": "model.chat_template",
    "use_peft": "lora",
    "peft": "lora",
    "peft_config": "lora",
    "adapter": "lora",
    "finetuning_type": "lora",
    "quantization_bit": "quantization.load_in_4bit",
    "use_bnb_nested_quant": "quantization.bnb_4bit_use_double_quant",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "rank": "lora.r",
    "alpha": "lora.lora_alpha",
    "dropout": "lora.lora_dropout",
    "lora_target": "lora.target_modules",
    "lora_target_modules": "lora.target_modules",
    "lora_target_linear": "lora.target_modules",
    "lora_attn_modules": "lora.target_modules",
    "lora_modules_to_save": "lora.modules_to_save",
    "dataset": "data.train",
    "datasets": "data.train",
    "dataset_name": "data.train",
    "dataset_mixer": "data.train",
    "dataset_mixture": "data.train",
    "train_dataset": "data.train",
    "dataset_train_split": "data.train",
    "eval_dataset": "data.eval",
    "test_datasets": "data.eval",
    "dataset_test_split": "data.eval",
    "val_size": "data.eval_size",
    "val_set_size": "data.eval_size",
    "test_size": "data.eval_size",
    "cutoff_len": "data.max_length",
    "sequence_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "model_max_length": "data.max_length",
    "truncation_mode": "data.prompt_truncation",
    "assistant_only_loss": "sft.loss_on",
    "completion_only_loss": "sft.loss_on",
    "train_on_inputs": "sft.loss_on",
    "dpo.beta": "dpo.loss.beta",
    "beta": "dpo.loss.beta",
    "dpo_beta": "dpo.loss.beta",
    "rl_beta": "dpo.loss.beta",
    "pref_beta": "dpo.loss.beta",
    "loss_type": "dpo.loss.type",
    "pref_loss": "dpo.loss.type",
    "rl": "method",
    "stage": "method",
    "trainer": "method",
    "task": "method",
    "dpo_label_smoothing": "dpo.loss.label_smoothing",
    "reference_free": "dpo.loss.reference_free",
    "loss_weights": "dpo.loss",
    "mode_loss": "dpo.loss.type",
    "mode_weight": "dpo.loss.filter_ratio",
    "dpo.loss.a": "dpo.loss.alpha",
    "dpo.loss.gamma": "dpo.loss.gamma_beta_ratio",
    "simpo_gamma": "dpo.loss.gamma_beta_ratio",
    "rpo_alpha": "dpo.loss.sft_weight",
    "cpo_alpha": "dpo.loss.sft_weight",
    "pref_ftx": "dpo.loss.sft_weight",
    "orpo_alpha": "dpo.loss.beta",
    "dpop_lambda": "dpo.loss.penalty",
    "discopop_tau": "dpo.loss.tau",
    "ld_alpha": "dpo.loss.alpha",
    "f_divergence_type": "dpo.loss.divergence",
    "f_alpha_divergence_coef": "dpo.loss.alpha",
    "kto_desirable_weight": "dpo.loss.desirable_weight",
    "kto_undesirable_weight": "dpo.loss.undesirable_weight",
    "kto_chosen_weight": "dpo.loss.desirable_weight",
    "kto_rejected_weight": "dpo.loss.undesirable_weight",
    "use_weighting": "dpo.loss.type",
    "ref_model": "dpo.reference.path",
    "ref_model_name_or_path": "dpo.reference.path",
    "precompute_ref_log_probs": "dpo.reference.mode",
    "sync_ref_model": "dpo.reference.sync_steps",
    "ref_model_sync_steps": "dpo.reference.sync_steps",
    "ref_model_mixup_alpha": "dpo.reference.sync_alpha",
    "batch_size": "training.global_batch_size",
    "micro_batch_size": "training.global_batch_size",
    "per_device_train_batch_size": "training.global_batch_size",
    "per_device_eval_batch_size": "training.max_tokens_per_device",
    "eval_batch_size": "training.max_tokens_per_device",
    "gradient_accumulation_steps": "training.global_batch_size",
    "lr": "training.learning_rate",
    "lr_scheduler": "training.lr_scheduler_type",
    "scheduler": "training.lr_scheduler_type",
    "warmup": "training.warmup_ratio",
    "num_epochs": "training.num_train_epochs",
    "n_epochs": "training.num_train_epochs",
    "epochs": "training.num_train_epochs",
    "num_steps": "training.max_steps",
    "optimizer": "training.optim",
    "max_norm": "training.max_grad_norm",
    "clip_grad_norm": "training.max_grad_norm",
    "gradient_clipping": "training.max_grad_norm",
    "activation_checkpointing": "training.gradient_checkpointing",
    "logging_dir": "training.output_dir",
    "out_dir": "training.output_dir",
    "output": "training.output_dir",
    "eval_strategy": "training.eval_steps",
    "evaluation_strategy": "training.eval_steps",
    "evals_per_epoch": "training.eval_steps",
    "save_strategy": "training.save_steps",
    "saves_per_epoch": "training.save_steps",
    "wandb_project": "training.report_to",
    "use_wandb": "training.report_to",
    "wandb_name": "training.run_name",
    "push_to_hub": "training.hub_model_id",
    "hub_private": "training.hub_private_repo",
    "random_seed": "training.seed",
}
"""Their keys. One with a section of ours is theirs there alone."""
CONVERSIONS = {"gamma": "gamma / beta", "simpo_gamma": "simpo_gamma / beta"}
"""What becomes of the values that are not ours under another name."""
LOSS_NAMES = {
    "dpo": "sigmoid",
    "cdpo": "sigmoid",
    "rpo": "sigmoid",
    "rso": "hinge",
    "slic": "hinge",
    "dpo_norm": "sigmoid_norm",
    "smaug": "dpop",
    "kto_pair": "kto",
    "exo": "exo_pair",
    "nca": "nca_pair",
    "bco": "bco_pair",
    "sppo": "sppo_hard",
    "aot_pair": "aot_unpaired",
    "lrml": "discopop",
    "listwise": "plackett_luce",
    "softmax": "s_dpo",
}
"""Their losses, in lower case and with underscores."""
SECTIONS = ("model", "data", "training", "dpo", "sft")
SIGNATURES = (
    ("a LLaMA-Factory config", ("finetuning_type", "stage", "cutoff_len", "dataset_dir")),
    ("an axolotl config", ("base_model", "micro_batch_size", "sequence_len", "rl")),
    ("a TRL config", ("model_name_or_path", "dataset_name", "dataset_mixer", "per_device_train_batch_size")),
)
NAMED = 6


def our_key(section: str, key: str) -> str | None:
    """Translate another tool's key in a section of ours ('' at the top)."""
    return KEYS.get(f"{section}.{key}" if section else key) or KEYS.get(key)


def recognise(data: Mapping[str, Any], leaves: Iterable[str]) -> tuple[str, str] | None:
    """Recognise a whole file of another tool, or of another command.

    Args:
        data: The file.
        leaves: Our own keys, dotted; a flat file uses many of them without their section.

    Returns:
        The key that gives it away, and what to say; None for a file that has sections of ours.
    """
    if data.get("method") == "contrastive":
        return "method", "this recipe makes pairs; run `dpoctl convert-data --format contrastive` on it"
    if any(isinstance(data.get(section), dict) for section in SECTIONS):
        return None
    signs = ((tool, key) for tool, keys in SIGNATURES for key in data if key in keys)
    tool, sign = next(signs, (None, ""))
    if tool is None:
        return None
    homes = {leaf.rsplit(".", 1)[-1]: leaf for leaf in leaves}
    known = {key: KEYS.get(key) or homes.get(key) for key in data}
    pairs = [f"{theirs} -> {ours}" for theirs, ours in known.items() if ours and theirs != ours]
    rest = f" and {len(pairs) - NAMED} more" if len(pairs) > NAMED else ""
    return sign, (
        f"this is {tool}, not a dpoctl recipe; start from one in recipes/ and carry over "
        f"{', '.join(pairs[:NAMED])}{rest}"
    )

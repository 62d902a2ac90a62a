"""Names that other tools have for keys and losses of dpoctl, and the detection of their config files."""

from collections.abc import Mapping
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
    "pure_bf16": "model.dtype",
    "mixed_precision": "model.dtype",
    "bf16_full_eval": "model.dtype",
    "fp16_full_eval": "model.dtype",
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
    "deepspeed": "training.sharding",
    "zero_stage": "training.sharding",
    "fsdp": "training.sharding",
    "fsdp_config": "training.sharding",
    "fsdp_version": "training.sharding",
    "fsdp_sharding_strategy": "training.sharding",
    "fsdp_offload_params": "training.cpu_offload",
    "offload_params": "training.cpu_offload",
    "dp_shard_size": "training.sharding",
    "dp_replicate_size": "training.replicas",
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
    "data_seed": "training.seed",
    "max_samples": "data.train",
    "dataset_config": "data.train",
    "dataset_config_name": "data.train",
    "dataset_revision": "data.train",
    "torch_compile_backend": "training.torch_compile",
    "torch_compile_mode": "training.torch_compile",
    "resume_from_checkpoint": "training.resume",
    "auto_resume_from_checkpoints": "training.resume",
    "interleave_probs": "data.train",
    "mix_strategy": "data.train",
    "additional_target": "lora.modules_to_save",
    "peft_use_rslora": "lora.use_rslora",
    "unfrozen_parameters": "training.trainable",
    "router_aux_loss_coef": "sft.router_aux_loss_coef",
    "moe_aux_loss_coef": "sft.router_aux_loss_coef",
    "aux_loss_coef": "sft.router_aux_loss_coef",
    "neftune_noise_alpha": "sft.neftune_noise_alpha",
    "neft_alpha": "sft.neftune_noise_alpha",
    "noise_alpha": "sft.neftune_noise_alpha",
    "peft_use_dora": "lora.use_dora",
    "dora": "lora.use_dora",
    "lora_rank_pattern": "lora.rank_pattern",
    "peft_layers_to_transform": "lora.layers_to_transform",
    "compute_dtype": "model.dtype",
    "train_on_prompt": "sft.loss_on",
    "mask_history": "sft.loss_on",
    "roles_to_train": "sft.loss_on",
    "enable_thinking": "data.chat_template_kwargs",
    "default_system": "data.chat_template_kwargs",
    "warmup_proportion": "training.warmup_ratio",
    "weight_decay_rate": "training.weight_decay",
    "adamw_beta1": "training.adam_beta1",
    "save_every": "training.save_steps",
    "eval_every": "training.eval_steps",
}
"""Keys of other tools -> keys of dpoctl. A key with a section is translated in that section only."""
COUNTS_ROWS = "it counts the rows of a step over all devices and micro-batches"
DIVIDES = "full: weights, gradients and optimizer state are divided over the processes"
REMARKS: dict[str, str] = {
    "deepspeed": f"{DIVIDES}, as by ZeRO-3",
    "zero_stage": f"{DIVIDES}, as by ZeRO-3",
    "fsdp": DIVIDES,
    "fsdp_config": DIVIDES,
    "per_device_train_batch_size": COUNTS_ROWS,
    "micro_batch_size": COUNTS_ROWS,
    "gradient_accumulation_steps": COUNTS_ROWS,
    "bf16": "for example dtype: bfloat16",
    "fp16": "for example dtype: float16",
    "tf32": "for example dtype: bfloat16",
    "eval_strategy": "a number of steps",
    "evaluation_strategy": "a number of steps",
    "save_strategy": "a number of steps",
    "resume_from_checkpoint": "or pass --resume",
    "interleave_probs": "the weight of each source",
    "mix_strategy": "the weight of each source",
    "max_samples": "it is a key of each source, as in data.train[0].max_samples",
    "dataset_config": "the name of a source",
    "dataset_config_name": "the name of a source",
    "dataset_revision": "the revision of a source",
    "dataset_train_split": "the split of a source",
    "dataset_test_split": "the split of a source",
}
"""What is to be known about the key of dpoctl, by the key of another tool."""
NOT_OFFERED: dict[str, tuple[str, ...]] = {
    "dpoctl does not pad, so it needs no packing; remove this key": (
        *("packing", "sample_packing", "eval_packing", "eval_sample_packing", "neat_packing", "padding_free"),
        *("packing_strategy", "pad_to_sequence_len", "pad_to_multiple_of", "padding_side", "padding_value"),
        *("label_pad_token_id", "pad_token", "group_by_length", "length_column_name", "multipack_real_batches"),
    ),
    "the model of the last step is the result; training.max_steps ends a run earlier": (
        *("load_best_model_at_end", "metric_for_best_model", "greater_is_better", "early_stopping_patience"),
        *("early_stopping_steps", "early_stopping_threshold", "save_best_model"),
    ),
    "the command decides: `dpoctl sft`, `dpoctl dpo`, `dpoctl eval`": (
        *("do_train", "do_eval", "do_predict", "predict_with_generate"),
    ),
    "pass --overwrite on the command line": ("overwrite_output_dir",),
    "rows are tokenized once and kept in a cache; no workers are needed": (
        *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "dataset_num_proc"),
        *("dataloader_persistent_workers", "preprocessing_num_workers", "dataset_processes", "num_proc"),
        *("overwrite_cache", "remove_unused_columns", "preprocessing_batch_size", "skip_prepare_dataset", "streaming"),
    ),
    "the cache folder is that of the environment variable DPOCTL_CACHE": (
        *("dataset_prepared_path", "cache_dir", "dataset_cache_dir", "tokenized_path"),
    ),
    "every row is used, and every epoch has its own order": (
        *("dataloader_drop_last", "drop_last", "shuffle_merged_datasets", "shuffle_dataset"),
    ),
    "a layer is computed on one device; training.sharding: full divides weights, gradients and optimizer state": (
        *("tensor_parallel_size", "context_parallel_size", "sequence_parallel_degree"),
        *("device_map", "parallelism_config"),
    ),
    "with training.sharding a run still ends with one whole model; checkpoints are divided": (
        *("fsdp_final_state_dict_type", "fsdp_state_dict_type"),
    ),
    "the launcher decides: --num-processes, or accelerate launch": (
        *("local_rank", "accelerator_config", "ddp_backend", "ddp_find_unused_parameters", "world_size"),
        *("num_processes", "nnodes", "ddp_bucket_cap_mb", "use_cpu", "no_cuda", "use_mps_device"),
    ),
    "fused kernels are used where the model allows; there is nothing to set": (
        *("use_liger_kernel", "liger_kernel_config", "use_liger_loss", "enable_liger_kernel", "use_unsloth", "unsloth"),
        *("liger_rope", "liger_rms_norm", "liger_glu_activation", "liger_fused_linear_cross_entropy", "use_kernels"),
        *("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "xformers_attention", "use_unsloth_gc"),
    ),
    "this variant of LoRA is not offered; use_rslora, use_dora, loraplus_lr_ratio and init_lora_weights are": (
        *("loftq_config", "lora_bias", "fan_in_fan_out", "lora_fan_in_fan_out", "relora_steps"),
        *("pissa_init", "pissa_convert"),
    ),
    "lora.start: new puts another adapter on top of one": ("create_new_adapter",),
    "adapters of embeddings learn as all others do": ("loraplus_lr_embedding",),
    "it is an argument of the schedule: set it in training.lr_scheduler_kwargs": (
        *("cosine_min_lr_ratio", "min_lr", "min_lr_ratio", "min_lr_rate", "num_cycles", "num_decay_steps", "lr_end"),
    ),
    "there is no schedule that stays at its lowest rate; cosine_with_min_lr ends at it": ("cosine_constant_lr_ratio",),
    "this optimizer setting is not offered": (
        *("optim_target_modules", "use_galore", "use_badam", "use_apollo", "use_muon", "embedding_lr"),
        *("lr_groups", "embedding_lr_scale"),
    ),
    "adapters are LoRA for a causal language model, without biases": (
        *("task_type", "lora_task_type", "peft_type", "bias", "inference_mode"),
    ),
    "the model's config.json says it": ("model_type", "is_llama_derived_model", "is_mistral_derived_model"),
    "only text is trained on": ("image_max_pixels", "video_max_pixels", "image_size", "processor_type", "images_dir"),
    "columns are named by column_map in a source of data.train": (
        *("dataset_text_field", "field_messages", "field_chosen", "field_rejected", "message_property_mappings"),
        *("text_column", "prompt_column", "chosen_column", "rejected_column", "columns"),
    ),
    "training.trainable names the weights that are trained": (
        *("freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules"),
        *("freeze_vision_tower", "freeze_multi_modal_projector", "freeze_language_model"),
    ),
    "every run writes metrics.jsonl and report.html": (
        *("plot_loss", "logging_strategy", "logging_first_step", "log_level", "include_num_input_tokens_seen"),
        *("include_tokens_per_second", "disable_tqdm", "log_completions", "logging_nan_inf_filter"),
    ),
    "checkpoints are safetensors, and hold all that --resume needs": (
        *("save_safetensors", "save_only_model", "save_on_each_node"),
    ),
    "`dpoctl merge` merges an adapter into its base": ("save_merged", "merge_lora", "export_dir", "save_merged_model"),
    "the token comes from `hf auth login` or HF_TOKEN; keep it out of recipes": (
        *("hub_token", "hf_hub_token", "hf_token", "token", "use_auth_token", "push_to_hub_token"),
    ),
    "the environment variables of wandb decide": ("wandb_entity", "wandb_watch", "wandb_run_id", "wandb_api_key"),
    "the model is uploaded once, at the end": ("hub_strategy", "hub_always_push", "hub_revision"),
    "settings of the tokenizer are those of the model's folder; model.chat_template sets the template": (
        *("special_tokens", "tokens", "added_tokens_overrides", "tokenizer_type", "use_fast_tokenizer"),
        *("tokenizer_name", "tokenizer_name_or_path", "resize_vocab", "new_special_tokens", "add_tokens", "eos_token"),
    ),
    "memory is measured, and micro-batches and recomputation fit themselves to it": (
        *("auto_find_batch_size", "gradient_checkpointing_kwargs", "torch_empty_cache_steps"),
        *(
            "eval_accumulation_steps",
            "low_cpu_mem_usage",
            "activation_offloading",
            "upcast_layernorm",
            "layer_offloading",
        ),
    ),
    "an SFT adapter is named by model.model_name_or_path, and lora.start says what becomes of it": (
        *("model_adapter_name", "ref_adapter_name", "lora_model_dir", "ref_model_adapters", "force_use_ref_model"),
    ),
    "set eval.samples to let policy and reference write texts": (
        *("generate_during_eval", "eval_table_size", "do_bench_eval"),
    ),
    "max_length counts prompt and answer together, and max_prompt_length the prompt": (
        *("max_completion_length", "max_target_length", "max_source_length", "max_response_length"),
    ),
}
"""Keys of other tools that have no counterpart, by what does their job here or why they are not offered."""
MATTERING = (
    *("load_best_model_at_end", "loftq_config", "cosine_min_lr_ratio", "bias"),
    *("cosine_constant_lr_ratio", "optim_target_modules", "loraplus_lr_embedding"),
    *("image_max_pixels", "freeze_trainable_layers", "special_tokens", "model_adapter_name", "max_completion_length"),
)
"""One key of each group above that changes the result where it is set."""
NOT_OFFERED_WHY = {key: why for why, keys in NOT_OFFERED.items() for key in keys}
VALUES: dict[str, dict[str, tuple[str, str]]] = {
    "optim": {
        "adamw_apex_fused": ("adamw", ""),
        "adam": ("adamw", "with weight_decay 0 they are the same"),
        "rmsprop_bnb": ("rmsprop", ""),
        "ademamix": ("adamw", "AdEMAMix is not offered"),
    },
    "lr_scheduler_type": {
        "linear_with_warmup": ("linear", ""),
        "cosine_with_warmup": ("cosine", ""),
        "wsd": ("warmup_stable_decay", ""),
        "reduce_lr_on_plateau": ("cosine", "the learning rate is a function of the step alone"),
        "greedy": ("cosine", "the learning rate is a function of the step alone"),
    },
    "init_lora_weights": {
        "eva": ("pissa", "EVA needs activations of the data, which there are not when an adapter is made"),
        "corda": ("pissa", "CorDA needs activations of the data, which there are not when an adapter is made"),
        "loftq": ("default", "LoftQ quantises the weights anew"),
        "false": ("default", "a random start would change the model"),
        **{f"pissa_niter_{number}": ("pissa", "it is exact") for number in (4, 8, 16, 32)},
    },
    "dtype": {
        "bf16": ("bfloat16", ""),
        "fp16": ("float16", ""),
        "half": ("float16", ""),
        "fp32": ("float32", ""),
        "torch.bfloat16": ("bfloat16", ""),
        "torch.float16": ("float16", ""),
        "torch.float32": ("float32", ""),
    },
    "attn_implementation": {
        "fa2": ("flash_attention_2", ""),
        "flash_attn": ("flash_attention_2", ""),
        "flash_attention": ("flash_attention_2", ""),
        "flex_attention": ("auto", "it chooses"),
        "flash_attention_3": ("auto", "it chooses"),
    },
    "overlong": {"keep_end": ("truncate", "with prompt_truncation: keep_end")},
}
"""Values of other tools, by the key of dpoctl: the value here, and what is to be known about it."""
CONVERSIONS = {"gamma": "gamma / beta", "simpo_gamma": "simpo_gamma / beta"}
"""The value under the new name, for keys whose value changes too."""
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
"""Losses of other tools, in lower case and with underscores -> losses of dpoctl."""
SECTIONS = ("model", "data", "training", "dpo", "sft")
SIGNATURES = (
    ("LLaMA-Factory", ("finetuning_type", "stage", "cutoff_len", "dataset_dir", "pref_beta")),
    ("axolotl", ("base_model", "micro_batch_size", "sequence_len", "rl")),
    ("the alignment-handbook", ("dataset_mixer", "dataset_mixture")),
    ("TRL", ("model_name_or_path", "dataset_name", "datasets", "per_device_train_batch_size", "loss_type")),
)
"""Keys by which the configs of a tool are known; the first tool that has one."""
TORCHTUNE, COMPONENT = "torchtune", "_component_"


def translate_key(section: str, key: str) -> str | None:
    """Translate a key of another tool, found in a section ('' for the top level)."""
    return KEYS.get(f"{section}.{key}" if section else key) or KEYS.get(key)


def remark_on(key: str) -> str:
    """Return what is to be known about the translation of a key; empty for most."""
    return REMARKS.get(key, "")


def why_not_offered(key: str) -> str | None:
    """Return what does the job of another tool's key here, or why it is not offered; None for other keys."""
    return NOT_OFFERED_WHY.get(key)


def changes_nothing(key: str) -> bool:
    """Whether another tool's key, which has no counterpart, leaves the result as it is."""
    why = why_not_offered(key)
    return why is not None and not any(one in NOT_OFFERED[why] for one in MATTERING)


def translate_value(key: str, value: str) -> tuple[str, str] | None:
    """Translate a value of another tool: the value here, and what is to be known about it."""
    return VALUES.get(key, {}).get(value)


def recognise(data: Mapping[str, Any]) -> tuple[str, str] | None:
    """Recognise a config file of another tool, or a recipe of another command, by its keys.

    Returns:
        The key that shows it, and the error message; None for a recipe.
    """
    if (method := data.get("method")) in ("contrastive", "sampled"):
        return "method", f"this recipe makes pairs; run `dpoctl convert-data --format {method}` on it"
    tool, sign = tool_of(data)
    if not tool or (tool != TORCHTUNE and any(isinstance(data.get(section), dict) for section in SECTIONS)):
        return None
    return sign, f"this is a config of {tool}, not a recipe; `dpoctl import FILE` makes a recipe of it"


def tool_of(data: Mapping[str, Any]) -> tuple[str, str]:
    """Return the tool that a config is for, and the key that shows it; two empty texts if no key does."""
    for key, value in data.items():
        if isinstance(value, dict) and COMPONENT in value:
            return TORCHTUNE, key
    signs = ((tool, key) for tool, keys in SIGNATURES for key in data if key in keys)
    return next(signs, ("", ""))

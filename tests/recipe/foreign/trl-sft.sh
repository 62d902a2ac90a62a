trl sft --model_name_or_path meta-llama/Llama-3.2-1B --dataset_name HuggingFaceH4/no_robots --completion_only_loss True \
  --learning_rate=1e-4 --use_peft --lora_r 8 --lora_target_modules q_proj v_proj --output_dir out/sft --bf16 False \
  --warmup_steps 0.1 --lr_scheduler_type cosine

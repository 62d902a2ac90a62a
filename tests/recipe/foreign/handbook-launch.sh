#SBATCH --gres=gpu:8
ACCELERATE_LOG_LEVEL=info accelerate launch --config_file recipes/accelerate_configs/zero3.yaml --num_processes 8 \
  scripts/dpo.py --config handbook-dpo-full.yaml --learning_rate 1e-6 --beta=0.1

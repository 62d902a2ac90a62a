tune run --nnodes 1 --nproc_per_node 4 full_dpo_distributed --config torchtune-full-dpo.yaml batch_size=2 optimizer.lr=1e-5

#!/usr/bin/env bash
# Iterative DPO on the demo: in each of three rounds the model answers prompts, its answers are scored, and it learns from
# the best and the worst of each prompt. Prints how often each round's model writes a harsh review of an unseen title.
#   recipes/reviewer2-iterative.sh            a few minutes on two CPU cores; needs runs/reviewer2-sft, as make demo makes it
# DPOCTL=... names the program, RUNS=... the folder of the runs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
dpoctl=${DPOCTL:-.venv/bin/dpoctl} runs=${RUNS:-runs}

model=$runs/reviewer2-sft
[ -e "$model/model.safetensors" ] || $dpoctl sft recipes/reviewer2-sft.yaml --output-dir "$model"
table="round  pairs  score of its answers  share of harsh reviews, reference -> policy"
for round in 1 2 3; do
    out=$runs/reviewer2-round$round
    pairs=$runs/reviewer2-round$round-pairs
    made=$($dpoctl convert-data recipes/reviewer2-sampled.yaml --format sampled -o "$pairs/pairs.jsonl" --json \
        --set "model.model_name_or_path=$model" --set "sampling.seed=$round")
    # The pairs of this round are new, and so is their reference: the model that wrote the answers.
    $dpoctl dpo recipes/reviewer2-dpo.yaml --overwrite --output-dir "$out" --set "model.model_name_or_path=$model" \
        --set "data.train=[$pairs/pairs-train.jsonl]" --set 'data.eval=[{path: "demo:reviewer2", split: test, max_samples: 100}]' \
        --set global_batch_size=8 --set learning_rate=5e-5 --set eval_steps=12 --set eval_on_start=false \
        --set training.seed="$round"
    shares=$($dpoctl eval "$out" --json)
    table+=$'\n'$(python3 - "$round" "$made" "$shares" <<'PYTHON'
import json, sys

made, shares = map(json.loads, sys.argv[2:])
before, after = (shares["judge"][side]["harsh"]["share"] for side in ("reference", "policy"))
print(f"{sys.argv[1]:>5}  {made['pairs']:5}  {made['score']:20.3f}  {before:.3f} -> {after:.3f}")
PYTHON
)
    model=$out
done
echo
echo "$table"

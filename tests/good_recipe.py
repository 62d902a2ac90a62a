"""The smallest recipe that nothing is wrong with, to be spoilt."""

GOOD = """\
method: dpo
model:
  model_name_or_path: some/model
data:
  train: [pairs.jsonl]
training:
  output_dir: runs/x
  learning_rate: 5e-7
"""

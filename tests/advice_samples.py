"""Recipes that there is little to say against, and what is said of them."""

from typing import Any

from dpoctl.recipe import Examined, examine_recipe
from dpoctl.recipe.advice import advise
from dpoctl.recipe.diagnostics import Diagnostic
from dpoctl.recipe.facts import Facts

GOOD = """\
method: dpo
model: {model_name_or_path: some/model-7b}
lora: {r: 16}
data:
  train: [{path: pairs.jsonl, max_samples: 5000}]
  eval: [{path: heldout.jsonl, max_samples: 2000}]
dpo: {loss: {beta: 0.1}}
training:
  output_dir: runs/x
  learning_rate: 2e-5
  eval_steps: 10
  save_steps: 100
"""
FULL = GOOD.replace("lora: {r: 16}\n", "# all weights\n")
SFT = GOOD.replace("method: dpo", "method: sft").replace("dpo: {loss: {beta: 0.1}}\n", "# no loss to choose\n")
RATE = "learning_rate: 2e-5"
SCRATCH = "{from_scratch: {config: {model_type: llama}, tokenizer: {vocab_size: 300}}}"


def rate(text: str, value: str) -> str:
    return text.replace(RATE, f"learning_rate: {value}")


def training(text: str, *lines: str) -> str:
    return text + "".join(f"  {line}\n" for line in lines)


def examine(text: str, *overrides: str) -> Examined:
    return examine_recipe(text, "r.yaml", overrides=overrides)


def findings(text: str, *overrides: str, **facts: Any) -> list[Diagnostic]:
    seen = examine(text, *overrides)
    return advise(seen.recipe, seen.document, Facts(**facts), seen.problems)


def told(found: list[Diagnostic]) -> set[tuple[str, str]]:
    return {(one.severity, one.code) for one in found}

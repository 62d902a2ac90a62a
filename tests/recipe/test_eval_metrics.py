"""The names of metrics that a recipe decides are those that its task reports."""

from dataclasses import replace

import pytest
import torch
from loss_samples import random_scores

from dpoctl.core.objective import evaluate_terms
from dpoctl.losses import LOSSES
from dpoctl.recipe import parse_recipe
from dpoctl.recipe.document import write_yaml
from dpoctl.recipe.eval_metrics import eval_metrics
from dpoctl.recipe.loss_section import NamedLoss
from dpoctl.tasks.task import build_task

RECIPE = {
    "model": {"model_name_or_path": "some/model"},
    "data": {
        "train": ["pairs.jsonl"],
        "eval": {"eval": [{"path": "a.jsonl", "metrics": "one"}], "other": ["b.jsonl"]},
    },
    "training": {"output_dir": "run", "learning_rate": 1e-6, "eval_steps": 1},
}


@pytest.mark.parametrize("kind", [*LOSSES, "with sft", "sft: tokens", "sft: responses"])
def test_the_names_are_those_of_the_task(kind: str) -> None:
    method, loss, average = "dpo", [{"type": kind}], "tokens"
    if kind == "with sft":
        loss = [{"type": "sigmoid"}, {"type": "sft", "weight": 0.5}]
    elif kind.startswith("sft"):
        method, average = "sft", kind.split()[1]
    own = {"sft": {"average": average}} if method == "sft" else {"dpo": {"loss": loss}}
    recipe = parse_recipe(write_yaml({"method": method, **RECIPE, **own}), "r", command=method)
    task = build_task(recipe)
    losses = [NamedLoss((), kind, task.terms[0].loss)] if method == "dpo" else []  # type: ignore[arg-type]
    scores = random_scores(task.terms[0].loss)
    scores = replace(scores, token_logps=torch.zeros(int(scores.num_tokens.sum())))
    reported = task.report(scores, evaluate_terms(task.terms, scores), {0: "one"})
    names = eval_metrics(recipe, losses)
    assert set(names) == {
        *("eval_loss", "eval_other_loss"),
        *(f"eval_{name}" for name in reported),
        *(f"eval_other_{name}" for name in reported if not name.startswith("one/")),
    }

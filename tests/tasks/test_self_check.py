"""The first step must give the value that theory gives."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from memory_store import MemoryStore, by_hand, random_pairs
from transformers import PreTrainedModel

from dpoctl.core.logps import Scorer
from dpoctl.core.objective import Objective
from dpoctl.core.planner import Lengths, Plan
from dpoctl.core.reader import Reader
from dpoctl.errors import RunError
from dpoctl.model.probe import Verdict
from dpoctl.tasks.dpo import Report, build_terms
from dpoctl.tasks.self_check import check_first_step
from dpoctl.tasks.task import Task


def check(model: PreTrainedModel, spec: Any, *, shift: float = 0.0, at_init: float | None = None) -> Task:
    """Check a step against the model itself, its log-probabilities shifted by more and more."""
    examples = random_pairs(4)
    store: Any = MemoryStore(examples)
    with torch.no_grad():
        ref = by_hand(model, examples).numpy()
    reader = Reader(store, "shared", torch.device("cpu"), ref_logps=ref + shift * np.arange(len(ref), dtype=np.float32))
    terms = build_terms(spec)
    task = Task(terms, Report(terms[0].loss))  # type: ignore[arg-type]
    scorer = Scorer(model, model, Verdict("shared", True, ""))
    objective = Objective(Accelerator(cpu=True), scorer, terms, task.report)
    expected = task.at_init if at_init is None else at_init
    check_first_step(objective, Plan(Lengths.of(store), 4), reader, expected, torch.float32)
    return task


def test_a_sum_of_losses_has_the_sum_of_their_values(
    tiny_llama: PreTrainedModel, capfd: pytest.CaptureFixture[str]
) -> None:
    mixture = [{"type": "sigmoid", "weight": 0.5}, {"type": "hinge"}, {"type": "beta_dpo", "weight": 2.0}]
    assert check(tiny_llama, mixture).at_init == pytest.approx(1 + 2.5 * np.log(2))
    assert re.search(r"first loss 2\.732\d+, expected 2\.732868", capfd.readouterr().err)


def test_margins_are_checked_where_the_value_depends_on_the_data(tiny_llama: PreTrainedModel) -> None:
    spec = {"type": "sigmoid", "sft_weight": 1.0}
    assert check(tiny_llama, spec).at_init is None
    with pytest.raises(RunError, match="margins must be 0"):
        check(tiny_llama, spec, shift=1.0)


def test_a_loss_that_is_not_its_equation_stops_the_run(tiny_llama: PreTrainedModel) -> None:
    with pytest.raises(RunError, match=r"must be 0\.800000, and it is 0\.693147"):
        check(tiny_llama, {"type": "sigmoid"}, at_init=0.8)

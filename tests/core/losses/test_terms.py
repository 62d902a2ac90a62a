"""Likelihood terms, and sums of losses."""

from dataclasses import replace

import pytest
import torch
from loss_samples import BATCH

from dpoctl.core.losses import CPO, ORPO, Loss, Scores, SequenceNLL, Sigmoid, TargetNLL, Term, TokenNLL, terms_of

DEMONSTRATIONS = Scores(
    logps=torch.tensor([-1.5, -3.0]),
    num_tokens=torch.tensor([2, 1]),
    pairs=torch.zeros(0, 2, dtype=torch.long),
    token_logps=torch.tensor([-0.5, -1.0, -3.0]),
)


@pytest.mark.parametrize(
    ("loss", "item", "values"),
    [(TokenNLL(), "tokens", [0.5, 1.0, 3.0]), (SequenceNLL(), "responses", [1.5, 3.0])],
)
def test_supervised_losses_count_tokens_or_whole_responses(loss: Loss, item: str, values: list[float]) -> None:
    assert loss(DEMONSTRATIONS).tolist() == values
    assert (loss.item, loss.rows, loss.needs_reference, loss.couples_batch) == (item, "demonstrations", False, False)


def test_targets_are_imitated_and_records_without_one_are_not() -> None:
    scores = replace(BATCH, targets=torch.tensor([-1, 3]))
    assert TargetNLL()(scores).tolist() == [18]
    assert TargetNLL()(BATCH).tolist() == [10, 20]
    assert TargetNLL.item == "target_tokens"


def test_a_step_without_targets_has_a_likelihood_term_of_nothing() -> None:
    logps = BATCH.logps.clone().requires_grad_()
    values = TargetNLL()(replace(BATCH, logps=logps, targets=torch.tensor([-1, -1])))
    values.sum().backward()
    assert logps.grad is not None
    assert not logps.grad.any()


@pytest.mark.parametrize(("loss", "missing"), [(TokenNLL(), "token_logps"), (TargetNLL(), "targets")])
def test_scores_without_what_is_imitated_are_refused(loss: Loss, missing: str) -> None:
    with pytest.raises(ValueError, match=f"needs {missing}"):
        loss(replace(BATCH, targets=None))


@pytest.mark.parametrize(
    ("loss", "weight", "terms"),
    [
        (Sigmoid(), 1.0, (Term(1.0, Sigmoid()),)),
        (Sigmoid(sft_weight=0.2), 0.5, (Term(0.5, Sigmoid(sft_weight=0.2)), Term(0.1, TargetNLL()))),
        (CPO(), 1.0, (Term(1.0, CPO()), Term(1.0, TargetNLL()))),
        (ORPO(sft_weight=0.0), 2.0, (Term(2.0, ORPO(sft_weight=0.0)),)),
        (TargetNLL(), 0.3, (Term(0.3, TargetNLL()),)),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_loss_brings_its_likelihood_term_along(loss: Loss, weight: float, terms: tuple[Term, ...]) -> None:
    assert terms_of(loss, weight) == terms

"""Likelihood terms, and sums of losses."""

from dataclasses import replace

import pytest
import torch
from loss_samples import BATCH, having, outline

from dpoctl.losses import Loss, Scores, SequenceNLL, TargetNLL, Term, TokenNLL, terms_of
from dpoctl.losses.pairwise import CPO, ORPO, Sigmoid

DEMONSTRATIONS = Scores(
    logps=torch.tensor([-1.5, -3.0]),
    outline=outline([2, 1], [], starts=[0, 1, 2]),
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
    scores = having(BATCH, targets=torch.tensor([-1, 3]))
    assert TargetNLL()(scores).tolist() == [18]
    assert TargetNLL()(BATCH).tolist() == [10, 20]
    assert TargetNLL.item == "target_tokens"


def test_a_function_is_applied_to_each_column_of_an_outline() -> None:
    moved = BATCH.outline.map(lambda column: column.double())
    assert {column.dtype for column in vars(moved).values()} == {torch.float64}
    assert moved.targets.tolist() == BATCH.outline.targets.tolist()


def test_a_step_without_targets_has_a_likelihood_term_of_nothing() -> None:
    logps = BATCH.logps.clone().requires_grad_()
    values = TargetNLL()(having(replace(BATCH, logps=logps), targets=torch.tensor([-1, -1])))
    values.sum().backward()
    assert logps.grad is not None
    assert not logps.grad.any()


def test_scores_without_what_is_imitated_are_refused() -> None:
    with pytest.raises(ValueError, match="needs token_logps"):
        TokenNLL()(BATCH)


def test_an_outline_counts_its_items() -> None:
    counts = {"pairs": 2, "responses": 4, "records": 2, "tokens": 29, "target_tokens": 15}
    assert {item: int(BATCH.outline.count(item)) for item in counts} == counts
    partly = having(BATCH, targets=torch.tensor([-1, 3])).outline
    assert int(partly.count("target_tokens")) == 6


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

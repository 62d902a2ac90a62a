"""The metrics of preferences, worked out by hand, and the losses that a recipe describes."""

from typing import Any

import pytest
import torch
from loss_samples import outline

from dpoctl.core.meters import Meter
from dpoctl.core.objective import evaluate_terms
from dpoctl.losses import Scores, TargetNLL, Term
from dpoctl.losses.pairwise import CPO, Sigmoid, SimPO
from dpoctl.losses.unpaired import KTO
from dpoctl.tasks.task import PreferenceMetrics, build_terms

# Two pairs: log-ratios 2 and -1, then -0.5 and 0.5. The second record has nothing to imitate.
PAIRS = Scores(
    logps=torch.tensor([-10.0, -14.0, -20.0, -18.0]),
    outline=outline([5, 8, 10, 6], [[0, 1], [2, 3]], targets=[0, -1], sources=[0, 3]),
    ref_logps=torch.tensor([-12.0, -13.0, -19.5, -18.5]),
)


def metrics(spec: Any, scores: Scores, names: dict[int, str] | None = None) -> dict[str, float]:
    terms = build_terms(spec)
    at_step = [Term(term.weight, term.loss.for_step(scores, {}, step=0, seed=0)[0]) for term in terms]
    meter = Meter(torch.device("cpu"))
    meter.add(PreferenceMetrics(terms[0].loss)(scores, evaluate_terms(at_step, scores), names or {}))  # type: ignore[arg-type]
    return meter.read(lambda tensor: tensor)


def test_pairs_have_the_names_of_trl() -> None:
    assert metrics({"type": "sigmoid"}, PAIRS) == pytest.approx(
        {
            "rewards/chosen": 0.075,
            "rewards/rejected": -0.025,
            "rewards/margins": 0.1,
            "rewards/accuracies": 0.5,
            "logps/chosen": -15.0,
            "logps/rejected": -16.0,
            "lengths/chosen": 7.5,
            "lengths/rejected": 7.0,
        }
    )


def test_rewards_are_those_of_the_loss() -> None:
    assert metrics({"type": "simpo", "beta": 2.0}, PAIRS)["rewards/chosen"] == pytest.approx(-4.0)


def test_equal_models_are_right_about_no_pair() -> None:
    equal = Scores(**{**vars(PAIRS), "ref_logps": PAIRS.logps})
    assert metrics({"type": "sigmoid"}, equal)["rewards/accuracies"] == 0.0


def test_a_named_source_has_metrics_of_its_own() -> None:
    by_name = metrics({"type": "cpo"}, PAIRS, {3: "code"})
    assert by_name["code/logps/chosen"] == -20.0
    assert by_name["code/lengths/rejected"] == 6.0
    assert by_name["code/rewards/margins"] == pytest.approx(-0.2)
    assert by_name["nll_loss"] == pytest.approx(2.0), "of the first record, the other has no target"
    assert "code/nll_loss" not in by_name
    assert metrics({"type": "cpo"}, PAIRS, {0: "chat"})["chat/nll_loss"] == pytest.approx(2.0)


def test_rankings_are_reported_over_all_their_pairs() -> None:
    ranking = Scores(
        logps=torch.tensor([-1.0, -2.0, -6.0]),
        outline=outline([1, 1, 1], [[0, 1], [0, 2], [1, 2]], starts=[0, 3], targets=[0]),
        ref_logps=torch.zeros(3),
    )
    seen = metrics({"type": "plackett_luce", "beta": 1.0}, ranking)
    assert seen["rewards/margins"] == pytest.approx((1 + 5 + 4) / 3)
    assert seen["rewards/accuracies"] == 1.0


def test_labels_are_reported_by_side_with_their_baseline() -> None:
    labelled = Scores(
        logps=torch.tensor([-4.0, -9.0, -6.0, -9.0, -8.0, -9.0]),
        outline=outline([4, 1, 6, 1, 8, 1], [], labels=[1, 1, 0], targets=[0, 2, -1], sources=[0, 0, 1]),
        ref_logps=torch.tensor([-6.0, -10.0, -6.0, -12.0, -7.0, -9.0]),
    )
    assert metrics({"type": "kto"}, labelled, {1: "bad"}) == pytest.approx(
        {
            "rewards/chosen": 0.1,
            "rewards/rejected": -0.1,
            "logps/chosen": -5.0,
            "logps/rejected": -8.0,
            "lengths/chosen": 5.0,
            "lengths/rejected": 8.0,
            "kl": (1 + 3 + 0) / 3,
            "bad/rewards/rejected": -0.1,
            "bad/logps/rejected": -8.0,
            "bad/lengths/rejected": 8.0,
        }
    )


def test_a_mapping_is_one_loss_with_its_likelihood() -> None:
    assert build_terms({"type": "sigmoid", "beta": 0.2}) == (Term(1.0, Sigmoid(beta=0.2)),)
    assert build_terms({"type": "cpo"}) == (Term(1.0, CPO()), Term(1.0, TargetNLL()))


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_is_a_weighted_sum(kind: type) -> None:
    specs = [{"type": "kto", "weight": 0.5, "sft_weight": 0.2}, {"type": "simpo"}, {"type": "sft", "weight": 2.0}]
    terms = build_terms(kind(specs))
    assert terms == (
        Term(0.5, KTO(sft_weight=0.2)),
        Term(0.1, TargetNLL()),
        Term(1.0, SimPO()),
        Term(2.0, TargetNLL()),
    )

"""Losses that look at the whole step: what they settle, what they remember, and that a part of a step is not one."""

import json
from dataclasses import replace

import pytest
import torch
from loss_samples import BATCH, only, random_scores, settled

from dpoctl.core.losses import KTO, AOTUnpaired, BCOPair, Memory, PreferenceLoss, Sigmoid

LABELLED = replace(BATCH, labels=torch.tensor([1, 0]))


def test_kto_compares_with_the_mean_of_the_mismatched_responses_of_the_step() -> None:
    # The mismatched log-ratios are -1 and 5.
    scores = replace(LABELLED, logps=torch.tensor([-10.0, -14, -20, -13.5], dtype=torch.float64))
    loss, memory = KTO(beta=0.1).settle(scores, {}, step=3, seed=0)
    assert memory == {}
    assert loss.metrics(scores) == {"kl": (2.0, 1)}
    expected = torch.tensor([-0.1 * (2 - 2), -0.1 * (2 - -0.5)], dtype=torch.float64).sigmoid()
    torch.testing.assert_close(loss(scores), expected)


def test_kto_does_not_compare_with_less_than_the_reference() -> None:
    # The mismatched log-ratios are -1 and 0.5.
    assert settled(KTO(), LABELLED).metrics(LABELLED) == {"kl": (0.0, 1)}


def test_a_settled_kto_judges_a_part_of_the_step_as_it_judged_the_whole() -> None:
    scores = random_scores(KTO())
    loss = settled(KTO(), scores)
    parts = [loss(only(scores, [0])), loss(only(scores, [1, 2])), loss(only(scores, [3]))]
    torch.testing.assert_close(torch.cat(parts), loss(scores))


def test_no_gradient_flows_into_the_mismatched_responses_of_kto() -> None:
    logps = torch.tensor([-10.0, -9.0, -20.0, -13.5], requires_grad=True)
    scores = replace(LABELLED, logps=logps, ref_logps=torch.full_like(logps, -12))
    (gradient,) = torch.autograd.grad(KTO()(scores).sum(), logps)
    # A desirable response is to rise, an undesirable one to fall.
    assert gradient.sign().tolist() == [-1, 0, 1, 0]


def test_bco_remembers_the_mean_reward_of_all_steps_so_far() -> None:
    loss = BCOPair(beta=0.1)
    memory: Memory = {}
    seen: list[float] = []
    for step, records in enumerate([[0], [1, 2], [3, 0, 1]]):
        scores = only(random_scores(loss), records)
        now, memory = loss.settle(scores, json.loads(json.dumps(memory)), step=step, seed=0)
        seen += loss.reward(scores).tolist()
        mean = sum(seen) / len(seen)
        assert now.metrics(scores) == {"delta": (pytest.approx(mean), 1)}
        assert memory == {"count": len(seen), "mean": pytest.approx(mean)}
        won, lost = scores.split(loss.reward(scores))
        torch.testing.assert_close(now(scores), torch.log1p((mean - won).exp()) + torch.log1p((lost - mean).exp()))


def test_bco_without_a_running_mean_remembers_nothing() -> None:
    loss = BCOPair(running_mean=False)
    assert loss.settle(BATCH, {}, step=0, seed=0) == (loss, {})


def test_aot_unpaired_compares_winners_with_the_losers_of_other_prompts() -> None:
    # Winners 2 and -0.5 against losers -1 and 0.5: in order, -0.5 against -1 and 2 against 0.5.
    crossed = replace(BATCH, pairs=torch.tensor([[0, 3], [2, 1]]))
    assert AOTUnpaired()(crossed).tolist() == AOTUnpaired()(BATCH).tolist()
    assert Sigmoid()(crossed).tolist() != Sigmoid()(BATCH).tolist()


@pytest.mark.parametrize("loss", [KTO(), BCOPair(), AOTUnpaired(beta=0.1)], ids=str)
def test_evaluation_is_by_the_statistics_of_the_evaluated_step(loss: PreferenceLoss) -> None:
    scores = random_scores(loss)
    assert settled(loss.at_eval(), scores)(scores).tolist() == pytest.approx(loss.at_eval()(scores).tolist())

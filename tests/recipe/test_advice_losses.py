"""Advice on losses."""

import pytest
from advice_samples import FULL, GOOD, findings, rate, told

from dpoctl.core.losses import LOSSES


def test_a_loss_that_couples_the_batch_says_over_how_many_rows() -> None:
    text = GOOD.replace("beta: 0.1", "type: beta_dpo")
    (found,) = findings(text, coupling=("beta_dpo",))
    assert (found.grade, found.code) == ("note", "statistics-batch")
    assert "the loss 'beta_dpo' compares" in found.message
    assert "64 rows, however they are spread" in found.message


@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_is_warned_of_its_own_defaults(name: str) -> None:
    assert findings(GOOD.replace("beta: 0.1", f"type: {name}")) == []


def test_the_usual_rate_of_orpo_is_not_too_high_for_it() -> None:
    text = rate(FULL, "8e-6")
    assert told(findings(text)) == {("warning", "lr-high-full")}
    assert told(findings(text.replace("beta: 0.1", "type: orpo"))) == set()


@pytest.mark.parametrize(
    ("labels", "weights", "said"),
    [
        ((300, 300), "", None),
        ((400, 300), "", None),
        ((300, 600), "", "300 desirable and 600 undesirable rows weigh 300 to 600; its authors keep the first between"),
        ((300, 600), "", "e.g. by desirable_weight: 2"),
        ((800, 300), "", "e.g. by undesirable_weight: 2"),
        ((300, 600), ", desirable_weight: 2.0", None),
        ((800, 300), ", undesirable_weight: 2.0", None),
        ((400, 300), ", desirable_weight: 3.0", "weigh 1,200 to 300"),
    ],
)
def test_labels_that_outweigh_one_another_are_noted_with_the_weight_that_levels_them(
    labels: tuple[int, int], weights: str, said: str | None
) -> None:
    found = findings(GOOD.replace("beta: 0.1", f"type: kto{weights}"), labels=labels)
    assert told(found) == ({("note", "kto-balance")} if said else set())
    assert all(str(said) in one.message and one.line == 7 for one in found)


def test_the_meaning_of_beta_is_told_where_the_loss_is_documented() -> None:
    assert "higher beta keeps the policy closer" in (LOSSES["sigmoid"].__doc__ or "")

"""Between the first forward of a step and its update the host never waits for the GPU."""

from typing import Any

import pytest

from dpoctl.losses import LOSSES

# They keep numbers of each step for the next, on the host, where a checkpoint finds them.
REMEMBERING = {"beta_dpo", "bco_pair"}
PLAIN = {name for name in LOSSES if name not in REMEMBERING}
SPECIAL = {"sigmoid with sft_weight", "ipo, not averaged", "kto with sft_weight", "sft"}


@pytest.mark.parametrize("name", sorted(PLAIN | SPECIAL))
def test_a_loss_and_its_report_by_source_wait_for_nothing(name: str, traced: Any) -> None:
    found = traced("losses")[name]
    assert found["error"] is None
    assert found["waits"] == []
    assert found["micro_batches"] > 1


@pytest.mark.parametrize("group", ["depths", "families"])
def test_a_step_waits_for_nothing_whatever_is_trained(group: str, traced: Any) -> None:
    for name, found in traced(group).items():
        assert found["error"] is None, name
        assert found["waits"] == [], name


def test_every_loss_is_traced(traced: Any) -> None:
    assert set(traced("losses")) == PLAIN | SPECIAL

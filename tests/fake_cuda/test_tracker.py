"""The tracker sees what it is meant to see."""

from typing import Any

import pytest


def test_what_waits_is_seen_once_and_what_does_not_is_not(traced: Any) -> None:
    found = traced("checks")
    assert {name for name, count in found["waiting"].items() if count != 1} == set()
    assert {name for name, count in found["running on"].items() if count} == set()
    assert min(len(found["waiting"]), len(found["running on"])) > 5


def test_attention_is_counted_pair_by_pair(traced: Any) -> None:
    assert [area for area, _ in traced("checks")["areas"]] == [counted for _, counted in traced("checks")["areas"]]


def test_the_peak_is_the_one_that_torch_s_own_tracker_finds(traced: Any) -> None:
    ours, theirs = traced("checks")["peaks"]
    assert ours == pytest.approx(theirs, rel=1e-3)

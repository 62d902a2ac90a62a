"""Means are divided once, whatever the pieces."""

import pytest
import torch

from dpoctl.core.meters import Meter, Tally, Total, by_source


def read(meter: Meter) -> dict[str, float]:
    return meter.read(lambda tensor: tensor)


def test_uneven_pieces_give_the_mean_of_all_items() -> None:
    meter = Meter(torch.device("cpu"))
    meter.add({"loss": Total(torch.tensor(1.0), 1)})
    meter.add({"loss": Total(torch.tensor([2.0, 3.0, 6.0]).sum(), 3)})
    assert read(meter) == {"loss": pytest.approx(3.0)}


def test_reading_starts_anew() -> None:
    meter = Meter(torch.device("cpu"))
    meter.add({"loss": Total(1.0, 1)})
    read(meter)
    assert read(meter) == {}
    meter.add({"loss": Total(5.0, 1)})
    assert read(meter) == {"loss": 5.0}


def test_a_name_without_items_is_left_out() -> None:
    meter = Meter(torch.device("cpu"))
    meter.add({"loss": Total(0.0, 0), "other": Total(2.0, 4)})
    assert read(meter) == {"other": 0.5}


def test_ranks_are_added_before_the_division() -> None:
    meter = Meter(torch.device("cpu"))
    meter.add({"loss": Total(6.0, 2)})
    assert meter.read(lambda tensor: tensor + torch.tensor([[3.0], [1.0]])) == {"loss": 3.0}


def test_sums_are_kept_in_double_precision() -> None:
    meter = Meter(torch.device("cpu"))
    for _ in range(1000):
        meter.add({"loss": Total(torch.tensor(1.0 + 2**-20), 1)})
    assert read(meter)["loss"] == pytest.approx(1.0 + 2**-20, abs=1e-12)


def test_a_total_holds_no_graph() -> None:
    meter = Meter(torch.device("cpu"))
    meter.add({"loss": Total(torch.ones(3, requires_grad=True).sum(), 3)})
    assert read(meter) == {"loss": 1.0}


def test_sources_are_averaged_apart_and_those_of_one_name_together() -> None:
    tally = Tally.of(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0, 0, 1, 2]))
    meter = Meter(torch.device("cpu"))
    meter.add(by_source({"reward": tally}, torch.tensor([5, 7, 9]), {5: "a", 7: "b", 9: "b", 11: "c"}))
    assert read(meter) == {"reward": 2.5, "a/reward": 1.5, "b/reward": 3.5}


def test_items_that_are_left_out_count_for_nothing() -> None:
    tally = Tally.of(torch.tensor([1.0, 2.0, 6.0]), torch.arange(3), torch.tensor([True, False, True]))
    total = tally.total()
    assert (float(total.sum), int(total.count)) == (7.0, 2)

"""Means are divided once, whatever the pieces."""

import pytest
import torch

from dpoctl.core.meters import ItemMetric, Meter, Total, by_source, loss_moments, standard_error


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
    tally = ItemMetric.of(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0, 0, 1, 2]))
    meter = Meter(torch.device("cpu"))
    meter.add(by_source({"reward": tally}, torch.tensor([5, 7, 9]), {5: "a", 7: "b", 9: "b", 11: "c"}))
    assert read(meter) == {"reward": 2.5, "a/reward": 1.5, "b/reward": 3.5}


def test_items_that_are_left_out_count_for_nothing() -> None:
    tally = ItemMetric.of(torch.tensor([1.0, 2.0, 6.0]), torch.arange(3), torch.tensor([True, False, True]))
    total = tally.total()
    assert (float(total.sum), int(total.count)) == (7.0, 2)


def test_the_standard_error_of_a_mean_over_records_is_that_of_the_formula() -> None:
    values, meter = torch.tensor([0.2, 0.9, 0.4, 1.1, 0.5]), Meter(torch.device("cpu"))
    for part in values.split(2):
        meter.add({"loss": Total(part.sum(), len(part)), **loss_moments([(part, torch.ones_like(part))])})
    found = standard_error(read(meter), 5)
    assert found == {"loss": pytest.approx(0.62), "loss_se": pytest.approx(float(values.std()) / 5**0.5)}


def test_the_pairs_of_one_record_are_no_independent_observations() -> None:
    def error(sums: list[float], counts: list[float]) -> float:
        meter = Meter(torch.device("cpu"))
        loss = Total(sum(sums), sum(counts))
        meter.add({"loss": loss, **loss_moments([(torch.tensor(sums), torch.tensor(counts))])})
        return standard_error(read(meter), len(sums))["loss_se"]

    once = error([0.2, 0.9, 0.4], [1.0, 1.0, 1.0])
    assert error([0.8, 3.6, 1.6], [4.0, 4.0, 4.0]) == pytest.approx(once)
    # Ratio of sums, by hand: m = 3 / 6, residuals 0.2 - m, 0.8 - 2 m, 2 - 3 m, times 3 / 2, over 6.
    assert error([0.2, 0.8, 2.0], [1.0, 2.0, 3.0]) == pytest.approx((1.5 * (0.09 + 0.04 + 0.25)) ** 0.5 / 6)


def test_one_record_has_no_standard_error() -> None:
    one = loss_moments([(torch.tensor([0.5]), torch.tensor([1.0]))])
    meter = Meter(torch.device("cpu"))
    meter.add({"loss": Total(0.5, 1), **one})
    assert standard_error(read(meter), 1) == {"loss": 0.5}

"""The tables of a result in the report: shares in percent, differences with a sign, nothing taken for a share."""

from typing import Any

from dpoctl.runs.result_tables import Table, tables

SAMPLES: dict[str, Any] = {
    **{"num": 4, "finished_reference": 0.25, "finished_reference_ci": [0.1, 0.5], "finished_policy": 0.5},
    **{"finished_policy_ci": [0.3, 0.7], "finished_policy_ci_method": "Wilson interval", "finished_difference": 0.25},
    **{"finished_difference_ci": [-0.1, 0.6], "length_reference": 31.5, "length_policy": 20.0},
    **{"length_difference": -11.5, "length_difference_ci": [-20.0, -3.0], "distinct_policy": 4},
}


def rows(found: Table) -> dict[str, list[tuple[str, str]]]:
    """The cells of each row, as text and interval."""
    return {row.name: [(cell.text.replace("\u00a0", " "), cell.interval) for cell in row.cells] for row in found.rows}


def test_a_number_between_0_and_1_is_a_share_only_by_its_name() -> None:
    result = {"loss": 0.7, "loss_ci": [0.69, 0.71], "rewards/accuracies": 0.62, "rewards/accuracies_ci": [0.56, 0.67]}
    (found,) = tables(result)
    assert [row.cells[0].text for row in found.rows] == ["0.7", "62\u00a0%"]
    assert [row.cells[0].bar is None for row in found.rows] == [True, False]


def test_texts_of_both_models_and_their_differences_are_one_table() -> None:
    (found,) = tables({"samples": SAMPLES, "kl": 0.0017, "kl_ci": [0.0015, 0.0019], "kl_ci_method": "t"})
    assert found.title.startswith("4 samples")
    assert found.columns == ("reference", "policy", "difference")
    cells = rows(found)
    assert list(cells) == ["finished", "length", "distinct", "kl per token, nats"]
    assert [text for text, _ in cells["finished"]] == ["25 %", "50 %", "+25 points"]
    assert cells["finished"][2][1] == "\u221210 to +60"
    assert cells["length"][2] == ("\u221211.5", "\u221220 to \u22123")
    assert cells["distinct"] == [("", ""), ("4", ""), ("", "")]
    assert cells["kl per token, nats"] == [("", ""), ("0.0017", "0.0015 to 0.0019"), ("", "")]


def test_benchmarks_have_their_differences_with_intervals() -> None:
    one = {"policy": 0.5, "reference": 0.45, "delta": 0.05, "delta_ci": [-0.01, 0.11], "num": 12}
    (found,) = tables({"benchmarks": {"arc": {"acc": one}, "alone": {"acc": {"policy": 0.5}}}})
    assert rows(found) == {
        "arc acc": [("0.45", ""), ("0.5", ""), ("+0.05", "\u22120.01 to +0.11")],
        "alone acc": [("", ""), ("0.5", ""), ("", "")],
    }

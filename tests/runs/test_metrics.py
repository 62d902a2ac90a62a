import json
import math

from dpoctl.runs.metrics import MetricsFile


def strict(text):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_every_row_is_one_line_of_strict_json_at_once(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append({"step": 1, "loss": 0.1 + 0.2, "rewards/accuracies": 1.0})
    file.append({"step": 2, "loss": math.nan, "grad_norm": math.inf, "low": -math.inf})
    rows = strict(file.path.read_text())
    assert rows[0]["loss"] == 0.1 + 0.2
    assert rows[1] == {"step": 2, "loss": "nan", "grad_norm": "inf", "low": "-inf"}
    assert math.isnan(float(rows[1]["loss"]))


def test_a_resumed_run_continues_without_gap_or_duplicate(tmp_path):
    straight, resumed = MetricsFile(tmp_path / "a.jsonl"), MetricsFile(tmp_path / "b.jsonl")
    for step in range(1, 9):
        straight.append({"step": step, "loss": 1 / step})
        straight.append({"step": step, "eval_loss": math.inf})
    for step in range(1, 7):
        resumed.append({"step": step, "loss": 1 / step})
        resumed.append({"step": step, "eval_loss": math.inf})
    with resumed.path.open("a") as file:
        file.write('{"step": 7, "lo')  # killed in the middle of a line
    resumed.truncate_after(4)
    for step in range(5, 9):
        resumed.append({"step": step, "loss": 1 / step})
        resumed.append({"step": step, "eval_loss": math.inf})
    assert resumed.path.read_text() == straight.path.read_text()


def test_a_line_cut_short_is_no_row(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append({"step": 1})
    with file.path.open("ab") as raw:
        raw.write(b'{"step": 2, "text": "\xc3')
    assert file.rows() == [{"step": 1}]


def test_nothing_to_truncate_is_fine(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.truncate_after(10)
    assert file.rows() == []
    assert not file.path.exists()

import io
import json
import math
import re

import pytest
from rich.console import Console

from dpoctl import console
from dpoctl.runs import metrics
from dpoctl.runs.metrics import MetricsFile, Progress, evaluation_line


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


METRICS = {"loss": 0.61234567, "rewards/accuracies": 0.684, "tokens_per_second": 1234.5, "grad_norm": 2.0}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_each_logged_step_is_one_plain_line(capsys, clock):
    with Progress(955, start=20) as shown:
        clock[0] += 50.0
        shown.update(119)
        shown.update(120, METRICS)
        shown.update(955, {"loss": 0.5})
    assert capsys.readouterr().err.splitlines() == [
        "step 120/955  loss 0.6123  acc 0.684  1.2k tok/s  eta 6m 58s",
        "step 955/955  loss 0.5",
    ]


def test_the_first_step_of_a_resumed_run_does_not_divide_by_zero(capsys):
    with Progress(10, start=4) as shown:
        shown.update(4, {"loss": 1.0})
    assert capsys.readouterr().err == "step 4/10  loss 1\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.6, "1m 0s"), (61, "1m 1s"), (601, "10m"), (3_661, "1h 1m"), (90_000, "25h 0m")],
)
def test_durations_are_short(clock, seconds, text):
    shown = Progress(2)
    clock[0] += seconds
    assert shown._eta(1) == f"eta {text}"


def test_other_ranks_are_silent(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with Progress(10) as shown:
        shown.update(5, METRICS)
    assert capsys.readouterr().err == ""


def test_on_a_terminal_there_is_a_bar_with_the_numbers(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    screen = Console(file=terminal, force_terminal=True, width=120, color_system=None)
    monkeypatch.setattr(console, "stderr", lambda: screen)
    with Progress(10) as shown:
        shown.update(4, METRICS)
        shown.update(5)
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    assert "5/10" in last
    assert "loss 0.6123  acc 0.684  1.2k tok/s" in last


@pytest.mark.parametrize("width", [60, 80])
def test_a_bar_leaves_room_for_the_keys_that_a_terminal_echoes(width, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    screen = Console(file=terminal, force_terminal=True, width=width, color_system=None)
    monkeypatch.setattr(console, "stderr", lambda: screen)
    with Progress(200) as shown:
        shown.update(125, METRICS)
        with console.WorkProgress("drawing samples", 80) as work:
            work._began -= 60
            work.advance(8)
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue()).replace("\r", "\n").splitlines()
    assert any("drawing" in line for line in lines)
    assert max(len(line) for line in lines) <= width - 4


@pytest.mark.parametrize(
    ("metrics", "line"),
    [
        (
            {
                "eval_loss": 0.61234567,
                "eval_rewards/chosen": 0.1,
                "eval_rewards/rejected": -0.1,
                "eval_rewards/margins": 0.2,
                "eval_rewards/accuracies": 0.75,
                "eval_logps/chosen": -31.0,
                "eval_lengths/rejected": 12.0,
                "eval_loss_se": 0.01,
            },
            "eval at step 4: loss 0.6123, margin 0.2, accuracy 0.75",
        ),
        (
            {
                "eval_harm_loss": 0.5,
                "eval_harm_rewards/chosen": 1.0,
                "eval_harm_logps/chosen": -3.0,
                "eval_harm_kl": 0.1,
            },
            "eval harm at step 4: loss 0.5, rewards/chosen 1, kl 0.1",
        ),
        (
            {"eval_loss": 0.5, "eval_rewards/margins": 1, "eval_web/rewards/margins": 2, "eval_web/logps/chosen": -3},
            "eval at step 4: loss 0.5, margin 1, web margin 2",
        ),
        (
            {"eval_samples/finished": 1.0, "eval_samples/median_length": 9.5, "eval_judge/harsh": 0.25},
            "samples at step 4: finished 1, median length 9.5, harsh 0.25",
        ),
    ],
)
def test_an_evaluation_is_one_line_of_its_main_numbers(metrics, line):
    assert evaluation_line(4, metrics) == line

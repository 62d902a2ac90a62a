import io
import re

import pytest
from rich.console import Console

from dpoctl import console
from dpoctl.runs import progress
from dpoctl.runs.progress import Progress

METRICS = {"loss": 0.61234567, "rewards/accuracies": 0.684, "tokens_per_second": 1234.5, "grad_norm": 2.0}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
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

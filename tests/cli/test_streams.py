"""Standard streams that are closed, full, or lose their reader; and locales that know few characters."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import command, pair_rows, write_recipe, write_rows

DPOCTL = f"{sys.executable} -m dpoctl"


def shell(line: str, **env: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        ["bash", "-c", line],
        env=os.environ | env,
        capture_output=True,
        timeout=120,
        check=False,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.parametrize(
    ("ending", "said"),
    [(">&-", b"error: stdout is closed"), (">/dev/full", b"error: stdout cannot be written: No space left on device")],
)
@pytest.mark.parametrize("arguments", ["--version", "--help", "dpo --help", "convert-data demo:reviewer2"])
def test_what_has_to_be_printed_and_cannot_be_is_one_line(arguments: str, ending: str, said: bytes) -> None:
    done = shell(f"{DPOCTL} {arguments} {ending}")
    assert done.returncode == 5
    (line,) = [line for line in done.stderr.splitlines() if b"note: " not in line]
    assert line.startswith(said)


@pytest.mark.long(">&-", ">&- 2>&-", ">/dev/full")
@pytest.mark.parametrize("ending", [">&-", ">/dev/full", ">&- 2>&-", ">/dev/full 2>/dev/full", "<&- >&- 2>&-"])
def test_a_command_with_nothing_to_print_does_not_notice(ending: str, tmp_path: Path) -> None:
    out = tmp_path / "pairs.jsonl"
    assert shell(f"{DPOCTL} convert-data demo:reviewer2 -o {out} {ending}").returncode == 0
    rows = out.read_text().splitlines()
    assert all(json.loads(row)["prompt"] for row in rows)
    assert shell(f"{DPOCTL} dpo {tmp_path / 'none.yaml'} {ending}").returncode == 2


def on_terminal(line: str, *, columns: int) -> str:
    """Run a command in a terminal, and return what it shows."""
    return subprocess.run(
        ["script", "-qec", f"unset COLUMNS LINES; stty cols {columns}; {line}", "/dev/null"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
    ).stdout


@pytest.mark.skipif(shutil.which("script") is None, reason="needs script, which opens a terminal")
def test_an_error_and_a_list_break_between_words_on_a_terminal() -> None:
    shown = on_terminal(f"{DPOCTL} dpo nowhere-to-be-found.yaml; {DPOCTL} recipes --key eval_on_start", columns=50)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown).replace("\r", "").splitlines()
    assert all(len(line) <= 50 for line in lines)
    said = " ".join(line.strip() for line in lines)
    assert "there is no recipe 'nowhere-to-be-found.yaml'; `dpoctl recipes` lists those that come with dpoctl" in said
    assert "eval_on_start: true or false; default true Evaluate before the first step too." in said


@pytest.fixture
def recipe(tiny_llama_folder: Path, tmp_path: Path) -> Path:
    training: dict[str, Any] = {
        "output_dir": str(tmp_path / "run"),
        "global_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "max_steps": 6,
    }
    return write_recipe(
        tmp_path / "recipe.yaml",
        {
            "method": "sft",
            "model": {"model_name_or_path": str(tiny_llama_folder)},
            "data": {"train": [str(write_rows(tmp_path / "pairs.jsonl", pair_rows(12)))], "max_length": 128},
            "training": training,
        },
    )


@pytest.mark.slow
def test_a_run_whose_reader_goes_away_goes_on_and_writes_to_its_log(recipe: Path, tmp_path: Path) -> None:
    done = shell(f"{DPOCTL} sft {recipe} 2>&1 | head -1; echo ${{PIPESTATUS[0]}}")
    assert done.stdout.splitlines()[-1] == b"0"
    assert json.loads((tmp_path / "run" / "run_status.json").read_text())["state"] == "finished"
    log = (tmp_path / "run" / "logs" / "console.log").read_text()
    assert "step 6/6" in log
    assert "done: " in log


@pytest.mark.long
@pytest.mark.slow
def test_a_run_whose_disk_for_messages_is_full_goes_on(recipe: Path, tmp_path: Path) -> None:
    assert shell(f"{DPOCTL} sft {recipe} --num-processes 2 2>/dev/full").returncode == 0
    assert "step 6/6" in (tmp_path / "run" / "logs" / "console.log").read_text()


def take_hangups() -> None:
    """Take SIGHUP, which `nohup` has programs ignore: so the tests may be started by it too."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.slow
def test_a_closed_terminal_stops_a_run_with_a_checkpoint(recipe: Path, tmp_path: Path) -> None:
    leader, follower = os.openpty()
    arguments = command("sft", recipe, "--set", "training.max_steps=100000")
    run = subprocess.Popen(
        arguments, stdin=follower, stdout=follower, stderr=follower, start_new_session=True, preexec_fn=take_hangups
    )
    os.close(follower)
    deadline = time.monotonic() + 100
    os.set_blocking(leader, False)
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert time.monotonic() < deadline
        try:
            os.read(leader, 1 << 16)
        except BlockingIOError:
            time.sleep(0.02)
    os.close(leader)
    run.send_signal(signal.SIGHUP)
    try:
        assert run.wait(60) == 129
    finally:
        run.kill()
    status = json.loads((tmp_path / "run" / "run_status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("stopped", 129)
    assert status["checkpoint"]
    assert "stopped by signal 1 after step" in (tmp_path / "run" / "logs" / "console.log").read_text()


LOCALES = [
    {"LC_ALL": "C"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"LC_ALL": "POSIX", "PYTHONIOENCODING": "ascii"},
    {"LC_ALL": "en_US.ISO-8859-1"},
]


@pytest.mark.long("LC_ALL=C", "LC_ALL=POSIX PYTHONIOENCODING=ascii", "LC_ALL=en_US.ISO-8859-1")
@pytest.mark.parametrize("locale", LOCALES, ids=lambda env: " ".join(f"{key}={value}" for key, value in env.items()))
def test_text_beyond_ascii_is_utf8_in_files_and_escaped_on_a_terminal(locale: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "dät"
    folder.mkdir()
    row = {"prompt": "é", "chosen": "ü \u4f60", "rejected": "x"}
    write_rows(folder / "é.jsonl", [row])
    done = shell(f"cd {tmp_path} && {DPOCTL} convert-data dät/é.jsonl", **locale)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == row
    assert "dät/é.jsonl".encode() in done.stderr
    assert shell(f"cd {tmp_path} && {DPOCTL} convert-data dät/é.jsonl -o dät/ö.jsonl", **locale).returncode == 0
    assert json.loads((folder / "ö.jsonl").read_text(encoding="utf-8")) == row
    shown = shell(f"cd {tmp_path} && script -qec '{DPOCTL} convert-data dät/é.jsonl' /dev/null", **locale)
    assert shown.returncode == 0, shown.stdout
    assert b"UnicodeEncodeError" not in shown.stdout
    if locale["LC_ALL"] != "en_US.ISO-8859-1":
        assert b"\\u4f60" in shown.stdout

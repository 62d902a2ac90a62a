"""Several processes from one command: who starts them, what they get, and whose exit code comes back."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpoctl.cli.launch import Accelerate, Workers, find_config, plan_launch, processes_asked_of_accelerate
from dpoctl.errors import UsageError

DPO = ("-m", "dpoctl", "dpo", "recipe.yaml")
RANKS = {"RANK": "1", "WORLD_SIZE": "2"}


def call(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, timeout=120)


def ranks(done: subprocess.CompletedProcess[str]) -> list[str]:
    return sorted(word for line in done.stderr.splitlines() if "RAN " in line for word in line.split() if "/" in word)


def test_one_process_needs_no_launch() -> None:
    assert plan_launch(None, None, {}) is None
    assert plan_launch(1, None, {}) is None


def test_several_processes_are_started_here_or_by_accelerate() -> None:
    assert plan_launch(2, None, {}) == Workers(2)
    assert plan_launch(2, "multi_gpu", {}) == Accelerate(find_config("multi_gpu"), 2)


def test_a_rank_starts_nothing() -> None:
    assert plan_launch(None, None, RANKS) is None
    assert plan_launch(2, "multi_gpu", RANKS) is None


@pytest.mark.parametrize(
    ("count", "config", "environment", "said"),
    [
        (3, None, RANKS, "a launcher started 2"),
        (None, None, {"OMPI_COMM_WORLD_SIZE": "4"}, "srun started 4"),
        (None, None, {"SLURM_STEP_NUM_TASKS": "2"}, "srun started 2"),
        (None, "fsdp9", {}, "there is multi_gpu, single_gpu"),
        (
            None,
            None,
            {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"},
            "asked for several processes and started one",
        ),
    ],
)
def test_contradictory_requests_are_refused(
    count: int | None, config: str | None, environment: dict[str, str], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        plan_launch(count, config, environment)


@pytest.mark.parametrize(
    ("command", "asked"),
    [
        ("python accelerate launch --num_processes 2 -m dpoctl dpo r.yaml", 2),
        ("python accelerate launch --num-processes=3 -m dpoctl dpo r.yaml", 3),
        ("python -m accelerate.commands.launch --cpu --num_processes 4 /bin/dpoctl dpo r.yaml", 4),
        ("python accelerate launch -m dpoctl dpo r.yaml --num-processes 2", 1),
        ("python accelerate launch --config_file two.yaml -m dpoctl dpo r.yaml", 2),
        ("python accelerate launch --num_machines 2 -m dpoctl dpo r.yaml", None),
        ("bash", None),
    ],
)
def test_the_number_accelerate_was_asked_for_is_read_off_its_command_line(
    command: str, asked: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("two.yaml").write_text("num_processes: 2\n", encoding="utf-8")
    assert processes_asked_of_accelerate(command.split(), {"HF_HOME": str(tmp_path)}) == asked


def test_accelerates_default_config_counts_too(tmp_path: Path) -> None:
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate/default_config.yaml").write_text("num_processes: 5\n", encoding="utf-8")
    command = ["python", "accelerate", "launch", "-m", "dpoctl", "dpo", "r.yaml"]
    assert processes_asked_of_accelerate(command, {"HF_HOME": str(tmp_path)}) == 5


def test_two_ranks_share_the_cores_and_one_speaks_on_stdout(workplace: Path) -> None:
    done = call(*DPO, "--num-processes", "2", "seed=7")
    assert done.returncode == 0, done.stderr
    assert done.stdout == '{"trained": true}\n'
    assert ranks(done) == ["0/2", "1/2"]
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert done.stderr.count(f"omp {threads} seed 7") == 2


@pytest.mark.parametrize(
    ("fate", "code", "said"),
    [
        ("data", 3, "error: pairs.jsonl:3: no answer"),
        ("crash", 1, "[rank 1] error: ValueError: boom and more (pass --debug for the traceback)"),
        ("killed", 1, "error: rank 1 was ended by SIGKILL; is the memory exhausted?"),
    ],
)
def test_the_exit_code_and_the_one_line_of_the_rank_that_failed_come_back(
    fate: str, code: int, said: str, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FATE", fate)
    done = call(*DPO, "--num-processes", "2")
    assert done.returncode == code
    assert [line for line in done.stderr.splitlines() if "RAN " not in line and line] == [said]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_reaches_every_rank_once_and_decides_the_exit_code(
    number: signal.Signals, code: int, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FATE", "signal")
    command = [sys.executable, *DPO, "--num-processes", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as job:
        _wait_for(workplace / "ready-0", workplace / "ready-1")
        job.send_signal(number)
        _, err = job.communicate(timeout=30)
    assert job.returncode == code
    assert err.count("error: ") == 1
    assert f"stopped by signal {int(number)} after step 7" in err


def test_no_rank_outlives_a_killed_parent(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FATE", "signal")
    command = [sys.executable, *DPO, "--num-processes", "2"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as job:
        ready = [workplace / "ready-0", workplace / "ready-1"]
        _wait_for(*ready)
        job.kill()
    deadline = time.monotonic() + 10
    while any(_alive(int(file.read_text())) for file in ready):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_wrong_recipe_is_refused_before_any_rank_starts(workplace: Path) -> None:
    done = call(*DPO, "--num-processes", "2", "sed=7")
    assert done.returncode == 2
    assert ranks(done) == []
    assert done.stderr.count("error: ") == 1


@pytest.mark.parametrize(
    "launcher",
    [
        ("accelerate.commands.launch", "--num_processes", "2"),
        ("accelerate.commands.launch", "--cpu", "--num_processes", "2"),
        ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"),
        ("torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
    ],
    ids=" ".join,
)
def test_other_launchers_start_one_job_of_two_ranks_without_a_gpu(launcher: tuple[str, ...], workplace: Path) -> None:
    done = call("-m", *launcher, *DPO)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('{"trained": true}') == 1
    assert ranks(done) == ["0/2", "1/2"]


@pytest.mark.parametrize(
    ("name", "count", "started"), [("multi_gpu", 2, ["0/2", "1/2"]), ("single_gpu", 1, ["None/None"])]
)
def test_a_shipped_accelerate_config_starts_the_ranks_and_keeps_their_exit_code(
    name: str, count: int, started: list[str], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FATE", "crash" if count == 2 else "data")
    done = call(*DPO, "--accelerate-config", name, "--num-processes", str(count))
    assert ranks(done) == started
    assert done.returncode == (1 if count == 2 else 3)
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1


def _wait_for(*files: Path) -> None:
    deadline = time.monotonic() + 30
    while not all(file.exists() and file.stat().st_size for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False

"""Several processes from one command: who starts them, what they get, and whose exit code comes back."""

import atexit
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch
from forked import Ended

from dpoctl.cli import failure
from dpoctl.cli.launch import PARENT, Launcher, _accelerate_options, find_config, find_launcher, leave_ranks, report_job
from dpoctl.errors import UsageError

DPO = ("-m", "dpoctl", "dpo", "recipe.yaml")
RANKS = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
# The environment of the one process that accelerate starts without a rank.
SIMPLE = {"ACCELERATE_USE_CPU": "False", "ACCELERATE_MIXED_PRECISION": "no"}


def call(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, timeout=120)


def launched(launcher: tuple[str, ...], workplace: Path) -> Ended:
    """Let another launcher start this job; the processes that it starts are real."""
    name, *options = launcher
    return forked.run_module(name, *options, *DPO, files=workplace / "said")


def ranks(err: str) -> list[str]:
    return sorted(word for line in err.splitlines() if "RAN " in line for word in line.split() if "/" in word)


def test_one_process_needs_no_launch() -> None:
    assert find_launcher(None, None, {}) is None
    assert find_launcher(1, None, {}) is None


def test_several_processes_are_started_here_or_by_accelerate() -> None:
    assert find_launcher(2, None, {}) == Launcher(2)
    assert find_launcher(2, "multi_gpu", {}) == Launcher(2, find_config("multi_gpu"))


def test_a_rank_starts_nothing() -> None:
    assert find_launcher(None, None, RANKS) is None
    assert find_launcher(2, "multi_gpu", RANKS) is None


@pytest.mark.parametrize(
    ("count", "config", "environment", "said"),
    [
        (3, None, RANKS, "contradicts the launcher, which started 2 processes"),
        (None, None, {"OMPI_COMM_WORLD_SIZE": "4"}, "srun started 4"),
        (None, None, {"SLURM_STEP_NUM_TASKS": "2"}, "srun started 2"),
        (None, "fsdp9", {}, "the shipped configs are multi_gpu, single_gpu"),
        (None, None, SIMPLE | {"MASTER_ADDR": "10.0.0.7", PARENT: "1"}, "started one without a rank"),
    ],
)
def test_contradictory_requests_are_refused(
    count: int | None, config: str | None, environment: dict[str, str], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        find_launcher(count, config, environment)


def test_one_process_of_several_is_refused_also_on_this_machine() -> None:
    """It would take the whole data, and the others that were asked for none."""
    for address in ("127.0.0.1", "localhost", "10.0.0.7"):
        with pytest.raises(UsageError, match="was asked for several processes, and started one without a rank"):
            find_launcher(None, None, SIMPLE | {"MASTER_ADDR": address})
    for environment in (SIMPLE, {"MASTER_ADDR": "127.0.0.1"}, SIMPLE | RANKS | {"MASTER_ADDR": "10.0.0.7"}):
        assert find_launcher(None, None, environment) is None


def test_one_process_with_a_rank_of_its_own_may_start_several() -> None:
    """Schedulers of containers number them so, also where there is one."""
    assert find_launcher(8, None, {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "pod"}) == Launcher(8)


def test_two_ranks_share_the_cores_and_one_speaks_on_stdout(workplace: Path) -> None:
    done = call(*DPO, "--num-processes", "2", "seed=7")
    assert done.returncode == 0, done.stderr
    assert done.stdout == '{"trained": true}\n'
    assert ranks(done.stderr) == ["0/2", "1/2"]
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert done.stderr.count(f"omp {threads} seed 7") == 2


@pytest.mark.parametrize(
    ("fate", "code", "said"),
    [
        ("data", 3, "error: pairs.jsonl:3: no answer"),
        ("crash", 1, "[rank 1] error: ValueError: boom and more (pass --debug for the traceback)"),
        (
            "killed",
            1,
            "error: rank 1 was ended by SIGKILL; the machine may be out of memory: if so, the system killed the "
            "process; see `dmesg`",
        ),
    ],
)
def test_the_exit_code_and_the_one_line_of_the_rank_that_failed_come_back(
    fate: str, code: int, said: str, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FATE", fate)
    done = call(*DPO, "--num-processes", "2")
    assert done.returncode == code
    assert [line for line in done.stderr.splitlines() if "RAN " not in line and line] == [said]


@pytest.mark.long("2-130")
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


def test_a_rank_lets_the_first_one_print_the_error_that_all_have(workplace: Path) -> None:
    """A launcher that ends all ranks with the first that ends would leave the error unsaid."""
    wrong, env = (*DPO[2:], "--num-processes", "3"), RANKS | {"LOCAL_WORLD_SIZE": "2"}

    def note_the_wait() -> None:
        sleep = time.sleep
        failure.time = SimpleNamespace(sleep=lambda seconds: ((workplace / "waits").write_text("now"), sleep(seconds)))

    child = forked.start(*wrong, files=workplace / "said", env=env, faults=[note_the_wait])
    _wait_for(workplace / "waits")
    child.send_signal(signal.SIGTERM)
    ended = child.wait()
    assert (ended.code, ended.err) == (-signal.SIGTERM, "")
    alone = forked.run(*wrong, files=workplace / "said", env=env, faults=[_wait_no_longer])
    assert alone.code == 2
    assert alone.last.startswith("[rank 1] error: --num-processes 3 contradicts the launcher")


def _wait_no_longer() -> None:
    failure.FIRST_RANK_SECONDS = 0.0


@pytest.mark.parametrize("code", [0, 3])
def test_a_rank_ends_before_python_does(code: int) -> None:
    def work() -> None:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        # Python's own end would run this.
        atexit.register(os._exit, 98)
        try:
            leave_ranks(code)
        finally:
            os._exit(99)

    assert os.waitstatus_to_exitcode(os.waitpid(forked.fork(work), 0)[1]) == code


def test_a_wrong_recipe_is_refused_before_any_rank_starts(workplace: Path) -> None:
    done = call(*DPO, "--num-processes", "2", "sed=7")
    assert done.returncode == 2
    assert ranks(done.stderr) == []
    assert done.stderr.count("error: ") == 1


@pytest.mark.parametrize(
    ("launcher", "started"),
    [
        (("accelerate.commands.launch", "--num_processes", "1"), ["None/None"]),
        (
            ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"),
            ["0/2", "1/2"],
        ),
        (("torch.distributed.run", "--standalone", "--nproc-per-node", "2"), ["0/2", "1/2"]),
    ],
    ids=str,
)
def test_other_launchers_start_one_job_without_a_gpu(
    launcher: tuple[str, ...], started: list[str], workplace: Path
) -> None:
    done = launched(launcher, workplace)
    assert done.code == 0, done.err
    assert done.out.count('{"trained": true}') == 1
    assert ranks(done.err) == started


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ("--use_fsdp", "--fsdp_sharding_strategy", "SHARD_GRAD_OP", "--num_processes", "2"),
            "FSDP_SHARDING_STRATEGY=SHARD_GRAD_OP requests weights that stay gathered until backward",
        ),
        (("--use_megatron_lm", "--num_processes", "2"), "ACCELERATE_USE_MEGATRON_LM=true requests Megatron-LM"),
        (
            ("--multi_gpu", "--dynamo_backend", "inductor", "--num_processes", "2"),
            "ACCELERATE_DYNAMO_BACKEND=INDUCTOR requests torch.compile",
        ),
        (("--num_processes", "2"), "accelerate launch was asked for several processes, and started one"),
        (("--cpu", "--num_processes", "2"), "accelerate launch was asked for several processes, and started one"),
    ],
    ids=str,
)
def test_accelerate_launch_that_asks_for_what_dpoctl_does_not_do_trains_nothing(
    options: tuple[str, ...], said: str, workplace: Path
) -> None:
    """Accelerate prints its own traceback after the one line, and its exit code is 1."""
    done = launched(("accelerate.commands.launch", *options, "--main_process_port", "0"), workplace)
    assert done.code == 1
    assert ranks(done.err) == []
    assert [line.count(said) for line in done.err.splitlines() if "error: " in line].count(1) == 1
    assert not (workplace / "run").exists()


@pytest.mark.parametrize(
    ("name", "count", "started"), [("multi_gpu", 2, ["0/2", "1/2"]), ("single_gpu", 1, ["None/None"])]
)
def test_a_shipped_accelerate_config_starts_the_ranks_and_keeps_their_exit_code(
    name: str, count: int, started: list[str], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FATE", "crash" if count == 2 else "data")
    options = ("--accelerate-config", name, "--num-processes", str(count))
    done = forked.run(*DPO[2:], *options, files=workplace / "said")
    assert ranks(done.err) == started
    assert done.code == (1 if count == 2 else 3)
    assert "Traceback" not in done.err
    assert done.err.count("error: ") == 1


TWO_MACHINES = {
    "compute_environment": "LOCAL_MACHINE",
    "main_process_ip": "10.0.0.7",
    "main_process_port": 29555,
    "num_machines": 2,
    "num_processes": 2,
    "machine_rank": 0,
}


@pytest.mark.parametrize("kind", ["NO", "MULTI_CPU"])
def test_a_config_of_two_machines_without_gpus_is_refused(kind: str, workplace: Path) -> None:
    Path("two.yaml").write_text(json.dumps(TWO_MACHINES | {"distributed_type": kind}), encoding="utf-8")
    done = forked.run(*DPO[2:], "--accelerate-config", "two.yaml", files=workplace / "said")
    assert done.code == 2
    assert ranks(done.err) == []
    assert f"two.yaml: with distributed_type {kind} accelerate starts one process on each machine" in done.err
    by_accelerate = launched(("accelerate.commands.launch", "--config_file", "two.yaml"), workplace)
    assert by_accelerate.code == 1
    assert ranks(by_accelerate.err) == []
    assert "accelerate launch was asked for several processes, and started one without a rank" in by_accelerate.err


def test_a_config_of_two_machines_keeps_its_port(tmp_path: Path) -> None:
    config = tmp_path / "two.yaml"
    config.write_text(json.dumps(TWO_MACHINES | {"distributed_type": "MULTI_GPU"}), encoding="utf-8")
    assert _accelerate_options(config, None) == []
    assert _accelerate_options(config, 4) == ["--num_processes", "4"]
    assert _accelerate_options(find_config("multi_gpu"), 2) == ["--num_processes", "2", "--main_process_port", "0"]


@pytest.mark.parametrize(
    ("signum", "cause"),
    [
        (signal.SIGABRT, "SIGABRT; a library stopped it, as NCCL does if ranks do not answer"),
        (signal.SIGKILL, "SIGKILL; the machine may be out of memory"),
        (signal.SIGSEGV, "SIGSEGV; compiled code failed"),
        (signal.SIGBUS, "SIGBUS; a mapped file was cut off, or /dev/shm or the disk is full"),
        (signal.SIGRTMIN + 3, f"signal {signal.SIGRTMIN + 3}\n"),
    ],
)
def test_the_signal_that_ended_a_rank_is_named_with_its_usual_cause(
    signum: int, cause: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An abort is no lack of memory."""
    assert report_job([(1, -signum)], tmp_path, as_json=False) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: rank 1 was ended by {cause}")
    assert ("memory" in said) == (signum == signal.SIGKILL)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"{", b"- a"])
def test_a_file_that_is_no_config_is_refused(content: bytes, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_bytes(content)
    with pytest.raises(UsageError, match="not a YAML file of keys and values"):
        _accelerate_options(config, None)


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

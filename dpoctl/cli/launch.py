"""Start several processes from one command, and turn their exit codes into one.

`--num-processes N` starts the ranks from this process: their exit codes are kept, and the parent needs no torch.
`--accelerate-config` runs accelerate's launcher inside this process. A process that a launcher started starts none.
"""

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import CalledProcessError
from types import FrameType
from typing import TYPE_CHECKING, Any

from dpoctl import console
from dpoctl.cli.failure import REPORTS, Failure, run_directory, show
from dpoctl.errors import SetupError, UsageError
from dpoctl.runs.status import record_failed_job
from dpoctl.tasks import launchers

if TYPE_CHECKING:
    from dpoctl.recipe import Recipe

CONFIGS = Path(__file__).parent / "accelerate_configs"
PARENT = "DPOCTL_PARENT"
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU)
# What the signals that end a process mostly mean.
CAUSES: dict[int | None, str] = {
    signal.SIGKILL: "; the machine may be out of memory: if so, the system killed the process; see `dmesg`",
    signal.SIGABRT: "; a library stopped it, as NCCL does if ranks do not answer for training.ddp_timeout seconds",
    signal.SIGSEGV: "; compiled code failed: torch, the driver and CUDA libraries may not fit together",
    signal.SIGBUS: "; a mapped file was cut off, or /dev/shm or the disk is full",
    signal.SIGILL: "; a library was built for another processor",
    signal.SIGFPE: "; compiled code divided by zero",
}
POLL_SECONDS = 0.05
# After one rank has failed the others get this long to end by themselves, and this long again after SIGTERM.
GRACE_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class Launcher:
    """The processes to start.

    Args:
        count: Number of processes; None takes the number in the config.
        config: A config file of accelerate; None starts the processes from this one.
    """

    count: int | None
    config: Path | None = None

    def run(self) -> int:
        """Run the command line of this process in all of them, and return the exit code of the job."""
        if self.config is not None:
            return _run_accelerate(self.config, self.count, sys.argv[1:])
        return _run_workers(self.count or 1, sys.argv[1:])


def find_launcher(
    num_processes: int | None,
    accelerate_config: str | None,
    environment: Mapping[str, str] = os.environ,
    recipe: "Recipe | None" = None,
) -> Launcher | None:
    """Decide whether this process trains, or starts the processes that train.

    Args:
        num_processes: The `--num-processes` option.
        accelerate_config: The `--accelerate-config` option: the name of a shipped config, or a file.
        environment: Environment variables of this process.
        recipe: The recipe, which the launcher may contradict.

    Returns:
        The launcher; None if this process trains.

    Raises:
        UsageError: The options contradict the launcher that started this process, or either asks for something that
            dpoctl does not do.
        SetupError: The launcher that started this process did not number the processes.
    """
    wanted = () if recipe is None else (recipe.model.dtype, recipe.training)
    launchers.check_environment(environment, *wanted)
    if "LOCAL_RANK" in environment:
        world = int(environment["WORLD_SIZE"])
        if num_processes not in (None, world):
            raise UsageError(
                f"--num-processes {num_processes} contradicts the launcher, which started {world} processes",
                hint="remove --num-processes",
            )
        return None
    if PARENT in environment:
        return None
    if accelerate_config is not None:
        config = find_config(accelerate_config)
        asked = launchers.variables_of(_read_config(config))
        launchers.refuse_unsupported(asked, *wanted, source=f"--accelerate-config: {config}")
        return Launcher(num_processes, config)
    return Launcher(num_processes) if num_processes is not None and num_processes > 1 else None


def find_config(name: str) -> Path:
    """Find an accelerate config by the name of a shipped one, or by its path.

    Raises:
        UsageError: Neither exists.
    """
    shipped = {file.stem: file for file in sorted(CONFIGS.glob("*.yaml"))}
    if name in shipped:
        return shipped[name]
    if Path(name).is_file():
        return Path(name)
    raise UsageError(
        f"--accelerate-config: {name!r} is neither a file nor a shipped config",
        hint=f"the shipped configs are {', '.join(shipped)}",
    )


def end_with_parent() -> None:
    """Let the system kill this process when its parent dies: an orphan would still write to the run directory.

    Raises:
        SetupError: The parent is not the process that the environment names.
    """
    parent = os.environ.get(PARENT)
    if parent is None:
        return
    if sys.platform.startswith("linux"):
        import ctypes

        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    # The parent may have died before.
    if parent != str(os.getppid()):
        raise SetupError(
            f"{PARENT} is {parent!r}, and process {os.getppid()} started this one: dpoctl sets it for its own ranks",
            hint="unset it",
        )


def leave_ranks(code: int) -> None:
    """End a process that is one of several ranks, with the exit code of its command; return if it is none.

    Python's own end would abort the process now and then, and lose its exit code: the threads of torch's process group
    free their last tensors meanwhile, and some live on after the group, with the meshes of sharded models.
    """
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return
    if code == 0:
        # After an error, it would wait for ranks that no longer answer.
        with contextlib.suppress(RuntimeError):
            distributed.destroy_process_group()
    os._exit(code)


@dataclass
class WorkerGroup:
    """The running ranks of a job, and the return codes of those that have ended.

    Args:
        workers: One process per rank.
        ended: `(rank, return code)` in the order in which the ranks ended.
        stopping: True after a stop signal was forwarded to the ranks.
        killed: Ranks that were killed because they ignored SIGTERM.
    """

    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    ended: list[tuple[int, int]] = field(default_factory=list)
    stopping: bool = False
    killed: set[int] = field(default_factory=set)

    def signal(self, signum: int) -> None:
        """Send a signal to every rank that is alive."""
        for rank, worker in enumerate(self.workers):
            if worker.poll() is None:
                self.killed |= {rank} if signum == signal.SIGKILL else set()
                worker.send_signal(signum)

    def poll(self) -> bool:
        """Collect the return codes of ranks that have ended; return True if all have."""
        collected = {rank for rank, _ in self.ended}
        for rank, worker in enumerate(self.workers):
            if rank not in collected and (code := worker.poll()) is not None:
                self.ended.append((rank, code))
        return len(self.ended) == len(self.workers)

    @property
    def failed(self) -> bool:
        """True if a rank has ended with an error."""
        return any(code != 0 for _, code in self.ended)

    def wait(self) -> None:
        """Wait until all ranks have ended; when one fails, stop the others: first wait, then SIGTERM, then SIGKILL."""
        while not self.poll():
            if self.failed and not self.stopping:
                break
            time.sleep(POLL_SECONDS)
        for signum in (None, signal.SIGTERM, signal.SIGKILL):
            if signum is not None:
                self.signal(signum)
            deadline = time.monotonic() + GRACE_SECONDS
            while not self.poll() and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)


def _run_workers(count: int, arguments: Sequence[str]) -> int:
    """Run `dpoctl` with the same arguments in several ranks, print the error if one fails, and return the exit code."""
    with tempfile.TemporaryDirectory(prefix="dpoctl-") as reports:
        job = WorkerGroup()
        shared = os.environ | _rank_environment(count, reports)
        command = [sys.executable, "-m", "dpoctl", *arguments]
        with _forwarding_signals(job):
            try:
                for rank in range(count):
                    own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                    # Each in its own session: Ctrl-C on the terminal then reaches it once, through this process.
                    job.workers.append(subprocess.Popen(command, env=shared | own, start_new_session=True))
                job.wait()
            finally:
                job.signal(signal.SIGKILL)
        code = report_job(job.ended, Path(reports), as_json="--json" in arguments, killed=job.killed)
    if code != 0 and (folder := run_directory()) is not None:
        record_failed_job(folder, code, describe_ends(job.ended), [worker.pid for worker in job.workers])
    return code


def describe_ends(ended: Sequence[tuple[int, int]]) -> str:
    """Return the exit code or signal of each rank, in the order in which the ranks ended."""
    ends = [f"signal {-code}" if code < 0 else f"exit code {code}" for _, code in ended]
    return ", then ".join(f"rank {rank}: {end}" for (rank, _), end in zip(ended, ends, strict=True))


def _rank_environment(count: int, reports: str) -> dict[str, str]:
    """Return the environment variables that all ranks of a job share; a failing rank writes to the folder `reports`."""
    threads = max(1, len(os.sched_getaffinity(0)) // count) if hasattr(os, "sched_getaffinity") else 1
    return {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(threads),
        REPORTS: reports,
        PARENT: str(os.getpid()),
    }


def report_job(ended: Sequence[tuple[int, int]], reports: Path, *, as_json: bool, killed: Collection[int] = ()) -> int:
    """Print the error of a failed job, once, and return the exit code of the job.

    A user error is the cause of the broken connections on other ranks, so it is printed first. Next comes a rank that
    a signal ended, which breaks connections too.

    Args:
        ended: `(rank, return code)` in the order in which the ranks ended.
        reports: Folder to which failing ranks wrote their errors.
        as_json: Print a JSON object on stdout as well.
        killed: Ranks that this process killed.
    """
    bad = [(rank, code) for rank, code in ended if code != 0]
    if not bad:
        return 0
    failures = list(_read_reports(reports))
    causes = [failure for failure in failures if failure.is_cause]
    signalled = [(rank, code) for rank, code in bad if code < 0 and rank not in killed]
    if not causes and signalled and (bad[0] == signalled[0] or -signalled[0][1] not in FORWARDED):
        return _report_signal(signalled[0][0], -signalled[0][1], as_json=as_json)
    if failures:
        first = (causes or failures)[0]
        show(first, as_json=as_json)
        for rank in sorted(killed) if not first.is_cause else ():
            console.error(f"rank {rank} did not respond and was killed")
        return first.code
    return bad[0][1]


def _run_accelerate(config: Path, count: int | None, arguments: Sequence[str]) -> int:
    """Run `dpoctl` with the same arguments under accelerate's launcher, and return the exit code.

    Raises:
        UsageError: Accelerate refuses the config.
        SetupError: The config is for GPUs and gives no number of processes, and there is no GPU.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # The ranks print their own errors; the launcher would print them again as a traceback.
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    options = ["--config_file", str(config), *_accelerate_options(config, count), "-m", "dpoctl", *arguments]
    with tempfile.TemporaryDirectory(prefix="dpoctl-") as reports:
        os.environ |= {REPORTS: reports, PARENT: str(os.getpid())}
        ended: list[tuple[int, int]] = []
        try:
            launch_command(launch_command_parser().parse_args(options))
        except ChildFailedError as error:
            ended = [(rank, failure.exitcode) for rank, failure in error.failures.items()]
        except CalledProcessError as error:
            ended = [(0, error.returncode)]
        except SignalException as error:
            return 128 + int(error.sigval)
        except (ValueError, LookupError, TypeError, AttributeError, AssertionError, ImportError, OSError) as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"--accelerate-config: accelerate refuses {config}: {reason}") from error
        return report_job(ended, Path(reports), as_json="--json" in arguments)


def _accelerate_options(config: Path, count: int | None) -> list[str]:
    """Return the options of accelerate's launcher that a config leaves open.

    Raises:
        UsageError: Accelerate would start other processes than the config says, or processes that never meet.
        SetupError: The config is for GPUs and gives no number of processes, and there is no GPU.
    """
    import torch

    content = _read_config(config)
    machines = _count(content, "num_machines", config)
    if count is None and not content.get("num_processes"):
        count = torch.cuda.device_count() * machines
        if count == 0:
            raise SetupError(
                f"--accelerate-config {config.stem}: it needs GPUs, and this machine has none",
                hint="pass --num-processes N to train on CPUs",
            )
    processes = count or _count(content, "num_processes", config)
    if problem := _launch_problem(content, processes, machines):
        raise UsageError(f"--accelerate-config: {config}: {problem}")
    options = [] if count is None else ["--num_processes", str(count)]
    # On one machine any free port will do; several machines must agree on the one in the file.
    return options if machines != 1 else [*options, "--main_process_port", "0"]


def _count(content: Mapping[str, Any], key: str, config: Path) -> int:
    """Return a number of a config file; 1 if it is not there.

    Raises:
        UsageError: It is no number, or too small.
    """
    value = content.get(key, 1)
    if not isinstance(value, int) or value < 1:
        raise UsageError(f"--accelerate-config: {config}: {key} is {value!r}, but must be a whole number, 1 or larger")
    return value


def _launch_problem(content: Mapping[str, Any], processes: int, machines: int) -> str | None:
    """Say why accelerate would not start these processes, or not join them; None if it would."""
    kind = content.get("distributed_type")
    if kind in ("NO", "MULTI_CPU") and max(processes, machines) > 1:
        return (
            f"with distributed_type {kind} accelerate starts one process on each machine, which would train alone; "
            "use torchrun, or --num-processes N on one machine"
        )
    if processes % machines:
        return f"{processes} processes cannot be divided among {machines} machines, and accelerate would start fewer"
    if machines > 1 and (not content.get("main_process_ip") or content.get("main_process_port") == 0):
        return f"{machines} machines need the same main_process_ip and main_process_port to connect to each other"
    return None


def _read_config(config: Path) -> dict[str, Any]:
    """Read a config file of accelerate.

    Raises:
        UsageError: The file is no config.
    """
    import yaml

    try:
        content = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict):
        raise UsageError(f"--accelerate-config: {config} is not a YAML file of keys and values")
    return content


def _report_signal(rank: int, signum: int, *, as_json: bool) -> int:
    """Print that a signal ended a rank; a stop signal is no error."""
    if signum in FORWARDED:
        return 128 + signum
    named = next((known for known in signal.Signals if known == signum), None)
    message = f"rank {rank} was ended by {named.name if named else f'signal {signum}'}{CAUSES.get(named, '')}"
    show(Failure(1, f"error: {message}", {"code": 1, "message": message}), as_json=as_json)
    return 1


@contextlib.contextmanager
def _forwarding_signals(job: WorkerGroup) -> Iterator[None]:
    """Forward the signals that this process gets to all ranks."""

    def forward(signum: int, frame: FrameType | None) -> None:
        job.stopping = True
        job.signal(signum)

    # `nohup` has the terminal's end ignored, by the ranks too.
    heard = [number for number in FORWARDED if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
    before = {signum: signal.signal(signum, forward) for signum in heard}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _read_reports(folder: Path) -> Iterator[Failure]:
    """Read the errors of failed ranks, the first to fail first."""
    for file in sorted(folder.glob("rank-*.json"), key=lambda file: file.stat().st_mtime_ns):
        # A rank that was killed while it wrote leaves an incomplete file.
        with contextlib.suppress(OSError, ValueError, TypeError):
            yield Failure(**json.loads(file.read_text(encoding="utf-8")))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

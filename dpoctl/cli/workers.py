"""Starting the ranks of one job on this machine, and ending with their exit code."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from dpoctl import console
from dpoctl.cli.failure import REPORTS, Failure, run_directory, show
from dpoctl.cli.launch import PARENT
from dpoctl.runs import status

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
POLL_SECONDS = 0.05
# How long the other ranks may take to end by themselves after one has failed, and then after SIGTERM.
GRACE_SECONDS = 3.0


@dataclass
class Job:
    """The ranks of a job, and how each of them ended.

    Args:
        workers: One process per rank.
        ended: `(rank, return code)` in the order of the ends.
        stopping: A signal to stop was passed on.
        put_down: Ranks that did not end by themselves, nor when they were asked.
    """

    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    ended: list[tuple[int, int]] = field(default_factory=list)
    stopping: bool = False
    put_down: set[int] = field(default_factory=set)

    def signal(self, signum: int) -> None:
        """Send a signal to every rank that is alive."""
        for rank, worker in enumerate(self.workers):
            if worker.poll() is None:
                self.put_down |= {rank} if signum == signal.SIGKILL else set()
                worker.send_signal(signum)

    def poll(self) -> bool:
        """Note which ranks have ended; return whether all have."""
        noted = {rank for rank, _ in self.ended}
        for rank, worker in enumerate(self.workers):
            if rank not in noted and (code := worker.poll()) is not None:
                self.ended.append((rank, code))
        return len(self.ended) == len(self.workers)

    @property
    def failed(self) -> bool:
        """Whether a rank has ended that should not have."""
        return any(code != 0 for _, code in self.ended)

    def wait(self) -> None:
        """Wait for the end; when a rank fails the others get some time, then SIGTERM, then SIGKILL."""
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


def run_workers(count: int, arguments: Sequence[str]) -> int:
    """Run `dpoctl` with the same arguments in several ranks, say what failed, and return the exit code.

    Args:
        count: How many ranks.
        arguments: Of the command line, without the program.
    """
    with tempfile.TemporaryDirectory(prefix="dpoctl-") as reports:
        job = Job()
        shared = os.environ | rank_environment(count, reports)
        command = [sys.executable, "-m", "dpoctl", *arguments]
        with _forwarding(job):
            try:
                for rank in range(count):
                    own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                    # In a session of its own: the terminal's Ctrl-C reaches the ranks once, through this process.
                    job.workers.append(subprocess.Popen(command, env=shared | own, start_new_session=True))
                job.wait()
            finally:
                job.signal(signal.SIGKILL)
        code = conclude(job.ended, Path(reports), as_json="--json" in arguments, put_down=job.put_down)
    if code != 0 and (folder := run_directory()) is not None:
        status.settle(folder, code, describe_ends(job.ended))
    return code


def describe_ends(ended: Sequence[tuple[int, int]]) -> str:
    """How the ranks of a job ended, in the order of their ends.

    Args:
        ended: `(rank, return code)`.
    """
    ways = [f"signal {-code}" if code < 0 else f"exit code {code}" for _, code in ended]
    return ", then ".join(f"rank {rank}: {way}" for (rank, _), way in zip(ended, ways, strict=True))


def rank_environment(count: int, reports: str, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What the ranks of a job have in common.

    Args:
        count: How many ranks.
        reports: The folder where a failing rank says why.
        environment: Of this process.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // count) if hasattr(os, "sched_getaffinity") else 1
    return {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS") or str(threads),
        REPORTS: reports,
        PARENT: str(os.getpid()),
    }


def conclude(ended: Sequence[tuple[int, int]], reports: Path, *, as_json: bool, put_down: Collection[int] = ()) -> int:
    """Say what failed, once, and return the exit code of the job.

    A user's error tells more than the broken connections that it causes on other ranks, so it goes first; then comes
    a rank that was killed, which breaks connections too.

    Args:
        ended: `(rank, return code)` in the order of the ends.
        reports: Where failing ranks have said why.
        as_json: Print an object on stdout too.
        put_down: Ranks that this process killed.
    """
    bad = [(rank, code) for rank, code in ended if code != 0]
    if not bad:
        return 0
    said = list(_read_reports(reports))
    foreseen = [failure for failure in said if failure.foreseen]
    killed = [(rank, code) for rank, code in bad if code < 0 and rank not in put_down]
    if not foreseen and killed and (bad[0] == killed[0] or -killed[0][1] not in FORWARDED):
        return _conclude_signal(killed[0][0], -killed[0][1], as_json=as_json)
    if said:
        first = (foreseen or said)[0]
        show(first, as_json=as_json)
        for silent in sorted(put_down) if not first.foreseen else ():
            console.error(f"rank {silent} did not answer and was ended")
        return first.code
    return bad[0][1]


def _conclude_signal(rank: int, signum: int, *, as_json: bool) -> int:
    """Say that a signal ended a rank; a signal to stop needs no words."""
    if signum not in FORWARDED:
        message = f"rank {rank} was ended by {signal.Signals(signum).name}; is the memory exhausted?"
        show(Failure(1, f"error: {message}", {"code": 1, "message": message}), as_json=as_json)
        return 1
    return 128 + signum


@contextlib.contextmanager
def _forwarding(job: Job) -> Iterator[None]:
    """Pass the signals that this process gets on to all ranks."""

    def forward(signum: int, frame: FrameType | None) -> None:
        job.stopping = True
        job.signal(signum)

    before = {signum: signal.signal(signum, forward) for signum in FORWARDED}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _read_reports(folder: Path) -> Iterator[Failure]:
    """What failing ranks have said, the first to fail first."""
    for file in sorted(folder.glob("rank-*.json"), key=lambda file: file.stat().st_mtime_ns):
        # A rank that was killed while it wrote has said nothing.
        with contextlib.suppress(OSError, ValueError, TypeError):
            yield Failure(**json.loads(file.read_text(encoding="utf-8")))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

"""The command line in forks of a warmed process: real exit codes and real kills, without the seconds of importing.

A child gets arguments, as a user would type them, and `faults`: callables that it runs first, to break things.
`--num-processes` starts its ranks by forks of the child, through the launcher that a user would get.
"""

import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

Fault = Callable[[], object]
PATIENCE = 120.0


class Ended(NamedTuple):
    """How a process ended: its exit code, minus the signal where one ended it, and what it said."""

    code: int
    out: str
    err: str

    @property
    def last(self) -> str:
        return self.err.splitlines()[-1] if self.err else ""


@dataclass
class Child:
    """A forked process, with as much of `Popen` as the launcher of ranks uses."""

    pid: int
    files: Path | None = None
    returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def wait(self, seconds: float = PATIENCE) -> Ended:
        """Wait for the end; a child that hangs is killed, and that is an error."""
        deadline = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise AssertionError(f"hung for {seconds} s: {self._said('err')[-2000:]}")
            time.sleep(0.005)
        assert self.returncode is not None
        return Ended(self.returncode, self._said("out"), self._said("err"))

    def _said(self, stream: str) -> str:
        assert self.files is not None
        return self.files.with_suffix(f".{stream}").read_text(encoding="utf-8", errors="replace")


def fork(work: Callable[[], object]) -> int:
    """Run something in a child that never returns here; return its process id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork of a process with threads, from 3.12 on
        pid = os.fork()
    if pid == 0:
        code = 70
        try:
            work()
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(code)
    return pid


def start(*arguments: str | Path, files: Path, faults: Sequence[Fault] = (), env: Mapping[str, str] = {}) -> Child:
    """Start `dpoctl` with these arguments in a fork; what it says goes to files of this name."""

    def work() -> None:
        from dpoctl.cli.app import main

        signal.signal(signal.SIGINT, signal.default_int_handler)
        _redirect(files)
        os.environ.update(env)
        _fork_ranks()
        for fault in faults:
            fault()
        sys.argv = ["dpoctl", *map(str, arguments)]
        main()

    return Child(fork(work), files)


def run(*arguments: str | Path, files: Path, **options: Any) -> Ended:
    """Run `dpoctl` in a fork to its end."""
    return start(*arguments, files=files, **options).wait()


def only_on(rank: int, fault: Fault) -> Fault:
    """A fault of one rank."""
    return in_ranks(lambda: os.environ.get("RANK", "0") == str(rank) and fault())


def in_ranks(fault: Fault) -> Fault:
    """A fault of the processes that train, and not of the one that starts them."""
    from dpoctl.tasks import train as task

    def install() -> None:
        original = task.run

        def run(*args: Any, **options: Any) -> Any:
            fault()
            return original(*args, **options)

        task.run = run

    return install


def _redirect(files: Path) -> None:
    for number, stream in ((1, "out"), (2, "err")):
        target = os.open(files.with_suffix(f".{stream}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(target, number)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", buffering=1, closefd=False)
    from dpoctl import console

    console.stderr.cache_clear()


def _fork_ranks() -> None:
    """Let the launcher of ranks fork this process instead of starting new ones."""
    from dpoctl.cli import launch, workers

    def popen(command: list[str], env: Mapping[str, str], start_new_session: bool) -> Child:
        assert start_new_session
        assert command[1:3] == ["-m", "dpoctl"]

        def work() -> None:
            os.setsid()
            for signum in workers.FORWARDED:
                signal.signal(signum, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.environ.clear()
            os.environ.update(env)
            sys.argv = ["dpoctl", *command[3:]]
            from dpoctl.cli.app import main

            main()

        return Child(fork(work))

    class Forking:
        Popen = staticmethod(popen)

    workers.subprocess = Forking  # type: ignore[assignment]
    assert launch.PARENT

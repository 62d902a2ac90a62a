"""The command line in forks of a warmed process: real exit codes and real kills, without the seconds of importing.

A child gets arguments, as a user would type them, and `faults`: callables that it runs first, to break things.
`--num-processes` starts its ranks by forks of the child, through the launcher that a user would get.
"""

import os
import runpy
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

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
        return Ended(self.wait_for_code(seconds), self._said("out"), self._said("err"))

    def wait_for_code(self, seconds: float = PATIENCE) -> int:
        """Wait for the end of a child, which need not say anything."""
        deadline = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise AssertionError(f"hung for {seconds} s: {self._said('err')[-2000:] if self.files else ''}")
            time.sleep(0.005)
        assert self.returncode is not None
        return self.returncode

    def said(self) -> str:
        """What it has said so far on stderr."""
        return self._said("err")

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
            # torch makes its pool of threads anew in a fork, which two threads that load a model must not do at once.
            torch.set_num_threads(torch.get_num_threads())
            work()
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(code)
    return pid


def start(*arguments: str | Path, files: Path, faults: Sequence[Fault] = (), env: Mapping[str, str] = {}) -> Child:
    """Start `dpoctl` with these arguments in a fork; what it says goes to files of this name."""
    import dpoctl.tasks.train  # noqa: F401, once here, not in each fork
    from dpoctl.cli.app import main

    def work() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # A shell that started the tests in the background has them ignored.
        for signum in (signal.SIGHUP, signal.SIGQUIT):
            signal.signal(signum, signal.SIG_DFL)
        _redirect(files)
        _forget_ranks()
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


def run_module(name: str, *arguments: str, files: Path) -> Ended:
    """Run a module of a library in a fork to its end, as `python -m` would."""

    def work() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _redirect(files)
        sys.argv = [name, *arguments]
        try:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        except Exception:
            traceback.print_exc()
            sys.exit(1)

    return Child(fork(work), files).wait()


def as_ranks(ranks: int, work: Callable[[int], object]) -> None:
    """Run something in forks that a launcher seems to have started, at once; all must end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        given = {"WORLD_SIZE": str(ranks), "MASTER_PORT": str(free.getsockname()[1]), "MASTER_ADDR": "127.0.0.1"}

    def be(rank: int) -> None:
        _forget_ranks()
        os.environ.update(given, RANK=str(rank), LOCAL_RANK=str(rank))
        work(rank)

    children = [fork(partial(be, rank)) for rank in range(ranks)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * ranks


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


def _forget_ranks() -> None:
    """Let a fork find out anew which rank it is."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


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
    from dpoctl.cli import launch

    def popen(command: list[str], env: Mapping[str, str], start_new_session: bool) -> Child:
        assert start_new_session
        assert command[1:3] == ["-m", "dpoctl"]

        def work() -> None:
            os.setsid()
            for signum in launch.FORWARDED:
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

    launch.subprocess = Forking  # type: ignore[assignment]

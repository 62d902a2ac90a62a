"""Signals inside of one process: what is answered, and what is not."""

import hashlib
import os
import resource
import signal
import time
from collections.abc import Iterator
from threading import Thread

import pytest

from dpoctl.errors import StoppedError
from dpoctl.runs.signals import SIGNALS, StopRequest, terminable


@pytest.fixture(autouse=True)
def _heard() -> Iterator[None]:
    """The end of the terminal is heard, also where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def wait_for(text: str, capfd: pytest.CaptureFixture[str]) -> str:
    said, deadline = "", time.monotonic() + 5
    while text not in said:
        assert time.monotonic() < deadline, said
        said += capfd.readouterr().err
        time.sleep(0.01)
    return said


@pytest.mark.parametrize("signum", SIGNALS)
def test_outside_the_loop_the_first_signal_ends_the_work(
    signum: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    handlers = [signal.getsignal(number) for number in SIGNALS]

    def work() -> None:
        with terminable():
            os.kill(os.getpid(), signum)
            time.sleep(5)

    with pytest.raises(StoppedError, match="outside the training loop") as stopped:
        work()
    assert stopped.value.exit_code == 128 + signum
    assert "stopping now" in wait_for("stopping now", capfd)
    assert [signal.getsignal(number) for number in SIGNALS] == handlers


@pytest.mark.parametrize("signum", SIGNALS)
def test_in_the_loop_the_first_is_remembered_and_the_second_ends_it(
    signum: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        with terminable(), StopRequest() as stop:
            os.kill(os.getpid(), signum)
            wait_for("stopping after this step", capfd)
            assert stop.signum == signum
            os.kill(os.getpid(), signum)
            time.sleep(5)

    with pytest.raises(StoppedError, match="in the middle of a step") as stopped:
        work()
    assert stopped.value.exit_code == 128 + signum


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with terminable(), StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.1)
            assert stop.signum == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_signal_to_a_forked_child_is_not_one_to_its_parent(capfd: pytest.CaptureFixture[str]) -> None:
    with terminable(), StopRequest() as stop:
        for _ in range(3):
            child = os.fork()
            if child == 0:
                os.kill(os.getpid(), signal.SIGTERM)
                os._exit(0)
            os.waitpid(child, 0)
        time.sleep(0.2)
        assert stop.signum == 0
    assert "stopping" not in capfd.readouterr().err


def test_two_signals_that_python_hears_as_one_end_the_work(capfd: pytest.CaptureFixture[str]) -> None:
    """Its handler runs once for both: between two operations of the main thread."""
    handler = signal.getsignal(signal.SIGTERM)

    def send() -> None:
        time.sleep(0.2)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)

    def work() -> None:
        with terminable(), StopRequest():
            Thread(target=send, daemon=True).start()
            hashlib.pbkdf2_hmac("sha256", b"", b"", 3_000_000)
            time.sleep(5)

    with pytest.raises(StoppedError, match="in the middle of a step"):
        work()
    assert "stopping now" in wait_for("stopping now", capfd)
    assert signal.getsignal(signal.SIGTERM) == handler


def test_a_system_that_repeats_its_limit_of_time_asks_once(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (0, 60))
    with terminable(), StopRequest() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGXCPU)
            time.sleep(0.05)
        assert stop.signum == signal.SIGXCPU
        assert wait_for("stopping after this step", capfd).count("SIGXCPU") == 1

    def work() -> None:
        with terminable(), StopRequest():
            os.kill(os.getpid(), signal.SIGXCPU)
            wait_for("stopping after this step", capfd)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    with pytest.raises(StoppedError, match="stopped by signal 15 in the middle"):
        work()

"""Stop requests: a signal sets a number, which the loop reads once per step, on all ranks together.

Before the first step and after the last one a signal ends the process as an exception does: every `finally` runs. In
the loop the second signal does that. One more ends the process at once. Each is answered at once, by a thread: Python
runs its handlers between two operations of the main thread, and one of those may take minutes.
"""

import contextlib
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread, main_thread
from types import FrameType
from typing import Any, NoReturn, Self

from dpoctl import console
from dpoctl.errors import StoppedError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGXCPU)
SHOW_CURSOR = "\x1b[?25h"


class TerminatedError(BaseException):
    """A signal arrived. Like `KeyboardInterrupt`, it must pass every `except Exception`."""

    def __init__(self, signum: int, *, in_step: bool = False) -> None:
        super().__init__(signum)
        self.signum = signum
        self.in_step = in_step

    def as_stopped(self) -> StoppedError:
        """Return the error that is reported."""
        return StoppedError(self.signum, in_step=self.in_step)


@contextmanager
def terminable() -> Iterator[None]:
    """End the work of this context when a signal arrives.

    Raises:
        StoppedError: A signal arrived.
    """
    _state.reset()
    # `nohup` has the terminal's end ignored.
    caught = [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, _state.terminate) for number in caught}
    try:
        with _Watcher():
            yield
    except TerminatedError as error:
        raise error.as_stopped() from None
    finally:
        _restore(before)


class StopRequest:
    """Remembers the signal that asks the loop to stop, while its context lasts; a second one ends the work there."""

    def __init__(self) -> None:
        self._signum = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        # The watcher must know first: it answers before the handler runs.
        _state.in_loop = True
        handled = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._remember) for number in handled}
        return self

    def __exit__(self, *exception: object) -> None:
        _restore(self._before)
        _state.in_loop = False

    @property
    def signum(self) -> int:
        """The signal that this process got; 0 if it got none."""
        return self._signum

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        if self._signum and _is_repeated(signum):
            return
        if self._signum or _state.has_second:
            _state.terminate(signum, frame, in_step=True)
        self._signum = signum


def at_abort(write: Callable[[int], None] | None) -> None:
    """Set what is done with the number of a signal that ends the process without any `finally`; None does nothing."""
    _state.at_abort = write


class _State:
    """The state that handlers and watcher share."""

    def __init__(self) -> None:
        self.at_abort: Callable[[int], None] | None = None
        self.reset()

    def reset(self) -> None:
        self.in_loop = False
        self.has_second = False
        self.is_ending = False

    def terminate(self, signum: int, frame: FrameType | None, *, in_step: bool = False) -> None:
        # Once: another exception would break off the `finally` blocks of the first. The watcher takes what follows.
        if not self.is_ending:
            self.is_ending = True
            raise TerminatedError(signum, in_step=in_step)


_state = _State()


class _Watcher:
    """A thread that answers signals as they arrive, and ends the process at the last one."""

    def __enter__(self) -> Self:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        signal.set_wakeup_fd(self._before)
        os.close(self._write)
        self._thread.join()
        os.close(self._read)

    def _watch(self) -> None:
        asked = is_ending = own = False
        while arrived := os.read(self._read, 1):
            if arrived[0] not in SIGNALS:
                continue
            signum = signal.Signals(arrived[0])
            if (asked or is_ending) and not own and _is_repeated(signum):
                continue
            if own:
                own = False
            elif is_ending:
                _end(signum)
            elif _state.in_loop and not asked:
                asked = True
                _answer(signum, "stopping after this step", "stop now")
            else:
                is_ending = _state.has_second = True
                _answer(signum, "stopping now", "end at once")
                # Python calls a handler once for two signals that arrive before it can: then this is the second call.
                if asked and not _state.is_ending:
                    own = True
                    signal.pthread_kill(main_thread().ident or 0, signum)


def _is_repeated(signum: int) -> bool:
    """Whether the system sends a signal again every second, as it does when the time is used up: no second request."""
    limit = resource.getrlimit(resource.RLIMIT_CPU)[0]
    return signum == signal.SIGXCPU and limit != resource.RLIM_INFINITY and time.process_time() >= limit


def _leave_pipe() -> None:
    """Keep a forked child, whose signals are its own, from writing into its parent's pipe."""
    with contextlib.suppress(ValueError):
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_leave_pipe)


def _answer(signum: signal.Signals, does: str, more: str) -> None:
    name, again = ("", "press Ctrl-C again") if signum == signal.SIGINT else (f"{signum.name}: ", "send it again")
    # The terminal may be what went away; and without this thread the last signal would end nothing.
    with contextlib.suppress(Exception):
        console.say(f"{name}{does}; {again} to {more}")


def _end(signum: signal.Signals) -> NoReturn:
    try:
        if _state.at_abort is not None:
            _state.at_abort(signum)
        if sys.stderr.isatty():
            # A progress bar hides it.
            sys.stderr.write(SHOW_CURSOR)
        console.say(f"{signum.name}: ended at once")
    finally:
        # Whatever fails, such as a write to a full disk: the process ends.
        os._exit(128 + signum)


def _restore(before: dict[signal.Signals, Any]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)

"""A request to stop: a signal sets a number, which the loop looks at once a step, on all ranks together.

Before the first step and after the last one a signal ends the process as an error does: through every `finally`.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn, Self

from dpoctl.errors import StoppedError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class TerminatedError(BaseException):
    """A signal came; like `KeyboardInterrupt` no `except Exception` may take it for something else."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


@contextmanager
def terminable() -> Iterator[None]:
    """Let a signal end what is done here, wherever it is; a second one ends the process at once.

    Raises:
        StoppedError: A signal came.
    """

    def terminate(signum: int, frame: FrameType | None) -> NoReturn:
        for number in before:
            signal.signal(number, signal.SIG_DFL)
        raise TerminatedError(signum)

    # Of SIGINT Python does as much by itself.
    before = {number: signal.signal(number, terminate) for number in SIGNALS if number != signal.SIGINT}
    try:
        yield
    except TerminatedError as error:
        raise StoppedError(error.signum) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopRequest:
    """Catches the signals that ask for an end, for as long as the context lasts.

    The handler does nothing but remember. A second signal gets the default treatment: it ends the process at once.
    """

    def __init__(self) -> None:
        self._signum = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def signum(self) -> int:
        """The signal that this process has seen; 0 when there is none."""
        return self._signum

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        self._signum = signum
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)

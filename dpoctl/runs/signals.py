"""A request to stop: a signal sets a number, which the loop looks at once a step, on all ranks together."""

import signal
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


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

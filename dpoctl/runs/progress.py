"""How far training is: a bar on a terminal, plain lines elsewhere, nothing on ranks that do not speak."""

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from dpoctl import console

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

_SHOWN = {"loss": "loss", "rewards/accuracies": "acc"}


class Progress:
    """Shows steps and their metrics while its `with` block runs.

    Args:
        total: Steps of the whole run.
        start: Steps done before this process began, by the run that it resumes.
        unit: What a step is.
    """

    def __init__(self, total: int, *, start: int = 0, unit: str = "step") -> None:
        self.total = total
        self.start = start
        self.unit = unit
        self._began = time.monotonic()
        self._bar: Bar | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        if console.is_main_process() and sys.stderr.isatty() and console.stderr().is_interactive:
            self._bar = _build_bar(self.unit)
            self._task = self._bar.add_task(self.unit, total=self.total, completed=self.start, numbers="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, metrics: Mapping[str, Any] | None = None) -> None:
        """Report a step done.

        Args:
            step: Steps done so far, by any process of the run.
            metrics: What was logged at this step, under the names of `metrics.jsonl`; without, only a bar moves.
        """
        numbers = "  ".join(_numbers(metrics or {}))
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step)
            if metrics:
                self._bar.update(self._task, numbers=numbers)
        elif metrics is not None:
            console.say("  ".join(filter(None, [f"{self.unit} {step}/{self.total}", numbers, self._eta(step)])))

    def _eta(self, step: int) -> str:
        done = step - self.start
        if done <= 0 or step >= self.total:
            return ""
        return f"eta {_duration((time.monotonic() - self._began) / done * (self.total - step))}"


def _build_bar(unit: str) -> "Bar":
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn  # noqa: PLC0415
    from rich.progress import Progress as Bar  # noqa: PLC0415

    columns = (unit, MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[numbers]}"), TimeRemainingColumn())
    return Bar(*columns, console=console.stderr())


def _numbers(metrics: Mapping[str, Any]) -> list[str]:
    shown = [f"{label} {metrics[name]:.4g}" for name, label in _SHOWN.items() if name in metrics]
    if "tokens_per_second" in metrics:
        shown.append(f"{_short(metrics['tokens_per_second'])} tok/s")
    return shown


def _short(number: float) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minutes}m"
    return f"{minutes}m" if minutes >= 10 else f"{minutes}m {seconds}s" if minutes else f"{seconds}s"

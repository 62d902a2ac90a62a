"""The metrics file of a run, one JSON object per line, and the progress display."""

import json
import math
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from dpoctl import console
from dpoctl.files import open_here, write_atomically

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

STANDARD_ERROR = "_se"
"""The end of the name of a metric that is the standard error of another one."""
_SHOWN = {"loss": "loss", "rewards/accuracies": "acc"}
_LABELS = {
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "nll_loss": "nll",
    "median_length": "median length",
}
_UNSHOWN = ("logps/chosen", "logps/rejected", "lengths/chosen", "lengths/rejected")
_SIDES = ("rewards/chosen", "rewards/rejected")


class MetricsFile:
    """`metrics.jsonl`: rows in the order of their steps.

    Append the rows of a step before its checkpoint is saved: then a run that resumes from it has no gap.

    Args:
        path: The file; created with the first row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row so that other processes see it at once.

        Args:
            row: Flat, with `step`. A number that is not finite becomes a string, `"nan"`: JSON does not have it.
        """
        strict = {key: str(v) if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        line = json.dumps(strict, allow_nan=False)
        with open_here(self.path, "a") as file:
            file.write(line + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """Return all rows so far, without a last line that a kill cut off."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        return [row for line in lines if (row := _parse(line)) is not None]

    def truncate_after(self, step: int) -> None:
        """Delete the rows after a step: a resumed run writes them again."""
        if self.path.exists():
            kept = [json.dumps(row) + "\n" for row in self.rows() if row["step"] <= step]
            write_atomically(self.path, "".join(kept))


class Progress:
    """Shows steps and metrics while its context lasts: a bar on a terminal, plain lines elsewhere.

    Args:
        total: Steps of the whole run.
        start: Steps that were done before this process started.
        unit: Name of a step.
    """

    def __init__(self, total: int, *, start: int = 0, unit: str = "step") -> None:
        self.total = total
        self.start = start
        self.unit = unit
        self._began = time.monotonic()
        self._shown = ExitStack()
        self._bar: Bar | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        if console.is_main_process() and console.is_interactive():
            self._bar = self._shown.enter_context(console.bar())
            self._task = self._bar.add_task(self.unit, total=self.total, completed=self.start, numbers="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._shown.close()

    def update(self, step: int, metrics: Mapping[str, Any] | None = None) -> None:
        """Show a step that is done.

        Args:
            step: Steps done so far, including those before a resume.
            metrics: The metrics logged at this step, by their names in `metrics.jsonl`; without, only a bar moves.
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
        return f"eta {console.duration((time.monotonic() - self._began) / done * (self.total - step))}"


def evaluation_line(step: int, metrics: Mapping[str, Any]) -> str:
    """Return the main numbers of an evaluation, or of its samples, as a line; `metrics.jsonl` has all of them."""
    first = next(iter(metrics))
    if first.startswith("eval_samples/"):
        title, plain = "samples", {name.partition("/")[2]: value for name, value in metrics.items()}
    else:
        prefix = first.removesuffix("loss")
        title, plain = prefix.rstrip("_").replace("_", " ", 1), {n.removeprefix(prefix): v for n, v in metrics.items()}
    unshown = _UNSHOWN + (_SIDES if "rewards/margins" in plain else ())
    shown = [
        f"{_labelled(name)} {value:.4g}"
        for name, value in plain.items()
        if not name.endswith((STANDARD_ERROR, *unshown))
    ]
    return f"{title} at step {step}: {', '.join(shown)}"


def _labelled(name: str) -> str:
    end = next((end for end in _LABELS if name == end or name.endswith(f"/{end}")), "")
    return f"{name.removesuffix(end).replace('/', ' ')}{_LABELS[end]}" if end else name


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


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

"""Experiment trackers. One that fails or hangs is dropped with a warning, and training continues.

Each tracker runs in its own thread, so that a slow service does not slow down training.

To add a tracker, write a function that builds accelerate's tracker for it, and add a line to `TRACKERS`.
"""

import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Full, Queue
from threading import Event, Thread
from typing import Any

from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from dpoctl import console
from dpoctl.errors import SetupError
from dpoctl.files import to_json, write_atomically
from dpoctl.redact import redact_source
from dpoctl.runs.environment import installed_version

START_SECONDS = 10.0
FINISH_SECONDS = 60.0
"""How long a run waits for a tracker that does not respond."""
MOST_WAITING = 10_000
"""Number of rows that may wait to be sent."""


@dataclass(frozen=True)
class TrackedRun:
    """The run that a tracker follows."""

    folder: Path
    """The run directory."""
    run_name: str
    """The name of the run in the tracker."""
    run_id: str
    """The id of the run; stays the same when the run is resumed."""
    resumed_at: int | None
    """The step that this process resumes from; None if it starts the run."""


def _tensorboard(run: TrackedRun) -> GeneralTracker:
    purge = None if run.resumed_at is None else run.resumed_at + 1
    return TensorBoardTracker("tensorboard", run.folder, purge_step=purge)


def _wandb(run: TrackedRun) -> GeneralTracker:
    project = os.environ.get("WANDB_PROJECT", "dpoctl")
    logs = run.folder / "logs"  # wandb uses the system's temporary folder if this one is missing
    logs.mkdir(exist_ok=True)
    options = {"name": run.run_name, "id": run.run_id, "dir": str(logs)}
    return WandBTracker(project, resume="allow", **options)


def _trackio(run: TrackedRun) -> GeneralTracker:
    resume = "never" if run.resumed_at is None else "allow"
    return TrackioTracker(os.environ.get("TRACKIO_PROJECT", "dpoctl"), name=run.run_name, resume=resume)


TRACKERS: dict[str, Callable[[TrackedRun], GeneralTracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}


def check_installed(names: Sequence[str]) -> None:
    """Refuse trackers that are not installed; call this before any model is loaded.

    Raises:
        SetupError: A package is missing.
    """
    missing = [name for name in names if installed_version(name) is None]
    if missing:
        raise SetupError(
            f"training.report_to: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed",
            hint=f"pip install 'dpoctl[{','.join(missing)}]'",
        )


class Trackers:
    """The trackers of a run that still work; only rank 0 has them.

    Args:
        names: Keys of `TRACKERS`.
        folder: The run directory; keeps the run id in `trackers.json`.
        run_name: The default is the name of the folder.
        config: The resolved recipe as nested plain data.
        resumed_at: The step that the run resumes from; None if it starts.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        *,
        config: Mapping[str, Any],
        run_name: str | None = None,
        resumed_at: int | None = None,
    ) -> None:
        self._threads: list[_TrackerThread] = []
        if not names:
            return
        run = TrackedRun(folder, run_name or folder.resolve().name, _run_id(folder, resumed_at), resumed_at)
        flat = _flatten(config)
        self._threads = [_TrackerThread(name, run, flat) for name in names]
        for thread in self._threads:
            thread.wait_for_start()

    def log(self, metrics: Mapping[str, Any], step: int, *, prefix: str = "train") -> None:
        """Send the numbers of a step, each as `prefix/name`."""
        numbers = {f"{prefix}/{k}": v for k, v in metrics.items() if k != "step" and isinstance(v, int | float)}
        for thread in self._threads:
            thread.send(numbers, step)

    def log_texts(self, texts: Mapping[str, str], step: int) -> None:
        """Send the texts of a step by name, indented: trackers read Markdown, and show indented text unchanged."""
        quoted = {name: "\n".join(f"    {line}" for line in text.splitlines()) for name, text in texts.items()}
        for thread in self._threads:
            thread.send(quoted, step)

    def finish(self) -> None:
        """Close all trackers, and wait a limited time until they have sent everything."""
        for thread in self._threads:
            thread.finish()
        self._threads = []


class _TrackerThread:
    """One tracker in its own thread, with a queue of rows to send."""

    def __init__(self, name: str, run: TrackedRun, config: dict[str, Any]) -> None:
        self._name = name
        self._works = True
        self._started = Event()
        self._queue: Queue[tuple[dict[str, Any], int] | None] = Queue(MOST_WAITING)
        self._thread = Thread(target=self._run, args=(run, config), name=name, daemon=True)
        self._thread.start()

    def wait_for_start(self) -> None:
        if not self._started.wait(START_SECONDS):
            self._drop(f"did not start within {START_SECONDS:g} s")

    def send(self, values: Mapping[str, Any], step: int) -> None:
        if not self._works:
            return
        try:
            self._queue.put_nowait((dict(values), step))
        except Full:
            self._drop(f"is {MOST_WAITING} rows behind")

    def finish(self) -> None:
        if not self._works:
            return
        with suppress(Full):
            self._queue.put(None, timeout=FINISH_SECONDS)
        self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive():
            self._drop(f"did not finish within {FINISH_SECONDS:g} s")

    def _run(self, run: TrackedRun, config: dict[str, Any]) -> None:
        action = "start"
        try:
            tracker = TRACKERS[self._name](run)
            tracker.start()
            tracker.store_init_configuration(config)
            self._started.set()
            action = "log"
            while (row := self._queue.get()) is not None:
                tracker.log(row[0], step=row[1])
            action = "finish"
            tracker.finish()
        except BaseException as error:  # a service and its client may raise anything
            self._drop(f"failed to {action}: {redact_source(str(error))}")
        finally:
            self._started.set()

    def _drop(self, why: str) -> None:
        """Stop using the tracker, with one warning."""
        if self._works:
            self._works = False
            console.warn(f"{self._name} {why}; it gets no more metrics, but metrics.jsonl has all of them")


def _run_id(folder: Path, resumed_at: int | None) -> str:
    note = folder / "trackers.json"
    if resumed_at is not None and note.is_file():
        return note.read_text(encoding="utf-8").strip().strip('"')
    run_id = secrets.token_hex(4)
    write_atomically(note, to_json(run_id))
    return run_id


def _flatten(config: Any, path: str = "") -> dict[str, Any]:
    """Return nested data as `section.key: scalar`, the form that every tracker can show."""
    if isinstance(config, Mapping) and config:
        items = [(f"{path}.{key}" if path else str(key), item) for key, item in config.items()]
        return {name: value for key, item in items for name, value in _flatten(item, key).items()}
    if isinstance(config, bool | int | float | str) or config is None:
        return {path: config}
    return {path: str(config)}

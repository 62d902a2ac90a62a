"""Traces are taken in a process of their own, once for all tests, whichever worker asks first."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_cuda.shim import OtherBuildError, UnavailableError, library
from filelock import FileLock

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build" / "fake_cuda"
Group = dict[str, Any]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.fake_cuda)


@pytest.fixture(scope="session")
def traced(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Group]]:
    """Return what was found of the traces of a group, by name."""
    try:
        library(BUILD)
    except OtherBuildError as reason:
        pytest.skip(f"no fake GPU: {reason}")
    except UnavailableError as reason:
        if request.config.getoption("--require-fake-cuda") or os.environ.get("CI"):
            pytest.fail(f"a fake GPU is required here: {reason}")
        pytest.skip(f"no fake GPU: {reason}")
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        # All workers' folders lie in one.
        folder = folder.parent

    def group(name: str) -> Group:
        file = folder / f"traces-{name}.json"
        with FileLock(f"{file}.lock"):
            if not file.is_file():
                file.write_text(tracing.take(name), encoding="utf-8")
        found: Group = json.loads(file.read_text(encoding="utf-8"))
        return found

    with Tracing(tmp_path_factory.mktemp("traces") / "err") as tracing:
        yield group


class Tracing:
    """The process that takes traces; it starts with the first."""

    def __init__(self, err: Path) -> None:
        self._err = err
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Tracing":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.communicate()

    def take(self, name: str) -> str:
        """Take the traces of a group."""
        if self._process is None:
            self._process = self._start()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{name}\n")
        self._process.stdin.flush()
        answer = next((line for line in self._process.stdout if line.startswith("{")), None)
        if answer is None:
            self._process = None
        assert answer is not None, self._err.read_text(encoding="utf-8")[-3000:]
        return answer

    def _start(self) -> "subprocess.Popen[str]":
        with self._err.open("w", encoding="utf-8") as err:
            return subprocess.Popen(
                [sys.executable, "-W", "ignore", str(HERE / "traces.py"), "--serve"],
                env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=err,
                text=True,
            )

"""A command that is refused changes nothing in the folder of a run; and what is said of runs that did not finish."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny_runs import merge, pair_rows, write_recipe, write_rows

from dpoctl.errors import StoppedError, UsageError
from dpoctl.runs.report import render
from dpoctl.runs.status import read_status, record_failed_job, recorded_status
from dpoctl.tasks.finished_run import require_model

Run = Callable[..., dict[str, Any]]
Files = dict[str, tuple[bytes, int]]


def files_of(folder: Path) -> Files:
    """The content of every file, and when it was written."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.fixture
def stopped(dpo_recipe: dict[str, Any], train: Run, tmp_path: Path) -> Path:
    """A run that a signal has stopped after its third step."""
    from dpoctl.tasks.recorder import Recorder

    advance = Recorder.advance

    def signalled(self: Recorder, step: int) -> None:
        advance(self, step)
        if step == 2:
            os.kill(os.getpid(), 15)

    Recorder.advance = signalled  # type: ignore[method-assign]
    try:
        with pytest.raises(StoppedError):
            train(dpo_recipe)
    finally:
        Recorder.advance = advance  # type: ignore[method-assign]
    write_recipe(tmp_path / "recipe.yaml", dpo_recipe)
    return Path(dpo_recipe["training"]["output_dir"])


REFUSED: dict[str, tuple[Callable[[Path], list[str]], int]] = {
    "no option": (lambda folder: [], 2),
    "another beta": (lambda folder: ["--resume", "--set", "beta=0.2"], 2),
    "other data": (
        lambda folder: [
            *("--resume", "--allow-changed", "data.train", "--set"),
            f"data.train={json.dumps([str(write_rows(folder / 'other.jsonl', pair_rows(9, seed=3)))])}",
        ],
        2,
    ),
    "no usable rows": (
        lambda folder: [
            *("--resume", "--allow-changed", "data.train", "--set"),
            f"data.train={json.dumps([str(write_rows(folder / 'none.jsonl', [{'prompt': 'a'}] * 3))])}",
        ],
        3,
    ),
    "overwritten by no usable rows": (
        lambda folder: [
            *("--overwrite", "--set"),
            f"data.train={json.dumps([str(write_rows(folder / 'none.jsonl', [{'prompt': 'a'}] * 3))])}",
        ],
        3,
    ),
    "overwritten by a reference that is no model": (
        lambda folder: ["--overwrite", "--set", f"dpo.reference.path={folder / 'nowhere'}"],
        5,
    ),
    "a model that is gone": (lambda folder: [*("--resume",), *gone(folder)], 5),
}


def gone(folder: Path) -> list[str]:
    shutil.rmtree(folder / "tiny-llama")
    return []


@pytest.mark.parametrize("what", REFUSED)
def test_a_refused_command_changes_nothing(
    what: str, stopped: Path, main: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options, code = REFUSED[what]
    arguments = options(tmp_path)
    before = files_of(stopped)
    assert json.loads(before["run_status.json"][0])["state"] == "stopped"
    assert main("dpo", tmp_path / "recipe.yaml", *arguments) == code, capfd.readouterr().err
    after = files_of(stopped)
    assert after.keys() == before.keys()
    # The status said that the run runs, while it was found out.
    assert {name for name in before if after[name][0] != before[name][0]} == set()
    assert {name for name in before if after[name] != before[name]} <= {"run_status.json"}


def test_what_is_refused_can_go_on_as_it_was(stopped: Path, main: Callable[..., int], tmp_path: Path) -> None:
    assert main("dpo", tmp_path / "recipe.yaml", "--resume", "--set", "beta=0.2") == 2
    assert main("dpo", tmp_path / "recipe.yaml", "--resume") == 0
    assert read_status(stopped)["state"] == "finished"  # type: ignore[index]


def test_a_first_run_that_is_refused_says_so(
    dpo_recipe: dict[str, Any], main: Callable[..., int], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", merge(dpo_recipe, {"dpo.reference.path": str(tmp_path / "no")}))
    assert main("dpo", recipe) == 5
    status = read_status(Path(dpo_recipe["training"]["output_dir"]))
    assert status is not None
    assert (status["state"], status["exit_code"]) == ("failed", 5)


def recorded(folder: Path, **changes: Any) -> None:
    with recorded_status(folder):
        about = json.loads((folder / "run_status.json").read_text())
    (folder / "run_status.json").write_text(json.dumps(about | changes))


@pytest.mark.parametrize("pid", ["of nobody", "of another process"])
def test_a_run_whose_process_is_dead_has_died(pid: str, stopped: Path) -> None:
    recorded(stopped)
    assert read_status(stopped)["state"] == "running"  # type: ignore[index]
    with pytest.raises(UsageError, match=r"the run is running \(process \d+ on "):
        require_model(stopped)
    # One number is free; the other was given to a process that started at another time.
    recorded(stopped, **({"pid": 2**22 + 1} if pid == "of nobody" else {"pid": 1}))
    assert read_status(stopped)["state"] == "died"  # type: ignore[index]
    with pytest.raises(UsageError, match=r"the run has died \(process \d+ has ended\); continue it with --resume"):
        require_model(stopped)
    assert "The run has died" in render(stopped)


def test_a_run_on_another_machine_may_run(tmp_path: Path) -> None:
    recorded(tmp_path, pid=2**22 + 1, host="elsewhere")
    assert read_status(tmp_path)["state"] == "running"  # type: ignore[index]


def test_a_launcher_leaves_the_state_of_an_earlier_job(tmp_path: Path) -> None:
    recorded(tmp_path)
    record_failed_job(tmp_path, 2, "rank 0: exit code 2", [os.getpid() + 1])
    assert json.loads((tmp_path / "run_status.json").read_text())["state"] == "running"
    record_failed_job(tmp_path, 1, "rank 0: signal 9", [os.getpid()])
    assert json.loads((tmp_path / "run_status.json").read_text())["state"] == "failed"
    assert psutil.pid_exists(os.getpid())


@pytest.mark.parametrize("changes", [{}, {"lora": {"r": 2}}, {"lora": {"r": 2, "modules_to_save": ["lm_head"]}}])
def test_float16_is_refused_on_a_cpu_before_data_are_read(
    changes: dict[str, Any], dpo_recipe: dict[str, Any], train: Run
) -> None:
    with pytest.raises(UsageError, match=r"model\.dtype: float16 trains on GPUs only"):
        train(dpo_recipe, {"model.dtype": "float16", **changes})
    assert not Path(dpo_recipe["training"]["output_dir"]).exists()

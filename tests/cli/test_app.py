"""The command line as a shell sees it: help, exit codes, what goes to which stream."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dpoctl import __version__
from dpoctl.cli import failure
from dpoctl.cli.app import app, main
from dpoctl.errors import DataError, RunError, SetupError, StoppedError, UsageError

COMMANDS = [str(command.name) for command in app.registered_commands]


def call(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dpoctl", *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | changes,
        capture_output=True,
        text=True,
        check=False,
    )


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["dpoctl", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from dpoctl.cli.app import main\n"
        f"for arguments in [], *([command] for command in {COMMANDS!r}):\n"
        "    sys.argv = ['dpoctl', *arguments, '--help']\n"
        "    try: main()\n"
        "    except SystemExit as ended: assert ended.code == 0, arguments\n"
        "    heavy = {'torch', 'transformers', 'accelerate', 'datasets', 'peft', 'numpy', 'yaml'}\n"
        "    assert not heavy & set(sys.modules), f'{arguments} imported {heavy & set(sys.modules)}'\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage: dpoctl") == 1 + len(COMMANDS)


def test_the_help_of_dpo_says_what_a_reward_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, "dpo", "--help") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "summed over its tokens, not averaged. A higher beta keeps the policy closer" in said


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_before_anything_else_and_fits_on_a_screen(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for option in ("-h", "--help"):
        assert run_main(monkeypatch, command, option) == 0
        lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip()]
        assert lines[0].startswith(f"Usage: dpoctl {command}")
        assert lines[1].startswith(f"dpoctl {command} ")
        assert len(lines) <= (55 if command == "convert-data" else 40)


def test_the_top_help_groups_the_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ((), ("--help",)):
        assert run_main(monkeypatch, *arguments) == 0
        out = capsys.readouterr().out
        assert out.index("Train") < out.index("sft") < out.index("Data") < out.index("Measure") < out.index("eval")


def test_the_version_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"dpoctl {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("dop",), "Did you mean 'dpo'"),
        (("dpo", "r.yaml", "--resum"), "--resume"),
        (("dpo",), "missing argument 'RECIPE'"),
        (("dpo", "r.yaml", "--num-processes", "0"), "--num-processes"),
        (("dpo", "r.yaml", "--resume", "--overwrite"), "cannot be used together"),
        (("eval", "nowhere"), "RUN: there is no directory 'nowhere'"),
        (("convert-data", "x", "--format", "zzz"), "expected one of auto"),
        (("convert-data", "x", "--column-map", "zzz"), "expected NAME=COLUMN"),
        (("convert-data", "x", "--option", "zzz"), "expected KEY=VALUE"),
        (("convert-data", "x", "--pairs", "zzz"), "best-worst"),
        (("convert-data", "x", "--detect", "--to", "pairs"), "--to has no effect: --detect converts nothing"),
        (
            ("convert-data", "r.yaml", "--format", "contrastive", "--strict"),
            "--strict has no effect: --format contrastive takes its settings from the recipe",
        ),
        (("convert-data", "x", "--pairs", "none", "--to", "pairs"), "splits them"),
        (("convert-data", "x", "--pairs", "all", "--to", "messages"), "--pairs would do nothing"),
    ],
    ids=str,
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert said in err
    assert len(err.splitlines()) <= 2


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RunError("loss is not finite"), 1, "error: loss is not finite"),
        (UsageError("wrong", hint="do this"), 2, "error: wrong; do this"),
        (DataError("no rows"), 3, "error: no rows"),
        (SetupError("no GPU"), 5, "error: no GPU"),
        (StoppedError(15, 3), 143, "error: stopped by signal 15"),
        (ValueError("boom\n  twice"), 1, "error: ValueError: boom twice (pass --debug"),
        (MemoryError(), 1, "error: MemoryError: no message"),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(32, "Broken pipe"), 1, ""),
    ],
    ids=repr,
)
def test_every_kind_of_error_has_its_exit_code_and_one_line(
    error: BaseException,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr("dpoctl.tasks.evaluate.run", fail)
    monkeypatch.setattr(failure, "_run_directory", None)
    assert run_main(monkeypatch, "eval", str(tmp_path)) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(said)
    assert len(err.splitlines()) == bool(said)


def test_errors_are_an_object_on_stdout_where_a_machine_reads(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("method: dpo\nlora: 8\nmodel: {}\n", encoding="utf-8")
    done = call("dpo", str(recipe), "--json")
    error = json.loads(done.stdout)["error"]
    assert (error["code"], error["file"], error["line"]) == (2, str(recipe), 1)
    assert [problem["line"] for problem in error["problems"]] == [1, 1, 2, 3]
    assert done.stderr.startswith(f"{recipe}:1:1: error: missing key")
    assert done.returncode == 2


@pytest.mark.parametrize("way", ["--debug", "DPOCTL_DEBUG"])
def test_a_traceback_is_shown_on_demand_only(
    way: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["dpo", "recipe.yaml", "sed=7"]
    assert run_main(monkeypatch, *arguments) == 2
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setenv("DPOCTL_DEBUG", "1" if way == "DPOCTL_DEBUG" else "0")
    assert run_main(monkeypatch, *arguments, *(["--debug"] if way == "--debug" else [])) == 2
    assert capsys.readouterr().err.startswith("Traceback")


def test_a_failed_run_leaves_its_traceback_in_the_run_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(failure, "_run_directory", tmp_path)
    assert failure.report(ValueError("before"), as_json=False, debug=False) == 1
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "recipe.yaml").touch()
    assert failure.report(ValueError("boom"), as_json=False, debug=False) == 1
    assert (tmp_path / "error.log").read_text(encoding="utf-8").rstrip().endswith("ValueError: boom")
    assert f"the traceback is in {tmp_path / 'error.log'}" in capsys.readouterr().err


def test_bare_overrides_mean_what_set_means(workplace: Path) -> None:
    for arguments in (["--set", "seed=7"], ["seed=7"], ["training.seed=7", "--json"]):
        done = subprocess.run(
            [sys.executable, "-m", "dpoctl", "dpo", "recipe.yaml", *arguments],
            capture_output=True,
            text=True,
            check=True,
        )
        assert "RAN None/None omp None seed 7" in done.stderr
        assert json.loads(done.stdout) == {"trained": True}


def test_importing_a_task_prints_nothing_and_looks_for_no_garbage_among_the_libraries() -> None:
    script = (
        "import gc; from dpoctl.tasks import import_libraries; import_libraries(); import dpoctl.tasks.merge; "
        "import dpoctl.tasks.train; "
        "assert gc.isenabled() and gc.get_freeze_count() > 100_000, gc.get_freeze_count()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("command", [(), ("dpo",), ("check",), ("chat",)], ids=str)
def test_the_help_of_a_flag_names_no_value(command: tuple[str, ...]) -> None:
    out = CliRunner().invoke(app, [*command, "--help"]).output
    assert "<bool>" not in out
    assert "--help" in out

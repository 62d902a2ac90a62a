"""Machines that lack what every command needs: one line, and exit code 5."""

import sys
import tempfile
from pathlib import Path

import pytest

from dpoctl.cli.app import main
from dpoctl.data.cache import cannot_write

COMMANDS = [
    *(("sft", "r.yaml"), ("dpo", "r.yaml", "--num-processes", "2"), ("dpo", "r.yaml", "--dry-run")),
    *(("check", "r.yaml"), ("inspect", "r.yaml"), ("convert-data", "demo:reviewer2"), ("eval", "/"), ("chat", "/")),
    *(("merge", "/"), ("report", "/")),
]


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["dpoctl", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.fixture
def without_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()


@pytest.fixture
def without_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_get_default_tempdir", fail)
    monkeypatch.setenv("TMPDIR", "/nowhere")


@pytest.mark.usefixtures("without_folder")
@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_working_directory_that_is_gone_is_one_line(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, *arguments) == 5
    expected = "error: the folder in which dpoctl was called has been deleted; change to another one with cd\n"
    assert capsys.readouterr() == ("", expected)
    assert call(monkeypatch, arguments[0], "--help") == 0


@pytest.mark.usefixtures("without_temporary_folder")
@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_no_folder_for_temporary_files_is_one_line(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, *arguments) == 5
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: there is no folder for temporary files: ")
    assert "TMPDIR is /nowhere; set TMPDIR to a folder" in err
    assert err.count("\n") == 1
    assert call(monkeypatch, "--version") == 0


@pytest.mark.parametrize("arguments", [("convert-data", "-"), ("convert-data", "-", "--detect")], ids=" ".join)
def test_a_stdin_that_is_closed_is_one_line_where_it_is_read(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert call(monkeypatch, *arguments) == 5
    said = "error: stdin is closed, and there is something to read from it; give it a file or a pipe\n"
    assert capsys.readouterr() == ("", said)
    assert call(monkeypatch, "convert-data", "demo:reviewer2", "--detect") == 0


def test_a_cache_folder_that_cannot_be_looked_into_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "exists", refuse)
    said = cannot_write(Path("/root/cache"), PermissionError(13, "Permission denied"))
    assert str(said) == (
        "the cache folder /root/cache cannot be written: Permission denied; set DPOCTL_CACHE to another folder"
    )

"""Every command with standard streams that are closed, full or cut, and with hostile names and rows on a terminal."""

import json
import os
import re
import select
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
import yaml
from tiny_runs import pair_rows, write_rows

from dpoctl import console

HOSTILE = "\x1b[2J\x9b31m\u202eEVIL\u2066\u200f\x07"
RAW = re.compile("[\0-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]|\x1b\\[2J")
COMMANDS = {
    "sft": ["sft", "{sft}", "--output-dir", "{new}", "--json"],
    "dpo": ["dpo", "{dpo}", "--output-dir", "{new}"],
    "dpo, 2 processes": ["dpo", "{dpo}", "--output-dir", "{new}", "--num-processes", "2"],
    "dry run": ["dpo", "{dpo}", "--dry-run", "--verbose"],
    "check": ["check", "{dpo}"],
    "inspect": ["inspect", "{dpo}"],
    "convert-data": ["convert-data", "{rows}"],
    "convert-data -o": ["convert-data", "{rows}", "-o", "{new}.jsonl"],
    "detect": ["convert-data", "{rows}", "--detect"],
    "eval": ["eval", "{run}"],
    "eval --json": ["eval", "{run}", "--json"],
    "chat": ["chat", "{run}", "--prompt", f"hello {HOSTILE}", "--max-new-tokens", "4"],
    "merge": ["merge", "{run}", "-o", "{new}", "--json"],
    "report": ["report", "{run}"],
    "help": ["--help"],
    "wrong recipe": ["dpo", "{rows}"],
    "missing recipe": ["dpo", f"none{HOSTILE}.yaml"],
    "wrong option": ["eval", "{run}", f"--{HOSTILE}"],
    "missing data": ["convert-data", f"none{HOSTILE}.jsonl"],
}
SHORT_STATES = {"stdout closed", "all closed", "both full", "both cut"}
WRONG = {"wrong recipe": 2, "missing recipe": 2, "wrong option": 2, "missing data": 3}
SILENT = {"dpo", "dpo, 2 processes", "convert-data -o", "eval", *WRONG}
"""The commands that print nothing on stdout."""
TRAINS = {"sft", "dpo", "dpo, 2 processes"}
TOLD = {"stdout closed", "stdout full"}
"""The states in which a command that prints on stdout says that it cannot."""
SHORT = {"dpo", "dry run", "chat", "report", "missing data"}


def opened(number: int, target: int) -> Callable[[], None]:
    """Put a file in place of stdout or stderr, as the shell would have."""

    def install() -> None:
        os.dup2(target, number)
        stream = os.fdopen(number, "w", encoding="utf-8", closefd=False)
        name = {1: "stdout", 2: "stderr"}[number]
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)

    return install


def closed(number: int) -> Callable[[], None]:
    def install() -> None:
        os.close(number)
        name = {1: "stdout", 2: "stderr"}[number]
        setattr(sys, name, None)
        setattr(sys, f"__{name}__", None)

    return install


def full(number: int) -> Callable[[], None]:
    return lambda: opened(number, os.open("/dev/full", os.O_WRONLY))()


def cut(number: int) -> Callable[[], None]:
    def install() -> None:
        reader, writer = os.pipe()
        os.close(reader)
        opened(number, writer)()

    return install


STATES: dict[str, list[Callable[[], None]]] = {
    "stdout closed": [closed(1)],
    "stdout full": [full(1)],
    "stdout cut": [cut(1)],
    "stderr closed": [closed(2)],
    "stderr full": [full(2)],
    "stderr cut": [cut(2)],
    "all closed": [lambda: os.close(0), closed(1), closed(2)],
    "both full": [full(1), full(2)],
    "both cut": [cut(1), cut(2)],
}


@pytest.fixture(scope="module")
def world(warm: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A finished LoRA run, recipes and rows, with names and contents that try to control a terminal."""
    folder = tmp_path_factory.mktemp("streams") / f"of{HOSTILE}"
    folder.mkdir()
    rows = pair_rows(8)
    for row in rows[:4]:
        for part in ("prompt", "chosen", "rejected"):
            row[part][-1]["content"] += f" {HOSTILE}"
    write_rows(folder / f"rows{HOSTILE}.jsonl", [{"prompt": 3, HOSTILE: HOSTILE}, *rows])
    recipe = yaml.safe_load((warm / "recipe.yaml").read_text())
    recipe["data"] |= {"train": [str(folder / f"rows{HOSTILE}.jsonl")]}
    recipe["eval"] = {"samples": {"num": 2, "max_new_tokens": 4}}
    recipe["training"] |= {"output_dir": str(folder / "run"), "max_steps": 2}
    places = {"rows": folder / f"rows{HOSTILE}.jsonl", "run": folder / "run"}
    for method in ("dpo", "sft"):
        places[method] = folder / f"{method}{HOSTILE}.yaml"
        places[method].write_text(yaml.safe_dump(recipe | {"method": method}))
    ended = forked.run("dpo", places["dpo"], files=folder / "said")
    assert ended.code == 0, ended.err
    return {name: str(path) for name, path in places.items()}


def start(command: str, world: dict[str, str], folder: Path, streams: list[Callable[[], object]]) -> forked.Child:
    arguments = [word.format(new=folder / f"new{HOSTILE}", **world) for word in COMMANDS[command]]

    def install() -> None:
        for stream in streams:
            stream()
        console.stderr.cache_clear()

    return forked.start(*arguments, files=folder / "said", faults=[install], env={"OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("command", COMMANDS)
def test_no_state_of_the_standard_streams_breaks_a_command(
    command: str, world: dict[str, str], tmp_path: Path, whole: bool, tally: Any
) -> None:
    if not whole and command not in SHORT:
        pytest.skip("part of the whole suite")
    table = {}
    for state, streams in STATES.items():
        if not whole and state not in SHORT_STATES:
            continue
        folder = tmp_path / state.replace(" ", "-")
        folder.mkdir()
        ended = start(command, world, folder, streams).wait()
        is_told = command not in SILENT and ("all" in state or "both full" in state or state in TOLD)
        lines = [line for line in ended.err.splitlines() if "error: " in line]
        right = ended.code == (5 if is_told else WRONG.get(command, 0)) and "Traceback" not in ended.err
        right = right and "OSError" not in ended.err and len(lines) == int(bool(ended.err) and ended.code != 0)
        if command in TRAINS:
            run = folder / f"new{HOSTILE}"
            right = right and json.loads((run / "run_status.json").read_text())["state"] == "finished"
            kept = run / "logs" / "console.log"
            right = right and ("step 2/2" in (kept.read_text() if kept.exists() else ended.err))
        table[state] = right or f"exit {ended.code}: {ended.err[-1500:]}"
    tally(f"streams of {command}", *(right is True for right in table.values()))
    assert table == dict.fromkeys(table, True)


@pytest.mark.parametrize("command", COMMANDS)
def test_no_name_and_no_row_controls_the_terminal(
    command: str, world: dict[str, str], tmp_path: Path, whole: bool, tally: Any
) -> None:
    if not whole and command not in SHORT:
        pytest.skip("part of the whole suite")
    leader, follower = os.openpty()
    child = start(command, world, tmp_path, [opened(1, follower), opened(2, follower)])
    os.close(follower)
    shown = b""
    while select.select([leader], [], [], 0.05)[0] or child.poll() is None:
        try:
            shown += os.read(leader, 1 << 16)
        except OSError:  # the last one has closed it
            break
    os.close(leader)
    assert child.wait().code == WRONG.get(command, 0), shown.decode(errors="replace")
    text = shown.decode(errors="surrogateescape").replace("\r\n", "\n")
    raw = [ascii(found[0]) for found in RAW.finditer(text)]
    tally("hostile names and rows on a terminal", not raw)
    assert raw == [], text
    assert "Traceback" not in text


@pytest.mark.parametrize("encoding", ["ISO-8859-1", "ascii"])
def test_rows_go_untouched_into_pipes_and_files(encoding: str, world: dict[str, str], tmp_path: Path) -> None:
    ended = forked.run(
        "convert-data", world["rows"], files=tmp_path / "said", env={"PYTHONIOENCODING": encoding, "LC_ALL": "C"}
    )
    assert ended.code == 0
    assert HOSTILE in json.loads(ended.out.splitlines()[0])["prompt"][0]["content"]
    assert HOSTILE not in ended.err

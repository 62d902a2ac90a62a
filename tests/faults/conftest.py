"""A tiny world for runs that things are done to, and the table of what they survived."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState
from fault_runs import Scene, base_recipe
from tiny_runs import pair_rows, write_recipe, write_rows
from tiny_world import save_llama
from transformers import PreTrainedTokenizerFast

Tally = Callable[..., None]
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.faults)


@pytest.fixture
def tally(record_property: Callable[[str, object], None]) -> Tally:
    """Count what a fault did: a line of the table."""

    def count(fault: str, *survived: bool) -> None:
        record_property("fault", [fault, len(survived), sum(survived)])

    return count


def pytest_terminal_summary(terminalreporter: Any) -> None:
    lines: dict[str, list[int]] = {}
    for report in [*terminalreporter.stats.get("passed", []), *terminalreporter.stats.get("failed", [])]:
        for name, value in report.user_properties:
            if name == "fault" and report.when == "call":
                times, survived = lines.setdefault(value[0], [0, 0])
                lines[value[0]] = [times + value[1], survived + value[2]]
    if not lines:
        return
    lines["all"] = [sum(column) for column in zip(*lines.values(), strict=True)]
    width = max(map(len, lines))
    terminalreporter.section("faults")
    terminalreporter.write_line(f"{'fault':{width}}  times  survived  lost")
    for name, (times, survived) in lines.items():
        terminalreporter.write_line(f"{name:{width}}  {times:5}  {survived:8}  {times - survived:4}")


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Files of the tiny world; and a process that has trained once, so that its forks import nothing."""
    from dpoctl.cli.app import main

    folder = tmp_path_factory.mktemp("warm")
    save_llama(folder / "tiny", tokenizer, hidden_size=32, intermediate_size=48, attention_dropout=0.1)
    write_rows(folder / "pairs.jsonl", pair_rows(23))
    write_rows(folder / "heldout.jsonl", pair_rows(5, seed=1))
    recipe = write_recipe(folder / "recipe.yaml", base_recipe(folder), {"lora": {"r": 2}})
    argv, before = sys.argv, os.environ.copy()
    os.environ["DPOCTL_CACHE"] = str(folder / "cache")
    sys.argv = ["dpoctl", "dpo", str(recipe)]
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        sys.argv = argv
        os.environ.clear()
        os.environ.update(before)
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
    assert ended.value.code == 0
    return folder


@pytest.fixture
def scene(warm: Path, tmp_path: Path) -> Scene:
    """The base recipe, and this test's folder."""
    return Scene(tmp_path, base_recipe(warm))

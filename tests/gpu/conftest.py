"""Checks that need a CUDA device; `--rehearse` plays them on a CPU at toy shape."""

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gpu_stage import Stage
from transformers import PreTrainedTokenizerFast


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rehearse", action="store_true", help="play the GPU checks on a CPU at toy shape")


@pytest.fixture(scope="session")
def stage(request: pytest.FixtureRequest) -> Stage:
    """The GPU, or a CPU where the checks are rehearsed."""
    if request.config.getoption("--rehearse", default=False):
        return Stage(torch.device("cpu"), rehearsal=True)
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; --rehearse plays the check on a CPU")
    return Stage(torch.device("cuda"), rehearsal=False)


@pytest.fixture(autouse=True)
def _free_memory(stage: Stage) -> Iterator[None]:
    """Each check begins with an empty device, and its own peak."""
    if not stage.rehearsal:
        torch.cuda.reset_peak_memory_stats()
    yield
    gc.collect()
    if not stage.rehearsal:
        torch.cuda.empty_cache()


def save(stage: Stage, shape: str, folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    stage.build(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    gc.collect()
    return folder


@pytest.fixture(scope="session")
def folder_small(stage: Stage, tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A model of 150 million parameters on the disk, with a tokenizer."""
    return save(stage, "small", tmp_path_factory.mktemp("models") / "small", tokenizer)


@pytest.fixture(scope="session")
def folder_1b(stage: Stage, tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A model of a billion parameters on the disk, with a tokenizer."""
    return save(stage, "1b", tmp_path_factory.mktemp("models") / "1b", tokenizer)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Say at once why a check failed: the machine may be taken back before the end."""
    if report.failed and not hasattr(report, "node"):
        where = report.nodeid.rpartition("/")[2]
        text = str(report.longrepr).splitlines()
        told = [line for line in text if line.startswith("E ")] or text[-1:]
        sys.__stderr__.write(f"\n{where}: " + "\n".join(told[:6]) + "\n")  # type: ignore[union-attr]

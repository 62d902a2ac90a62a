"""The environment of a run for `env.json`: machine, versions and command line, without secrets."""

import platform
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dpoctl.redact import redact_command

PACKAGES = (
    *("dpoctl", "torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors"),
    *("bitsandbytes", "deepspeed", "flash-attn", "numpy", "pydantic"),
)


def describe_environment(*, world_size: int = 1) -> dict[str, Any]:
    """Return versions, machine and command line, ready for JSON.

    Args:
        world_size: Number of processes of the run.
    """
    return {
        "packages": {name: found for name in PACKAGES if (found := installed_version(name))},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_threads": torch.get_num_threads(),
        "devices": _devices(),
        "cuda": torch.version.cuda,
        "world_size": world_size,
        "git_sha": _git_sha(),
        "command": redact_command(sys.argv),
    }


@cache
def installed_version(package: str) -> str | None:
    """Return the version of an installed package, without importing it; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> list[str]:
    if torch.cuda.is_available():
        return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return [platform.processor() or platform.machine()]


def _git_sha() -> str | None:
    """Return the commit of dpoctl's own checkout; None if it was installed as a package."""
    home = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(home), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.split("\n")
    except (OSError, subprocess.SubprocessError):
        return None
    # A package in a virtual environment inside another repository must not report that repository's commit.
    return answer[1] if Path(answer[0]) == home else None

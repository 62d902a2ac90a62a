"""Scenes of messages: what a machine does to a run, with its disks, its signals and its kills."""

import contextlib
import io
import json
import os
import platform
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from message_shell import Shell
from safetensors.torch import load_file, save_file

from dpoctl.errors import StoppedError
from dpoctl.runs.signals import StopRequest, terminable

CACHE = r".*(damaged|cache folder|error: )"


def cache_errors(shell: Shell) -> None:
    shell.run("dpo", shell.recipe({"training.output_dir": "runs/first"}), only=CACHE)
    for file in (next(Path("cache/tokens").glob("*/ids.bin")), next(Path("cache/reference").glob("*.npy"))):
        file.write_bytes(bytes(reversed(file.read_bytes())))
    shell.run("dpo", shell.recipe({"training.output_dir": "runs/next"}), title="two damaged files", only=CACHE)
    Path("file").touch()
    shell.patch.setenv("DPOCTL_CACHE", "file")
    shell.run("inspect", "recipe.yaml", title="a file in place of the cache folder", only=CACHE)
    shell.patch.setenv("DPOCTL_CACHE", "full")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpoctl.data.store.StoreWriter.add", broken(OSError(28, "No space left on device")))
        shell.run("dpo", "recipe.yaml", "--dry-run", title="a full cache folder", only=CACHE)
        patch.setattr("dpoctl.data.cache._made", broken(OSError(30, "Read-only file system")))
        shell.run("inspect", "recipe.yaml", title="a read-only cache folder", only=CACHE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpoctl.tasks.reference_cache.write_atomically", broken(OSError(28, "No space left on device")))
        recipe = shell.recipe({"training.output_dir": "runs/unkept"})
        shell.run("dpo", recipe, title="numbers that cannot be kept", only=CACHE)


def signal_answers(shell: Shell) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        shell.add(f"# {number.name}, twice", "", said_to_two_signals(number))


def unfinished_runs(shell: Shell) -> None:
    for name, about in {
        "runs/stopped": {"state": "stopped", "message": str(StoppedError(2, 3))},
        "runs/failed": {"state": "failed", "message": "out of memory"},
        "runs/died": {"state": "running", "pid": 2**22 + 1, "host": platform.node()},
    }.items():
        shutil.copytree("runs/dpo", name)
        Path(name, "config.json").unlink()
        Path(name, "run_status.json").write_text(json.dumps({"message": None, **about}))
        shell.run("eval", name)


def changed_inputs(shell: Shell) -> None:
    from dpoctl.tasks import resume

    recipe = shell.recipe({"training.save_steps": 2, "training.save_total_limit": None})
    only = ".*(error: |other weights|changed since|resumed)"
    shell.run("dpo", recipe, "--overwrite", only=only)
    for left in (*Path("runs/dpo").glob("*.safetensors"), *Path("runs/dpo/checkpoints/step-000003").glob("*")):
        left.unlink()
    Path("runs/dpo/checkpoints/step-000003").rmdir()
    machine = resume._machine
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "_machine", lambda setup: machine(setup) | {"processes": 2, "device": "cuda (bfloat16)"})
        patch.setattr(resume, "_needs_start", lambda *_: False)
        change_a_weight(Path("model"))
        shell.run("dpo", recipe, "--resume", title="another machine, and weights that are not used any more", only=only)
    shutil.rmtree("runs/dpo/checkpoints/step-000003")
    change_a_weight(Path("model"))
    shell.run("dpo", recipe, "--resume", title="another model", only=only)
    shell.run("dpo", recipe, "--resume", "--allow-changed", "model", title="another model", only=only)


def model_files(shell: Shell) -> None:
    only = ".*error: "
    damage = Path("runs/dpo/model.safetensors")
    damage.write_bytes(damage.read_bytes()[:-1] + b"x")
    shell.run("eval", "runs/dpo", title="a byte of an exported model", only=only)
    config = Path("model/config.json")
    right = config.read_text()
    for title, values in {
        "a layer less": {"num_hidden_layers": 1},
        "a layer more": {"num_hidden_layers": 3},
        "another width": {"intermediate_size": 97},
        "a setting that is no number": {"rms_norm_eps": "small"},
    }.items():
        config.write_text(json.dumps(json.loads(right) | values))
        shell.run("dpo", shell.recipe({"training.output_dir": "runs/new"}), title=title, only=only)
    config.write_text(right)
    weights = Path("model/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-9])
    shell.run("dpo", "recipe.yaml", title="a file that is cut", only=only)
    settings = Path("model/tokenizer_config.json")
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_max_length": "long"}))
    shell.run("dpo", "recipe.yaml", title="a tokenizer", only=only)
    Path("runs/lora/recipe.resolved.yaml").write_text("method: dpo\n")
    shell.run("chat", "runs/lora", title="a damaged run", only=only)
    shell.run("dpo", shell.recipe({"model.dtype": "float16"}), "--overwrite", title="on a CPU", only=only)


def change_a_weight(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def broken(error: OSError) -> Callable[..., None]:
    """A function that fails."""

    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    return fail


def said_to_two_signals(signum: int) -> str:
    """The answers to two signals in the training loop."""
    err, ended = io.StringIO(), contextlib.suppress(StoppedError)
    with contextlib.redirect_stderr(err), ended, terminable(), StopRequest():
        for _ in range(2):
            os.kill(os.getpid(), signum)
            time.sleep(0.5)
    return err.getvalue()


MACHINE_SCENES = (cache_errors, changed_inputs, model_files, signal_answers, unfinished_runs)

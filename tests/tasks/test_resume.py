"""Kill a run at any step: the same command with --resume ends with the same bits."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from forked import Ended, fork
from tiny_runs import command, metrics_of, write_recipe
from transformers import AutoModelForCausalLM

from dpoctl.errors import StoppedError, UsageError
from dpoctl.tasks import merge

Run = Callable[..., dict[str, Any]]
FULL = {"model.disable_dropout": False, "training.num_train_epochs": 2, "training.save_steps": 2}
LORA = FULL | {"lora": {"r": 4, "lora_dropout": 0.2}}
REMEMBERING = FULL | {"dpo.loss": {"type": "beta_dpo", "filter_ratio": 0.4}, "training.max_tokens_per_device": 100}
KINDS = {"full": FULL, "lora": LORA, "remembering": REMEMBERING}
FOUR_BITS = {"quantization.load_in_4bit": True, "model.dtype": "float32"}
NUMERICS: dict[str, dict[str, Any]] = {
    "muon": {
        "training.optim": "muon",
        "training.lr_scheduler_type": "warmup_stable_decay",
        "training.lr_scheduler_kwargs": {"num_decay_steps": 3},
    },
    "adafactor, some weights": {"training.optim": "adafactor", "training.trainable": ["layers.1", "norm"]},
    "pissa, moving reference": {
        "lora": {"r": 4, "init_lora_weights": "pissa"},
        "dpo.reference.sync_steps": 2,
        "training.lr_scheduler_type": "polynomial",
    },
    "noise": {"method": "sft", "sft.neftune_noise_alpha": 5.0, "training.max_tokens_per_device": 100},
    "lion, dora, lora+, 4 bits": FOUR_BITS
    | {"training.optim": "lion_8bit", "lora": {"r": 4, "use_dora": True, "loraplus_lr_ratio": 4.0}},
}
TIMINGS = {"time", "tokens_per_second"}


@pytest.fixture(autouse=True)
def _dropout(tiny_llama_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    model.config.attention_dropout = 0.2
    model.save_pretrained(tiny_llama_folder)


def outcome(run: Path) -> tuple[bytes, list[dict[str, Any]]]:
    """Weights to the bit, and all metrics that are not timings."""
    (weights,) = (run / name for name in ("model.safetensors", "adapter_model.safetensors") if (run / name).exists())
    rows = [{k: v for k, v in row.items() if k not in TIMINGS} for row in metrics_of(run)]
    return weights.read_bytes(), rows


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_resumes_to_the_same_bits(kind: str, dpo_recipe: dict[str, Any], train: Run) -> None:
    whole = train(dpo_recipe, KINDS[kind])["training"]["output_dir"]
    expected = outcome(Path(whole))
    for kill_at in (1, 5, 9):
        killed = KINDS[kind] | {"training.output_dir": f"{whole}-killed-{kill_at}"}
        assert kill_in_fork(kill_at, partial(train, dpo_recipe, killed)) == signal.SIGKILL
        train(dpo_recipe, killed, resume=True)
        weights, rows = outcome(Path(f"{whole}-killed-{kill_at}"))
        assert weights == expected[0]
        assert rows == expected[1]


@pytest.mark.long("adafactor, some weights", "noise")
@pytest.mark.parametrize("kind", NUMERICS)
def test_all_optimizers_and_adapters_resume_to_the_same_bits(kind: str, dpo_recipe: dict[str, Any], train: Run) -> None:
    changes = NUMERICS[kind] | {"training.save_steps": 2, "training.warmup_steps": 1, "training.eval_steps": 2}
    recipe = dpo_recipe | {"method": changes.get("method", "dpo")}
    whole = Path(train(recipe, changes)["training"]["output_dir"])
    killed = Path(f"{whole}-killed")
    changes |= {"training.output_dir": str(killed)}
    assert kill_in_fork(3, partial(train, recipe, changes)) == signal.SIGKILL
    train(recipe, changes, resume=True)
    assert outcome(killed) == outcome(whole)
    if "lora" in changes:
        # It compares the merged model with base + adapter.
        merge.run(whole)
        assert (whole / "merged" / "model.safetensors").exists()


def kill_in_fork(kill_at: int, work: Callable[[], object]) -> int:
    """Train in a child process that is killed after a step, and return its exit status."""
    from dpoctl.tasks.recorder import Recorder

    def suicide() -> None:
        advance = Recorder.advance

        def kill(self: Recorder, step: int) -> None:
            advance(self, step)
            if step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        Recorder.advance = kill  # type: ignore[method-assign]
        work()

    return os.waitpid(fork(suicide), 0)[1]


def test_a_signal_stops_after_a_checkpoint_and_resumes_to_the_same_bits(dpo_recipe: dict[str, Any], train: Run) -> None:
    from dpoctl.tasks.recorder import Recorder

    changes = FULL | {"training.save_steps": None}
    whole = train(dpo_recipe, changes)["training"]["output_dir"]
    stopped = changes | {"training.output_dir": whole + "-stopped"}
    advance = Recorder.advance

    def interrupt(self: Recorder, step: int) -> None:
        advance(self, step)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    Recorder.advance = interrupt  # type: ignore[method-assign]
    try:
        with pytest.raises(StoppedError) as stop:
            train(dpo_recipe, stopped)
    finally:
        Recorder.advance = advance  # type: ignore[method-assign]
    assert stop.value.exit_code == 143
    assert not (Path(whole + "-stopped") / "model.safetensors").exists()
    train(dpo_recipe, stopped, resume=True)
    assert outcome(Path(whole + "-stopped")) == outcome(Path(whole))


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_killed_resume_to_the_same_bits(
    kind: str, dpo_recipe: dict[str, Any], tmp_path: Path, whole: bool, in_fork: Callable[..., Ended]
) -> None:
    """Real processes; faults/test_kill_storm.py does the same to forks with all kinds."""
    if not whole and kind != "remembering":
        pytest.skip("part of the whole suite")
    changes = KINDS[kind] | {"training.num_train_epochs": 6}
    recipe = write_recipe(tmp_path / "recipe.yaml", dpo_recipe, changes)
    options = ("--num-processes", "2", "--output-dir")
    in_fork("dpo", recipe, *options, tmp_path / "whole")

    arguments = ("dpo", recipe, *options, tmp_path / "killed")
    child = subprocess.Popen(command(*arguments), stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / "checkpoints" / "step-000006").exists():
        assert child.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    kill_orphans(tmp_path / "killed")
    assert not list((tmp_path / "killed").glob("*.safetensors")), "the run ended before it could be killed"
    in_fork(*arguments, "--resume")
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


def kill_orphans(run: Path) -> None:
    """Workers live in sessions of their own: kill every process that names this run."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if str(run) in (entry / "cmdline").read_text():
                    os.kill(int(entry.name), signal.SIGKILL)
            except OSError:
                continue


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"training.global_batch_size": 4}, r"global_batch_size \(5 -> 4\)"),
        ({"training.seed": 9, "dpo.loss.beta": 0.5}, r"dpo.loss.beta .*training.seed"),
        ({"data.max_length": 100}, "data.max_length"),
    ],
)
def test_a_run_never_goes_on_with_another_recipe(
    changes: dict[str, Any], named: str, dpo_recipe: dict[str, Any], train: Run
) -> None:
    run = Path(train(dpo_recipe, {"training.save_steps": 2})["training"]["output_dir"])
    before = (run / "recipe.resolved.yaml").read_text()
    with pytest.raises(UsageError, match=named):
        train(dpo_recipe, {"training.save_steps": 2} | changes, resume=True)
    assert (run / "recipe.resolved.yaml").read_text() == before
    train(dpo_recipe, {"training.save_steps": 3, "training.logging_steps": 2}, resume=True)


def test_a_run_goes_on_from_the_recipe_that_it_wrote(dpo_recipe: dict[str, Any], train: Run) -> None:
    run = Path(train(dpo_recipe, {"training.save_steps": 2})["training"]["output_dir"])
    resolved = yaml.safe_load((run / "recipe.resolved.yaml").read_text())
    assert [source["format"] for source in resolved["data"]["train"]] == ["trl-explicit"]
    train(resolved, {}, resume=True)
    train(dpo_recipe, {"training.save_steps": 2}, resume=True)
    assert yaml.safe_load((run / "recipe.resolved.yaml").read_text()) == resolved


def test_a_run_never_goes_on_with_other_data(dpo_recipe: dict[str, Any], pairs: Path, train: Run) -> None:
    train(dpo_recipe, {"training.save_steps": 2})
    pairs.write_text("\n".join(pairs.read_text().splitlines()[1:]))
    with pytest.raises(UsageError, match=r"changed since the run started: data \(other rows\)"):
        train(dpo_recipe, {"training.save_steps": 2}, resume=True)

"""Everything that the program prints, by command and by kind of error, compared with the files in tests/messages.

`pytest --update-messages` rewrites the files: then read their diff.
"""

import contextlib
import io
import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from message_data_scenes import DATA_SCENES
from message_machine_scenes import MACHINE_SCENES
from message_shell import ENDS, RECIPE, PageText, Shell
from tiny_runs import merge, pair_rows, write_rows
from tiny_world import save_llama
from transformers import PreTrainedTokenizerFast

from dpoctl.cli import failure, launch
from dpoctl.cli.app import app
from dpoctl.errors import LostRanksError, RunError, StoppedError, UserError

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the files are those of a machine without a GPU")
FOLDER = Path(__file__).parents[1] / "messages"
LORA: dict[str, Any] = {"training": {"output_dir": "runs/lora"}, "lora": {"r": 4, "lora_alpha": 8}}
SCENES: dict[str, Callable[["Shell"], None]] = {fill.__name__: fill for fill in (*DATA_SCENES, *MACHINE_SCENES)}


def scene(fill: Callable[["Shell"], None]) -> Callable[["Shell"], None]:
    """Register a function that fills the file of its name."""
    SCENES[fill.__name__] = fill
    return fill


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with a model, data, two finished runs, and what they printed."""
    folder = tmp_path_factory.mktemp("messages")
    save_llama(folder / "model", tokenizer)
    write_rows(folder / "pairs.jsonl", pair_rows(20))
    write_rows(folder / "heldout.jsonl", pair_rows(5, seed=1))
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setenv("DPOCTL_CACHE", str(folder / "cache"))
        shell = Shell(patch)
        samples = {"eval": {"samples": {"num": 1, "max_new_tokens": 4}}}
        shell.run("dpo", shell.recipe(merge(LORA, samples), "lora.yaml"))
        shell.run("dpo", shell.recipe(), "--json")
        (folder / "train.txt").write_text(shell.text)
    return folder


@pytest.fixture
def world(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, as the current one."""
    folder = tmp_path / "world"
    shutil.copytree(finished, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DPOCTL_CACHE", str(folder / "cache"))
    return folder


@scene
def help(shell: Shell) -> None:
    shell.patch.setenv("COLUMNS", "100")
    for command in ("", *(str(command.name) for command in app.registered_commands)):
        shell.run(*filter(None, [command]), "--help")


@scene
def train(shell: Shell) -> None:
    shell.text = Path("train.txt").read_text()
    shell.run("dpo", "recipe.yaml", "--resume", title="a finished run", only=ENDS)


@scene
def dry_run(shell: Shell) -> None:
    recipe = shell.recipe({"data.max_length": 60})
    shell.run("dpo", recipe, "--dry-run")
    shell.run("dpo", recipe, "--dry-run", "--json", only=ENDS)


@scene
def plan(shell: Shell) -> None:
    shell.run("plan", shell.recipe(), "--gpu", "rtx4090")
    shell.run("plan", "recipe.yaml", "--gpu", "a100-40gb", "--compare", "full,lora", "--gpus", "1,8", only=".*  ")
    shell.run("plan", "recipe.yaml", "--gpu", "h1000", only=ENDS)
    shell.run("plan", "recipe.yaml", "--gpus", "1,two", only=ENDS)
    shell.run("plan", "recipe.yaml", "--gpu", "l4", "--measure", only=ENDS)


@scene
def check(shell: Shell) -> None:
    shell.run("check", shell.recipe(), only="recipe.yaml")
    shell.run("check", "recipe.yaml", "--no-data")
    shell.run("check", "recipe.yaml", "learning_rate=1e-6", "global_batch_size=4", "--no-data", title="nothing found")
    shell.run("check", shell.recipe({"model.model_name_or_path": "nobody/nothing"}), "--json")
    shell.run("check", "recipe.yaml", "max_prompt_length=512")


@scene
def inspect(shell: Shell) -> None:
    shell.run("inspect", shell.recipe({"data.max_length": 60}), "-n", "1", only=ENDS)
    shell.run("inspect", "recipe.yaml", "--row", "1", "--ids", "--json", "--set", "data.overlong=truncate", only=ENDS)
    shell.run("inspect", "recipe.yaml", "--row", "21", only=ENDS)


@scene
def evaluate(shell: Shell) -> None:
    shell.run("eval", "runs/lora")
    shell.run("eval", "runs/lora", "--data", "pairs.jsonl", "--limit", "2", "--json", only=ENDS)
    shell.run("eval", "nowhere")
    shell.run("eval", "model")
    resolved = Path("runs/lora/recipe.resolved.yaml")
    gates = "gates: [{metric: loss, max: 100}, {metric: judge.win_rate, min: 0.5, by: lower}]"
    resolved.write_text(resolved.read_text().replace("gates: []", gates))
    shell.run("eval", "runs/lora", title="gates", only="gate ")


@scene
def compare(shell: Shell) -> None:
    shell.run("compare", "runs/lora")
    shell.run("compare", "runs/lora", "nowhere")
    shell.run("compare", "runs/lora", "runs/dpo")
    shell.run("eval", "runs/lora", title="measured", only="result: ")
    shell.run("eval", "runs/dpo", title="measured", only="result: ")
    shell.run("compare", "runs/lora", "runs/dpo", "--markdown", "no/comment.md")
    # Neither every key of a section nor every number of a result.
    some = r"(runs/|verdict|[a-z]+$|results|difference| (metric|key|loss|rewards/\w+|lora\.r) )"
    shell.run("compare", "runs/lora", "runs/dpo", "--markdown", "comment.md", only=some)
    text = Path("comment.md").read_text().splitlines()
    shell.add("comment.md", "\n".join(line for line in text if not re.match(r"\| (lora|eval|samples|kl)\b", line)))


@scene
def merge_run(shell: Shell) -> None:
    shell.run("merge", "runs/lora", "-o", "merged")
    shell.run("merge", "runs/lora", "-o", "merged", title="again")
    shell.run("merge", "runs/dpo")
    shell.run("merge", "runs/lora", "--dtype", "int8")


@scene
def chat(shell: Shell) -> None:
    shell.patch.setattr(sys, "stdin", io.StringIO("/reset\n" + "hello " * 600 + "\n"))
    shell.run("chat", "runs/lora", "--max-new-tokens", "4")
    shell.run("chat", "runs/lora", "--prompt", "hello " * 600)
    template = Path("runs/lora/chat_template.jinja")
    template.rename("template")
    shell.patch.setattr(sys, "stdin", io.StringIO(""))
    shell.run("chat", "runs/lora")
    shell.run("chat", "runs/lora", "--system", "be kind")
    Path("template").rename(template)


@scene
def report(shell: Shell) -> None:
    shell.run("report", "runs/lora")
    shell.run("report", "runs/lora", "-o", "nowhere/report.html")
    shell.run("report", "model")
    page = PageText()
    page.feed(Path("runs/lora/report.html").read_text())
    lines = page.lines[: page.lines.index("Environment", page.lines.index("Recipe") + 3)]
    shell.add("# the text of the page", "\n".join(lines))


@scene
def health(shell: Shell) -> None:
    from dpoctl.runs.health import Expectation, Health

    def row(step: int, **metrics: Any) -> dict[str, Any]:
        return {"step": step, "loss": 0.5, "grad_norm": 1.0} | metrics

    ln2 = math.log(2)
    expected = Expectation(100, warmup_steps=10, at_init=ln2, rows_per_step=64)
    still = [row(step, loss=ln2) for step in (30, 40, 50)]
    sick: dict[str, list[dict[str, Any]]] = {
        "a metric that is not finite": [row(3, loss=math.nan)],
        "a wrong first loss": [{"step": 0, "eval_loss": 0.75}],
        "a loss that does not move": still,
        "a gradient of zero": [one | {"grad_norm": 0.0} for one in still],
        "chosen answers fall": [{"step": step, "eval_logps/chosen": -120.0 - step} for step in (0, 10, 20)],
        "a perfect accuracy": [row(step, **{"rewards/accuracies": 1.0}) for step in (1, 2, 3)],
        "texts grow": [
            {"step": step, "eval_samples/median_length": 20.0 + step, "eval_samples/median_length_se": 1.0}
            for step in (0, 15)
        ],
    }
    for title, rows in sick.items():
        health = Health(expected)
        symptoms = [symptom for one in rows for symptom in health.watch(one)]
        shell.add(f"# {title}", "\n".join(f"{symptom}; {symptom.hint}" for symptom in symptoms))


@scene
def command_line(shell: Shell) -> None:
    shell.recipe()
    for arguments in (
        ("dop",),
        ("dpo",),
        ("dpo", "recipe.yaml", "--resum"),
        ("dpo", "recipe.yaml", "--num-processes", "0"),
        ("dpo", "recipe.yaml", "--resume", "--overwrite"),
        ("dpo", "recipe.yaml", "--accelerate-config", "fsdp"),
        ("dpo", "missing.yaml"),
        ("dpo", "recipes/gpt2-smoke.yaml"),
        ("recipes", "gpt2"),
        ("recipes", "copy", "gpt2-smoke", "recipe.yaml"),
        ("recipes", "copy", "gpt2-smoke", "new.yaml"),
        ("recipes", "copy"),
        ("recipes", "gpt2-smoke", "new.yaml"),
        ("init", "--model", "me/model", "-o", "first.yaml"),
        ("init", "--gpu", "abacus", "--model", "me/model", "--data", "pairs.jsonl", "-o", "first.yaml"),
        ("import", "gone.yaml"),
        ("recipes", "gpt2-smoke", "--key", "beta"),
        ("recipes", "--key", "eval_steps"),
        ("recipes", "--key", "eval_step"),
        ("sft", "recipe.yaml"),
        ("report",),
        ("report", "nowhere"),
    ):
        shell.run(*arguments)


SIMPLE = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"}
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "node7", "MASTER_PORT": "29500"}
LAUNCHED: dict[str, dict[str, str]] = {
    "srun": {"SLURM_STEP_NUM_TASKS": "4"},
    "srun torchrun": TORCHRUN | {"SLURM_STEP_NUM_TASKS": "2", "GROUP_WORLD_SIZE": "1"},
    "torchrun and --num-processes": TORCHRUN,
    "accelerate on several machines": SIMPLE | {"MASTER_ADDR": "node7"},
    "FSDP and training.sharding: none": {"ACCELERATE_USE_FSDP": "true"},
    "FSDP with an option that the recipe lacks": {"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"},
    "FSDP with an option that dpoctl lacks": {"FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP"},
    "DeepSpeed": {"ACCELERATE_USE_DEEPSPEED": "true"},
    "Megatron-LM": {"ACCELERATE_USE_MEGATRON_LM": "true"},
    "a parallelism config": {"PARALLELISM_CONFIG_TP_SIZE": "2"},
    "TPUs": {"PJRT_DEVICE": "TPU"},
    "fp8": {"ACCELERATE_MIXED_PRECISION": "fp8"},
    "another precision": {"ACCELERATE_MIXED_PRECISION": "fp16"},
    "gradient accumulation": {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
    "torch.compile": {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"},
    "a rank that is no number": TORCHRUN | {"RANK": "abc"},
    "a rank that is too large": TORCHRUN | {"RANK": "2"},
    "a port that is too large": TORCHRUN | {"MASTER_PORT": "70000"},
    "a rank alone": {"RANK": "0"},
    "no number of threads": {"OMP_NUM_THREADS": "abc"},
    "another parent": {"DPOCTL_PARENT": "x"},
}


@scene
def launchers(shell: Shell) -> None:
    shell.recipe()
    for title, environment in LAUNCHED.items():
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            options = ["--num-processes", "3"] if "num-processes" in title else []
            options += ["--set", "training.sharding=none"] if "sharding: none" in title else []
            shell.run("dpo", "recipe.yaml", *options, title=title)
    gpus: dict[str, Any] = {"distributed_type": "MULTI_GPU", "num_processes": 3}
    two = {"num_machines": 2, "main_process_ip": "node7", "main_process_port": 29500}
    for content in (
        gpus | {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2, "fsdp_offload_params": True}},
        gpus | two,
        gpus | {"num_machines": 3},
        gpus | {"distributed_type": "MULTI_CPU"},
        gpus | {"num_processes": "many"},
        ["a"],
    ):
        Path("config.yaml").write_text(json.dumps(content))
        shell.run("dpo", "recipe.yaml", "--accelerate-config", "config.yaml", title=json.dumps(content))
    shell.run("dpo", "recipe.yaml", "--accelerate-config", "multi_gpu")
    reports = Path("reports")
    reports.mkdir()
    for title, ended, killed in (
        ("a rank is killed", [(1, -9)], ()),
        ("a rank is aborted", [(1, -6)], ()),
        ("a rank does not respond", [(0, 1), (1, -9)], (1,)),
    ):
        (reports / "rank-0.json").unlink(missing_ok=True)
        if killed:
            hint = "see their error messages, then continue with --resume"
            silence = LostRanksError("rank 0 got no answer from the other ranks: Timed out", hint=hint)
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv(failure.REPORTS, str(reports))
                failure.report(silence, as_json=False, debug=False)
        err = io.StringIO()
        with contextlib.redirect_stderr(err):
            launch.report_job(ended, reports, as_json=False, killed=killed)
        shell.add(f"# {title}", "", err.getvalue())


@scene
def recipe_errors(shell: Shell) -> None:
    for changes in (
        {"lroa": {"r": 8}},
        {"training.warmup_ration": 0.1},
        {"training.learning_rate": "fast"},
        {"training.global_batch_size": 0},
        {"training.optim": "adamw_apex_fused"},
        {"training.optim": "muon", "lora": {"r": 4}},
        {"training.optim": "adafactor", "training.sharding": "full"},
        {"training.lr_scheduler_type": "greedy"},
        {"training.lr_scheduler_type": "constant", "training.warmup_ratio": 0.1},
        {"training.lr_scheduler_kwargs": {"num_cycle": 2}},
        {"training.lr_scheduler_type": "warmup_stable_decay"},
        {"training.packing": True, "training.gradient_accumulation_steps": 4},
        {"training.report_to": "mlflow"},
        {"dpo": {"loss": {"type": "sigmod"}}},
        {"dpo": {"loss": {"type": "ipo", "label_smoothing": 0.1}}},
        {"dpo": {"loss": {"beta": -1}}},
        {"dpo": {"loss": {"type": "beta_dpo", "base": "ipoo"}}},
        {"dpo": {"loss": {"type": "beta_dpo", "base": {"type": ["ipo"]}}}},
        {"dpo": {"loss": {"type": "beta_dpo", "beta": 0.5, "beta_max": 0.01}}},
        {"dpo": {"loss": {"type": "beta_dpo", "alpha": 0, "gap_scale": "reward"}}},
        {"dpo": {"loss": {"type": "beta_dpo", "parity": "original", "momentum": 0.5}}},
        {"data.train": []},
        {"data.train": ["$DATA/pairs.jsonl"]},
        {"data.train": [{"path": "pairs.jsonl", "format": "hhh"}]},
        {"data.max_prompt_length": 512},
        {"data.prompt_truncation": "keep_start"},
        {"sft": {"loss_on": "last"}},
        {"quantization": {"load_in_4bit": True}},
        {"model": {"dtype": "auto"}},
    ):
        shell.run("dpo", shell.recipe(changes), title=f"{changes}")
    shell.run("dpo", shell.recipe(), "--set", "beta")
    shell.run("dpo", "recipe.yaml", "--set", "bta=0.1")
    shell.run("dpo", "recipe.yaml", "--set", "max_length=[")
    shell.run("dpo", "recipe.yaml", "--set", "target_modules=q_proj,v_proj")
    shell.run("dpo", "recipe.yaml", "--set", "data.train[0].wieght=2")
    shell.run("dpo", "recipe.yaml", "--set", "hub_token=hf_AbCdEfGhIjKl")
    for title, text in {
        "nothing": "# nothing\n",
        "a list": "- 1\n",
        "an open bracket": "lora: {r: 8\n",
        "a tab": "method: dpo\nmodel:\n\tdtype: auto\n",
        "a TRL config": "model_name_or_path: gpt2\ndataset_name: x\nlearning_rate: 1e-6\nbeta: 0.1\n",
    }.items():
        Path("recipe.yaml").write_text(text)
        shell.run("dpo", "recipe.yaml", title=title)


@scene
def environment_errors(shell: Shell) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpoctl.runs.trackers.installed_version", lambda _: None)
        patch.setattr("dpoctl.tasks.upload.get_token", lambda: None)
        shell.run("dpo", shell.recipe({"training.report_to": ["wandb", "tensorboard"]}))
        shell.run("dpo", shell.recipe({"training.hub_model_id": "me/model"}))
    new = {"training.output_dir": "runs/elsewhere"}
    shell.run("dpo", shell.recipe(new | {"model.model_name_or_path": "nobody/nothing"}))
    shell.run("dpo", shell.recipe(new | {"model.model_name_or_path": "./missing"}), "--overwrite")
    shell.run("dpo", shell.recipe(new | {"data.train": ["nobody/data"]}), "--overwrite")
    shell.run("dpo", shell.recipe({"training.output_dir": "pairs.jsonl/run"}))


@scene
def run_directory_errors(shell: Shell) -> None:
    from dpoctl.runs.directory import RunDirectory

    shell.run("dpo", shell.recipe())
    shell.run("dpo", shell.recipe({"training.output_dir": "pairs.jsonl"}))
    (step,) = Path("runs/dpo/checkpoints").glob("step-*")
    shell.run("dpo", shell.recipe({"model.model_name_or_path": str(step)}))
    shell.run("eval", str(step))
    Path("other").mkdir()
    Path("other/notes.txt").touch()
    shell.run("dpo", shell.recipe({"training.output_dir": "other"}), "--overwrite")
    shell.run("dpo", shell.recipe({"training.seed": 2, "dpo": {"loss": {"beta": 0.2}}}), "--resume")
    write_rows(Path("others.jsonl"), pair_rows(20, seed=2))
    Path("pairs.jsonl").rename("kept.jsonl")
    Path("others.jsonl").rename("pairs.jsonl")
    shell.run("dpo", shell.recipe(), "--resume", title="other rows in the same file", only=ENDS)
    Path("kept.jsonl").rename("pairs.jsonl")
    with RunDirectory.open("runs/dpo", resume=True):
        shell.run("dpo", shell.recipe(), "--resume", title="another process has the lock")
    Path("runs/dpo/notes.txt").touch()
    shell.run("dpo", shell.recipe(), "--overwrite", title="files of others", only=ENDS)
    (step,) = Path("runs/dpo/checkpoints").glob("step-*")
    (step / "state.json").write_text("{}")
    shell.run("dpo", shell.recipe(), "--resume", title="a damaged checkpoint", only=ENDS)
    Path("runs/dpo/logs").symlink_to("../../other")
    shell.run("dpo", shell.recipe(), "--overwrite", title="a symbolic link")


@scene
def run_errors(shell: Shell) -> None:
    from dpoctl.core.objective import Objective
    from dpoctl.tasks.reference import Reference

    def attempt(title: str, changes: dict[str, Any], place: tuple[type, str], fault: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            original = getattr(*place)
            patch.setattr(*place, lambda *given, **options: fault(original, *given, **options))
            recipe = shell.recipe({"training.output_dir": "runs/failing", "data.eval": None} | changes)
            shell.run("dpo", recipe, "--overwrite", title=title, only=ENDS)

    def raising(error: Exception) -> Any:
        def fail(*_: Any, **__: Any) -> Any:
            raise error

        return fail

    def shifted(table: Any, *given: Any) -> Any:
        return {name: column - np.arange(len(column), dtype=np.float32) for name, column in table(*given).items()}

    def torn(backward: Any, *given: Any, **options: Any) -> Any:
        memory = backward(*given, **options)
        next(p for p in given[0].scorer.parameters() if p.grad is not None).grad.fill_(math.nan)
        return memory

    changes = {"training.eval_steps": None}
    attempt("a wrong reference", changes, (Reference, "table"), shifted)
    attempt("a gradient that is not finite", changes, (Objective, "backward"), torn)
    memory = torch.OutOfMemoryError("out of memory")
    attempt("out of memory", changes, (Objective, "backward"), raising(memory))
    automatic = changes | {"training.max_tokens_per_device": "auto"}
    attempt("out of memory, automatic budget", automatic, (Objective, "backward"), raising(memory))
    attempt("something unforeseen", changes, (Objective, "backward"), raising(ValueError("boom\nand more")))
    attempt("a full disk", changes, (Path, "mkdir"), _full_disk)
    shell.error(StoppedError(15, 3))
    shell.error(StoppedError(15))
    shell.error(StoppedError(15, in_step=True))
    shell.error(RunError("the loss is not finite", hint="lower training.learning_rate"))


def _full_disk(mkdir: Any, folder: Path, *given: Any, **options: Any) -> None:
    if folder.name.startswith(".tmp-step"):
        raise OSError(28, "No space left on device")
    mkdir(folder, *given, **options)


@scene
def extension_errors(shell: Shell) -> None:
    import dpoctl

    def attempt(title: str, **code: Any) -> None:
        recipe = merge(RECIPE, {"training.output_dir": "runs/code"})
        err = io.StringIO()
        with contextlib.redirect_stderr(err), pytest.raises(UserError) as refused:
            dpoctl.dpo(recipe, **code)
        shell.error(refused.value, title)

    attempt("resume and overwrite", resume=True, overwrite=True)
    attempt("a model of another kind", model_init=lambda: torch.nn.Linear(1, 1))
    attempt("an optimizer of another kind", overwrite=True, optimizer=lambda parameters: [])
    attempt("a metric twice", overwrite=True, extra_metrics=lambda scores, values: {"loss": None})


@pytest.mark.parametrize("name", SCENES)
def test_messages_are_those_in_the_file(
    name: str, world: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(failure, "_run_directory", None)
    shell = Shell(monkeypatch)
    SCENES[name](shell)
    file = FOLDER / f"{name}.txt"
    text = shell.text.replace(str(world), "FOLDER").strip() + "\n"
    if request.config.getoption("--update-messages"):
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8"), "if this is intended: pytest tests/cli --update-messages"


def test_there_is_no_file_without_a_scene() -> None:
    assert {file.stem for file in FOLDER.iterdir()} == set(SCENES)

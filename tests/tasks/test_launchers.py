"""Launchers that ask for what dpoctl does not do, or whose processes do not know of each other: refused by name."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import forked
import pytest
import yaml
from forked import Ended
from tiny_runs import pair_rows, write_recipe, write_rows

import dpoctl
from dpoctl.errors import SetupError, UsageError
from dpoctl.recipe import parse_recipe
from dpoctl.recipe.schema import Recipe
from dpoctl.tasks import ALLOCATOR, prepare_allocator, setup
from dpoctl.tasks.launchers import UNSUPPORTED, check_environment, refuse_unsupported, variables_of

RECIPE: dict[str, Any] = {
    "method": "dpo",
    "model": {"model_name_or_path": "./model"},
    "data": {"train": ["pairs.jsonl"]},
    "training": {"output_dir": "runs/dpo", "learning_rate": 1e-3},
}
# By what is asked for, a variable as accelerate sets it, and others that ask for the same; then the key for the job.
ASKED: dict[str, tuple[tuple[str, ...], str]] = {
    "DeepSpeed": (
        (
            "ACCELERATE_USE_DEEPSPEED=true",
            "ACCELERATE_DEEPSPEED_ZERO_STAGE=2",
            "ACCELERATE_DEEPSPEED_CONFIG_FILE=z.json",
        ),
        "training.sharding: full",
    ),
    "Megatron-LM": (("ACCELERATE_USE_MEGATRON_LM=true", "MEGATRON_LM_TP_DEGREE=2"), "training.sharding: full"),
    "a parallelism config": (
        ("ACCELERATE_USE_PARALLELISM_CONFIG=true", "PARALLELISM_CONFIG_TP_SIZE=2", "PARALLELISM_CONFIG_CP_SIZE=4"),
        "training.replicas",
    ),
    "TPUs": (("ACCELERATE_USE_XLA=true", "ACCELERATE_USE_TPU=yes", "PJRT_DEVICE=TPU"), "USE_TORCH_XLA=0"),
    "fp8": (("ACCELERATE_MIXED_PRECISION=fp8", "ACCELERATE_MIXED_PRECISION=FP8"), "model.dtype"),
    "gradient accumulation": (("ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4",), "training.global_batch_size"),
    "torch.compile": (
        ("ACCELERATE_DYNAMO_BACKEND=INDUCTOR", "ACCELERATE_DYNAMO_BACKEND=EAGER"),
        "training.torch_compile",
    ),
}
# What accelerate sets where nothing of it is asked for.
HARMLESS = (
    *("ACCELERATE_USE_FSDP=false", "ACCELERATE_USE_DEEPSPEED=0", "PARALLELISM_CONFIG_TP_SIZE=1", "PJRT_DEVICE=CUDA"),
    *("ACCELERATE_MIXED_PRECISION=no", "ACCELERATE_MIXED_PRECISION=bf16", "ACCELERATE_DYNAMO_BACKEND=NO"),
    *("ACCELERATE_GRADIENT_ACCUMULATION_STEPS=1", "ACCELERATE_USE_CPU=True", "ACCELERATE_CPU_AFFINITY=1"),
)
TORCHRUN = {
    **{"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1"},
    **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
}


def recipe() -> Recipe:
    return parse_recipe(yaml.safe_dump(RECIPE), "recipe.yaml", command="dpo")


def variables(*texts: str) -> dict[str, str]:
    return dict(text.split("=", 1) for text in texts)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe whose model does not exist: whoever looks for it is too late."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "pairs.jsonl", pair_rows(3))
    write_recipe(tmp_path / "recipe.yaml", RECIPE)
    return tmp_path


OBSERVER = """
import os, sys
import dpoctl.cli.app as app
try:
    app.main()
finally:
    print("torch" in sys.modules, os.environ.get("PYTORCH_ALLOC_CONF"))
"""


def observed(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command, and print whether it has imported torch, and how torch's allocator is configured."""
    command = [sys.executable, "-c", OBSERVER, *arguments]
    # A command that ran in this process has configured it.
    env = {name: value for name, value in os.environ.items() if name not in ALLOCATOR} | environment
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def refused(place: Path, environment: dict[str, str], *options: str) -> Ended:
    """Run the command, which must end in one line before it has written anything."""
    ended = forked.run("dpo", "recipe.yaml", *options, files=place / "said", env=environment)
    assert len(ended.err.splitlines()) == 1, ended.err
    assert re.match(r"(\[rank \d+\] )?error: ", ended.err)
    assert not (place / "runs").exists()
    assert not Path(os.environ["DPOCTL_CACHE"]).exists()
    return ended


@pytest.mark.parametrize(
    ("asked", "variable", "key"),
    [(asked, variable, key) for asked, (given, key) in ASKED.items() for variable in given],
)
def test_what_accelerate_does_and_dpoctl_does_not_is_refused_by_its_variable(
    asked: str, variable: str, key: str, place: Path
) -> None:
    ended = refused(place, variables(variable))
    assert ended.code == 2
    assert f"error: {variable} requests {asked}: " in ended.err
    hint = ended.err.partition("; ")[2]
    assert key in hint
    assert f"unset {variable.partition('=')[0]}, or remove" in hint or asked == "TPUs"


def test_every_row_of_the_table_is_tried_and_harmless_values_pass() -> None:
    tried = [variable.partition("=") for given, _ in ASKED.values() for variable in given]
    for row in UNSUPPORTED:
        assert any(re.fullmatch(row.asked, f"{name}={value.lower()}") for name, _, value in tried), row
    refuse_unsupported(variables(*HARMLESS))


def test_a_machine_with_torch_xla_trains_on_gpus_only_if_it_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpoctl.tasks.launchers.find_spec", lambda name: object())
    with pytest.raises(UsageError, match=r"USE_TORCH_XLA=true requests TPUs.*set USE_TORCH_XLA=0"):
        check_environment({})
    check_environment({"USE_TORCH_XLA": "0"})


@pytest.mark.parametrize(
    ("asked", "dtype", "hint"),
    [("bf16", "float32", "model.dtype: bfloat16"), ("fp16", "bfloat16", "model.dtype: float16")],
)
def test_another_precision_than_the_recipe_s_is_refused(asked: str, dtype: str, hint: str) -> None:
    variables = {"ACCELERATE_MIXED_PRECISION": asked}
    with pytest.raises(UsageError, match=f"requests {asked}, and the recipe computes in {dtype}; .*{hint}"):
        check_environment(variables, dtype)
    check_environment(variables, hint.rpartition(" ")[2])
    check_environment(variables, "auto")


def test_auto_is_the_precision_of_the_device_when_accelerate_asks_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(UsageError, match="requests bf16, and the recipe computes in float32"):
        setup.build_accelerator(recipe())


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "ZeRO-2": ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2}}, "DeepSpeed: "),
    "ZeRO-3": ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 3}}, "DeepSpeed: "),
    "Megatron": ({"distributed_type": "MEGATRON_LM"}, "Megatron-LM: "),
    "XLA": ({"distributed_type": "XLA"}, "TPUs: "),
    "TPU": ({"distributed_type": "TPU"}, "TPUs: "),
    "parallelism": ({"parallelism_config": {"parallelism_config_tp_size": 2}}, "a parallelism config: "),
    "fp8": ({"mixed_precision": "fp8"}, "fp8: "),
    "dynamo": ({"dynamo_config": {"dynamo_backend": "INDUCTOR"}}, "torch.compile: "),
    "dynamo, short": ({"dynamo_config": {"backend": "EAGER"}}, "torch.compile: "),
    "dynamo, old": ({"dynamo_backend": "INDUCTOR"}, "torch.compile: "),
}
GPUS: dict[str, Any] = {"distributed_type": "MULTI_GPU", "num_processes": 2, "mixed_precision": "no"}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_a_config_of_accelerate_asks_for_and_dpoctl_does_not_do_is_refused(name: str, place: Path) -> None:
    content, said = CONFIGS[name]
    write_recipe(place / "config.yaml", GPUS | content)
    ended = refused(place, {}, "--accelerate-config", "config.yaml")
    assert ended.code == 2
    assert f"error: --accelerate-config: config.yaml requests {said}" in ended.err
    assert ("request no TPU" if said == "TPUs: " else "; remove it from the file; ") in ended.err


def test_a_config_that_asks_for_nothing_of_that_is_accepted() -> None:
    for content in (GPUS, GPUS | {"mixed_precision": "bf16", "dynamo_config": {}, "parallelism_config": {}}):
        refuse_unsupported(variables_of(content))


TWO: dict[str, Any] = {"num_machines": 2, "main_process_ip": "10.0.0.7", "main_process_port": 29500}
WRONG_COUNTS: dict[str, tuple[dict[str, Any], str]] = {
    "no address": ({"num_machines": 2}, "2 machines need the same main_process_ip and main_process_port"),
    "port 0": (TWO | {"main_process_port": 0}, "2 machines need the same main_process_ip and main_process_port"),
    "not divisible": (TWO | {"num_processes": 3}, "3 processes cannot be divided among 2 machines"),
    "fewer than machines": (TWO | {"num_processes": 1}, "1 processes cannot be divided among 2 machines"),
    "MULTI_CPU": ({"distributed_type": "MULTI_CPU"}, "with distributed_type MULTI_CPU accelerate starts one process"),
    "NO": ({"distributed_type": "NO"}, "with distributed_type NO accelerate starts one process"),
    "two machines of CPUs": (
        TWO | {"distributed_type": "NO", "num_processes": 1},
        "with distributed_type NO accelerate",
    ),
    "words": ({"num_processes": "two"}, "num_processes is 'two', but must be a whole number"),
    "negative": ({"num_processes": -1}, "num_processes is -1, but must be a whole number"),
    "no machine": ({"num_machines": 0}, "num_machines is 0, but must be a whole number"),
    "null": ({"num_machines": None}, "num_machines is None, but must be a whole number"),
    "unknown key": ({"nonsense": 1}, "accelerate refuses config.yaml: "),
    "unknown type": ({"distributed_type": "multi_gpu"}, "accelerate refuses config.yaml: "),
    "one GPU": ({"gpu_ids": "0"}, "accelerate refuses config.yaml: "),
    "SageMaker": ({"compute_environment": "AMAZON_SAGEMAKER"}, "accelerate refuses config.yaml: "),
}


@pytest.mark.parametrize("name", WRONG_COUNTS)
def test_a_config_that_starts_other_processes_than_it_says_is_refused(name: str, place: Path) -> None:
    content, said = WRONG_COUNTS[name]
    write_recipe(place / "config.yaml", GPUS | content)
    ended = refused(place, {}, "--accelerate-config", "config.yaml")
    assert ended.code == 2
    assert f"error: --accelerate-config: {'config.yaml: ' if not said.startswith('acc') else ''}{said}" in ended.err


STARTED = {
    "srun": "SLURM_STEP_NUM_TASKS",
    "Open MPI": "OMPI_COMM_WORLD_SIZE",
    "MPICH": "PMI_SIZE",
    "MVAPICH": "MV2_COMM_WORLD_SIZE",
}


@pytest.mark.parametrize("variable", STARTED.values(), ids=STARTED)
def test_processes_of_mpirun_and_srun_that_would_each_run_alone_are_refused(variable: str, place: Path) -> None:
    ended = refused(place, {variable: "4"})
    assert ended.code == 2
    assert f"mpirun or srun started 4 processes ({variable}), and each would run separately" in ended.err
    assert refused(place, {variable: "4", "RANK": "0", "WORLD_SIZE": "1"}).code == 2


def test_launchers_started_by_srun_must_know_of_each_other() -> None:
    check_environment(TORCHRUN | {"SLURM_STEP_NUM_TASKS": "1"})
    check_environment(TORCHRUN | {"SLURM_STEP_NUM_TASKS": "2", "GROUP_WORLD_SIZE": "2"})
    with pytest.raises(
        UsageError, match=r"started 2 launchers, but this one was configured for 1.*torchrun --nnodes 2"
    ):
        check_environment(TORCHRUN | {"SLURM_STEP_NUM_TASKS": "2"})


def test_ranks_that_srun_numbers_itself_must_be_as_many_as_it_started() -> None:
    """As scripts do that set RANK=$SLURM_PROCID; a step of srun with several tasks that each are a world of one."""
    ranks = {name: value for name, value in TORCHRUN.items() if name != "GROUP_WORLD_SIZE"}
    check_environment(ranks | {"SLURM_STEP_NUM_TASKS": "2"})
    check_environment(ranks | {"PMI_SIZE": "2", "OMPI_COMM_WORLD_SIZE": "2"})
    with pytest.raises(UsageError, match=r"PMI_SIZE=4 says that mpirun or srun started 4 .* configured for 2"):
        check_environment(ranks | {"PMI_SIZE": "4"})
    alone = ranks | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    with pytest.raises(UsageError, match=r"SLURM_STEP_NUM_TASKS=2 says .* configured for 1: each would run separately"):
        check_environment(alone | {"SLURM_STEP_NUM_TASKS": "2"})
    # Ranks that one task of srun started.
    check_environment(ranks | {"SLURM_STEP_NUM_TASKS": "1", "PMI_SIZE": "1", "SLURM_NTASKS": "8"})


WRONG_RANKS: dict[str, tuple[dict[str, str], str]] = {
    "letters": ({"RANK": "abc"}, "RANK is 'abc', but must be a whole number, 0 or larger"),
    "negative": ({"LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1', but must be a whole number, 0 or larger"),
    "empty": (TORCHRUN | {"RANK": ""}, "RANK is '', but must be a whole number, 0 or larger"),
    "no size": (TORCHRUN | {"WORLD_SIZE": "0"}, "WORLD_SIZE is '0', but must be a whole number, 1 or larger"),
    "other digits": (
        TORCHRUN | {"LOCAL_WORLD_SIZE": "\u0662"},
        "LOCAL_WORLD_SIZE is '\u0662', but must be a whole number",
    ),
    "a fraction": (TORCHRUN | {"GROUP_WORLD_SIZE": "1.5"}, "GROUP_WORLD_SIZE is '1.5', but must be a whole number"),
    "port": (TORCHRUN | {"MASTER_PORT": "http"}, "MASTER_PORT is 'http', but must be a whole number, 1 or larger"),
    "large port": (TORCHRUN | {"MASTER_PORT": "70000"}, "MASTER_PORT is 70000, and the last port is 65535"),
    "size alone": ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 says that this process is one of several, and RANK is not set"),
    "rank alone": ({"RANK": "0"}, "RANK=0 says that this process is one of several, and WORLD_SIZE is not set"),
    "node alone": ({"NODE_RANK": "1"}, "NODE_RANK=1 says that this process is one of several, and RANK is not set"),
    "no address": ({k: v for k, v in TORCHRUN.items() if k != "MASTER_ADDR"}, "and MASTER_ADDR is not set"),
    "rank too large": (TORCHRUN | {"RANK": "2"}, "RANK is 2, but must be smaller than WORLD_SIZE (2)"),
    "local rank too large": (
        TORCHRUN | {"LOCAL_RANK": "5"},
        "LOCAL_RANK is 5, but must be smaller than LOCAL_WORLD_SIZE (2)",
    ),
}


@pytest.mark.parametrize("name", WRONG_RANKS)
def test_variables_that_number_the_processes_wrongly_are_refused(name: str, place: Path) -> None:
    environment, said = WRONG_RANKS[name]
    ended = refused(place, environment)
    assert ended.code == 5
    assert said in ended.err
    assert "start the processes with torchrun" in ended.err


def test_a_single_process_with_a_rank_is_no_other_s() -> None:
    check_environment({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500"})
    check_environment({"WORLD_SIZE": "1"})


@pytest.mark.parametrize("value", ["abc", "0", "-2", "4,3", "1e3"])
def test_a_number_of_threads_that_is_none_is_refused(value: str, place: Path) -> None:
    ended = refused(place, {"OMP_NUM_THREADS": value})
    assert ended.code == 5
    assert f"error: OMP_NUM_THREADS is '{value}', but must be a whole number, 1 or larger; set it to" in ended.err


def test_an_empty_number_of_threads_is_none_at_all(place: Path) -> None:
    assert "RANK is 'abc'" in refused(place, {"OMP_NUM_THREADS": "", "RANK": "abc"}).err


@pytest.mark.parametrize("value", ["x", "1", ""])
@pytest.mark.parametrize("command", ["dpo", "eval"])
def test_a_parent_that_is_not_the_parent_is_refused(value: str, command: str, place: Path) -> None:
    ended = forked.run(command, "recipe.yaml", files=place / "said", env={"DPOCTL_PARENT": value})
    assert ended.code == 5
    assert ended.err.startswith(f"error: DPOCTL_PARENT is '{value}', and process {os.getpid()} started this one: ")
    assert ended.err.endswith("; unset it\n")


def test_other_commands_with_ranks_refuse_the_same(place: Path) -> None:
    for environment, code in (({"RANK": "abc"}, 5), ({"SLURM_STEP_NUM_TASKS": "2"}, 2)):
        ended = forked.run("eval", place, files=place / "said", env=environment)
        assert ended.code == code
        assert len(ended.err.splitlines()) == 1


def test_the_python_functions_refuse_the_same(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, error in (("ACCELERATE_USE_DEEPSPEED=true", UsageError), ("RANK=abc", SetupError)):
        name, _, value = variable.partition("=")
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(error, match=f"^{name}"):
                dpoctl.dpo(RECIPE)
    assert not (place / "runs").exists()


def test_nothing_large_is_imported_before_a_launcher_is_refused(place: Path) -> None:
    done = observed("dpo", "recipe.yaml", ACCELERATE_USE_DEEPSPEED="true")
    assert (done.returncode, done.stdout.split()[0]) == (2, "False"), done.stderr


def test_ranks_that_accelerate_does_not_join_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Alone:
        num_processes = 1

    monkeypatch.setattr(setup, "Accelerator", lambda **options: Alone())
    for name, value in {**TORCHRUN, "ACCELERATE_USE_CPU": "true"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SetupError, match="2 processes were started, and accelerate joins 1 of them"):
        setup.build_accelerator(recipe())


@pytest.mark.parametrize(
    ("processes", "visible", "shown", "fine"),
    [(8, 4, None, False), (2, 1, None, False), (8, 8, None, True), (4, 2, "0,1", False), (4, 1, "3", True)],
)
def test_more_processes_than_gpus_are_refused(
    processes: int, visible: int, shown: str | None, fine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accelerate would give one GPU to two of them. A launcher may show each process its own GPU only."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    if fine:
        setup._check_gpus(processes, visible)
        return
    with pytest.raises(
        SetupError, match=f"{processes} processes were started on .*, and there each sees {visible} GPU"
    ):
        setup._check_gpus(processes, visible)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such segments")
def test_segments_of_the_cuda_allocator_are_expandable_unless_the_user_configured_it() -> None:
    environment: dict[str, str] = {}
    prepare_allocator(environment)
    assert environment == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    for name in ALLOCATOR:
        for value in ("max_split_size_mb:128", "expandable_segments:False", ""):
            chosen = {name: value}
            prepare_allocator(chosen)
            assert chosen == {name: value}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such segments")
def test_a_command_configures_the_allocator_before_torch_is_imported() -> None:
    done = observed("--version")
    assert done.stdout.splitlines()[-1] == "False expandable_segments:True"
    done = observed("--version", PYTORCH_CUDA_ALLOC_CONF="backend:native")
    assert done.stdout.splitlines()[-1] == "False None"

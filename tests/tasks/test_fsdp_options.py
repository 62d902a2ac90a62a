"""`accelerate launch --use_fsdp`: dpoctl's own sharding runs; what it would do differently is refused by name."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from fault_runs import Scene, outcome
from tiny_runs import merge, pair_rows, run_command, write_recipe, write_rows
from tiny_world import save_llama
from transformers import PreTrainedTokenizerFast

from dpoctl.cli.launch import Launcher, find_launcher
from dpoctl.errors import UsageError
from dpoctl.recipe import parse_recipe
from dpoctl.recipe.schema import Recipe, TrainingSection
from dpoctl.tasks.fsdp_options import OPTIONS, request, take_over, without_effect
from dpoctl.tasks.launchers import check_environment, refuse_unsupported, variables_of

# What `accelerate launch --use_fsdp` sets where nothing else is given.
DEFAULTS = {
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_MIXED_PRECISION": "no",
    "FSDP_VERSION": "1",
    "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_MIN_NUM_PARAMS": "100000000",
    "FSDP_FORWARD_PREFETCH": "false",
    "FSDP_USE_ORIG_PARAMS": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_SYNC_MODULE_STATES": "true",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "false",
}
RECIPE = {
    "method": "dpo",
    "model": {"model_name_or_path": "./tiny", "dtype": "float32"},
    "data": {"train": ["pairs.jsonl"], "max_length": 128},
    "training": {"output_dir": "run", "learning_rate": 1e-3, "global_batch_size": 5, "logging_steps": 1, "seed": 1},
}


def recipe(**keys: Any) -> Recipe:
    return parse_recipe(yaml.safe_dump(merge(RECIPE, {"training": keys})), "recipe.yaml", command="dpo")


def training(**keys: Any) -> TrainingSection:
    return recipe(**keys).training


@pytest.mark.parametrize("sharding", ["full", "auto"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"FSDP_VERSION": "2"},
        {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer"},
        {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT", "FSDP_BACKWARD_PREFETCH": "BACKWARD_PRE"},
        {"FSDP_SHARDING_STRATEGY": "1", "FSDP_RESHARD_AFTER_FORWARD": "full_shard"},
        {"FSDP_ACTIVATION_CHECKPOINTING": "true"},
    ],
    ids=str,
)
def test_what_a_recipe_does_too_passes_and_is_not_accelerate_s_any_more(sharding: str, options: dict[str, str]) -> None:
    environment = DEFAULTS | options
    check_environment(environment, training=training(sharding=sharding))
    assert without_effect(environment) == []
    take_over(environment)
    assert "ACCELERATE_USE_FSDP" not in environment
    # A second run of the same process is sharded too.
    assert request(environment) == f"FSDP_VERSION={environment['FSDP_VERSION']}"


def test_the_switch_alone_is_a_request_that_is_remembered() -> None:
    environment = {"ACCELERATE_USE_FSDP": "1"}
    take_over(environment)
    assert request(environment)
    assert "ACCELERATE_USE_FSDP" not in environment
    for harmless in ({}, {"ACCELERATE_USE_FSDP": "false", "FSDP_OFFLOAD_PARAMS": "false"}):
        before = dict(harmless)
        take_over(harmless)
        assert harmless == before
        assert not request(harmless)


# An option, the recipe that does what it asks for, and what is said without it.
MET: dict[str, tuple[dict[str, Any], str]] = {
    "FSDP_OFFLOAD_PARAMS=true": ({"cpu_offload": True}, "host memory; set training.cpu_offload: true; or unset FSDP_O"),
    "FSDP_SHARDING_STRATEGY=HYBRID_SHARD": ({"replicas": 2}, "copies of the sharded model; set training.replicas"),
    "FSDP_RESHARD_AFTER_FORWARD=4": ({"replicas": 2}, "copies of the sharded model; set training.replicas"),
}
REFUSED = {
    "FSDP_SHARDING_STRATEGY=SHARD_GRAD_OP": "stay gathered until backward, and dpoctl frees them after forward; ",
    "FSDP_SHARDING_STRATEGY=2": "stay gathered until backward",
    "FSDP_SHARDING_STRATEGY=HYBRID_SHARD_ZERO2": "stay gathered until backward",
    "FSDP_RESHARD_AFTER_FORWARD=false": "stay gathered until backward",
    "FSDP_SHARDING_STRATEGY=NO_SHARD": "a whole model on every device; set training.sharding: none",
    "FSDP_SHARDING_STRATEGY=FULLSHARD": "a strategy that dpoctl does not know; request FULL_SHARD",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD=true": "activations in host memory",
    "FSDP_IGNORED_MODULES=lm_head": "modules that are left out, and training.sharding divides all of them; unset",
}


@pytest.mark.parametrize("variable", MET)
def test_what_the_recipe_must_say_too_is_named(variable: str) -> None:
    keys, said = MET[variable]
    name, _, value = variable.partition("=")
    with pytest.raises(UsageError, match=f"^{variable} requests .*{said}"):
        check_environment(DEFAULTS | {name: value}, training=training())
    check_environment(DEFAULTS | {name: value}, training=training(**keys))


@pytest.mark.parametrize("variable", REFUSED)
def test_what_would_be_done_differently_is_refused(variable: str) -> None:
    name, _, value = variable.partition("=")
    with pytest.raises(UsageError, match=f"^{variable} requests .*{REFUSED[variable]}"):
        check_environment(DEFAULTS | {name: value}, training=training(replicas=2, cpu_offload=True))


def test_recomputation_that_the_recipe_forbids_is_refused() -> None:
    asked = DEFAULTS | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}
    with pytest.raises(UsageError, match="requests recomputed activations, and the recipe forbids them"):
        check_environment(asked, training=training(gradient_checkpointing=False))


def test_every_option_of_the_table_is_tried() -> None:
    tried = [variable.partition("=") for variable in (*MET, *REFUSED, "FSDP_ACTIVATION_CHECKPOINTING=true")]
    for option in OPTIONS:
        assert any(re.fullmatch(option.asked, f"{name}={value.lower()}") for name, _, value in tried), option


def test_a_recipe_that_wants_whole_models_refuses_fsdp_by_name() -> None:
    alone = training(sharding="none")
    with pytest.raises(UsageError, match=r"^ACCELERATE_USE_FSDP=true requests FSDP, .* training.sharding: none; set"):
        check_environment(DEFAULTS, training=alone)
    config = {"distributed_type": "FSDP", "num_processes": 2, "fsdp_config": {"fsdp_version": 2}}
    with pytest.raises(UsageError, match=r"^two.yaml requests FSDP, and the recipe has .*; or remove it from the file"):
        refuse_unsupported(variables_of(config), training=alone, source="two.yaml")
    with pytest.raises(UsageError, match="requests FSDP, and this command shards no model"):
        check_environment(DEFAULTS)


def test_options_of_a_config_file_are_read(tmp_path: Path) -> None:
    fsdp = {"fsdp_version": 2, "fsdp_offload_params": True, "fsdp_reshard_after_forward": True}
    config = write_recipe(tmp_path / "fsdp.yaml", {"distributed_type": "FSDP", "num_processes": 2, "fsdp_config": fsdp})
    with pytest.raises(UsageError, match=r"fsdp.yaml with FSDP_OFFLOAD_PARAMS=True requests weights and .*the file$"):
        find_launcher(None, str(config), {}, recipe())
    assert find_launcher(None, str(config), {}, recipe(cpu_offload=True)) == Launcher(None, config)
    idle = {"distributed_type": "MULTI_GPU", "num_processes": 2, "fsdp_config": fsdp}
    refuse_unsupported(variables_of(idle), training=training(sharding="none"))


def test_what_only_changes_the_speed_is_said() -> None:
    idle = {"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP", "FSDP_FORWARD_PREFETCH": "true", "FSDP_NEW_OPTION": "7"}
    idle["FSDP_BACKWARD_PREFETCH"] = "NO_PREFETCH"
    check_environment(DEFAULTS | idle, training=training())
    assert without_effect(DEFAULTS | idle) == [
        f"{name}={value}" for name, value in (DEFAULTS | idle).items() if name in idle
    ]


def test_accelerate_launch_with_fsdp_runs_dpoctl_s_own_sharding(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_llama(tmp_path / "tiny", tokenizer)
    write_rows(tmp_path / "pairs.jsonl", pair_rows(23))
    scene = Scene(tmp_path, RECIPE)
    options = ("--use_fsdp", "--fsdp_version", "2", "--fsdp_forward_prefetch", "true", "--num_processes", "2")
    launcher = (sys.executable, "-m", "accelerate.commands.launch", *options, "--main_process_port", "0")
    launched = run_command([*launcher, "-m", "dpoctl", *map(str, scene.arguments(tmp_path / "launched"))])
    (said,) = (line for line in launched.stderr.splitlines() if line.startswith("sharding: "))
    assert "dpoctl's own sharding runs, torch's fully_shard (training.sharding: full)" in said
    assert said.endswith("; without effect: FSDP_FORWARD_PREFETCH=true")
    own = scene.changed({"training.sharding": "full"})
    assert own.run(tmp_path / "own", "--num-processes", "2").code == 0
    assert outcome(tmp_path / "launched") == outcome(tmp_path / "own")
    manifest = next((tmp_path / "launched" / "checkpoints").rglob("manifest.json")).read_text()
    assert '"shards": 2' in manifest


def test_one_process_is_not_sharded_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    from dpoctl.tasks.sharding import choose_sharding

    monkeypatch.setenv("FSDP_VERSION", "2")

    class Alone:
        num_processes = 1

    assert choose_sharding(recipe(), Alone(), None) is None  # type: ignore[arg-type]
    assert "asked for FSDP: one process has nothing to divide" in capfd.readouterr().err

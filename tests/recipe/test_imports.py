"""Configs of other tools become recipes, and no key of them is lost without a word."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpoctl.errors import UsageError
from dpoctl.recipe import parse_recipe
from dpoctl.recipe.imports import import_config
from dpoctl.recipe.imports.reading import read_foreign
from dpoctl.recipe.imports.translation import Translation, known_target

FOLDER = Path(__file__).parent / "foreign"
CONFIGS = sorted(file.name for file in FOLDER.iterdir() if file.is_file())
SHARED = ("gradient_accumulation_steps", "warmup_steps", "warmup_ratio")

# Counted by hand: values of the recipe by dotted keys, and keys that must be reported as changing the result.
TABLE: dict[str, tuple[dict[str, Any], str]] = {
    "trl-dpo-full.yaml": (
        {
            "method": "dpo",
            "training.global_batch_size": 16,
            "training.warmup_steps": 0,
            "training.lr_scheduler_type": "linear",
            "training.num_train_epochs": 1.0,
            "training.eval_steps": 50,
            "dpo.loss": {"type": "sigmoid", "beta": 0.05},
            "model.dtype": "bfloat16",
            "data.eval": [{"path": "trl-lib/ultrafeedback_binarized", "split": "test"}],
        },
        "no_remove_unused_columns",
    ),
    "trl-dpo-lora.yaml": (
        {
            "training.global_batch_size": 16,
            "training.lr_scheduler_type": "cosine",
            "training.warmup_ratio": 0.03,
            "lora": {"r": 32, "lora_alpha": 16.0, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
            "quantization": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
            "training.optim": "adamw",
            "training.run_name": "first",
        },
        "",
    ),
    "trl-dpo-mpo.yaml": (
        {
            "training.max_steps": 500,
            "training.num_train_epochs": None,
            "training.warmup_steps": 50,
            "training.lr_scheduler_type": "constant_with_warmup",
            "model.dtype": "float16",
            "data.train": [{"path": "trl-lib/ultrafeedback_binarized", "split": "train"}, {"path": "data/own.jsonl"}],
            "dpo.loss": [
                {"type": "sigmoid", "beta": 0.1, "weight": 0.8},
                {"type": "bco_pair", "beta": 0.1, "running_mean": False, "weight": 0.2},
                {"type": "sft", "weight": 1.0},
            ],
        },
        "",
    ),
    "trl-dpo-robust.yaml": (
        {
            "dpo.loss": {"type": "robust", "beta": 0.2, "label_smoothing": 0.1},
            "model.dtype": "float32",
            "training.global_batch_size": 8,
            "training.num_train_epochs": 3.0,
            "training.weight_decay": 0.01,
            "training.max_grad_norm": 0.5,
            "training.adam_beta2": 0.95,
            "training.seed": 7,
        },
        "",
    ),
    "trl-dpo-trdpo.yaml": (
        {
            "dpo.loss": {"type": "sigmoid", "beta": 0.1, "sft_weight": 0.5},
            "dpo.reference": {"sync_steps": 64, "sync_alpha": 0.6},
            "data.max_prompt_length": 512,
        },
        "max_completion_length load_best_model_at_end",
    ),
    "trl-sft-messages.yaml": (
        {
            "method": "sft",
            "training.global_batch_size": 16,
            "data.max_length": 2048,
            "model.chat_template": "templates/mine.jinja",
            "training.eval_steps": None,
        },
        "packing eos_token",
    ),
    "trl-dpo.sh": (
        {
            "method": "dpo",
            "training.global_batch_size": 64,
            "lora": {"r": 32, "lora_alpha": 16.0, "target_modules": ["q_proj", "v_proj"]},
            "training.learning_rate": 5e-6,
        },
        "",
    ),
    "trl-sft.sh": (
        {
            "method": "sft",
            "lora.lora_dropout": 0.05,
            "model.disable_dropout": False,
            "model.dtype": "float32",
            "training.warmup_ratio": 0.1,
            "training.warmup_steps": None,
        },
        "",
    ),
    "handbook-dpo-full.yaml": (
        {
            "training.global_batch_size": 16,
            "data.eval_size": 2000,
            "data.max_prompt_length": 512,
            "training.save_total_limit": 2,
            "training.hub_model_id": None,
            "data.train": [
                {"path": "HuggingFaceH4/ultrafeedback_binarized", "split": "train_prefs"},
                {"path": "HuggingFaceH4/orca_dpo_pairs", "split": "train_prefs", "weight": 0.5},
            ],
        },
        "",
    ),
    "handbook-dpo-qlora.yaml": (
        {
            "training.global_batch_size": 16,
            "training.eval_steps": 100,
            "lora.r": 128,
            "lora.lora_dropout": None,
            "training.optim": "paged_adamw_32bit",
            "data.train": [{"path": "HuggingFaceH4/ultrafeedback_binarized", "split": "train_prefs"}],
            "data.eval": [{"path": "HuggingFaceH4/ultrafeedback_binarized", "split": "test_prefs"}],
        },
        "",
    ),
    "handbook-sft-full.yaml": ({"method": "sft", "model.chat_template": "mine.jinja", "training.eval_steps": 100}, ""),
    "handbook-apo.yaml": (
        {
            "dpo.loss": {"type": "apo_zero", "beta": 0.05},
            "training.lr_scheduler_type": "cosine_with_min_lr",
            "training.lr_scheduler_kwargs": {"min_lr_rate": 0.1},
            "training.warmup_from_zero": True,
            "training.max_grad_norm": 0.2,
            "model.revision": "it-SFT",
            "data.max_length": 24576,
        },
        "",
    ),
    "handbook-launch.sh": (
        {
            "training.global_batch_size": 128,
            "training.learning_rate": 1e-6,
            "dpo.loss.beta": 0.1,
            "dpo.loss.type": "sigmoid",
        },
        "",
    ),
    "axolotl-qlora.yml": (
        {
            "method": "sft",
            "training.global_batch_size": 8,
            "data.train": [{"path": "tatsu-lab/alpaca", "format": "alpaca"}],
            "data.eval_size": 0.05,
            "lora.target_modules": "all-linear",
            "quantization": {"load_in_4bit": True},
            "training.warmup_steps": 10,
            "training.run_name": "third",
        },
        "sample_packing",
    ),
    "axolotl-full.yml": (
        {
            "lora": None,
            "training.global_batch_size": 8,
            "training.optim": "adamw",
            "data.overlong": "truncate",
            "model.dtype": "bfloat16",
            "training.eval_steps": None,
        },
        "",
    ),
    "axolotl-dpo.yml": (
        {
            "dpo.loss": {"type": "sigmoid", "beta": 0.2},
            "training.optim": "adamw_8bit",
            "model.chat_template": "llama3",
            "training.warmup_ratio": 0.03,
            "data.train": [
                {
                    "path": "me/alpaca_messages_dpo",
                    "split": "train",
                    "column_map": {"chosen": "better", "rejected": "worse"},
                }
            ],
        },
        "",
    ),
    "axolotl-orpo.yml": (
        {"dpo.loss": {"type": "orpo", "beta": 0.1}, "data.eval_size": 100, "training.lr_scheduler_type": "linear"},
        "plugins",
    ),
    "axolotl-simpo.yml": (
        {
            "dpo.loss": {"type": "simpo", "beta": 2.0, "gamma_beta_ratio": 0.5, "sft_weight": 0.1},
            "training.global_batch_size": 32,
        },
        "",
    ),
    "axolotl-ipo.yml": (
        {
            "dpo.loss": {"type": "ipo", "beta": 0.1},
            "data.train": [{"path": "data/pairs.jsonl", "format": "orca"}],
            "data.max_length": 512,
            "training.global_batch_size": 1,
        },
        "unfrozen_parameters",
    ),
    "axolotl-lora-more.yml": (
        {
            "lora.use_rslora": True,
            "data.eval": [{"path": "data/held.jsonl", "format": "alpaca"}],
            "training.hub_model_id": "me/llama-lora",
        },
        "train_on_inputs cosine_min_lr_ratio",
    ),
    "llamafactory-lora-dpo.yaml": (
        {
            "dpo.loss": {"type": "sigmoid", "beta": 0.1},
            "lora": {"r": 8, "lora_alpha": 16.0, "target_modules": "all-linear"},
            "training.global_batch_size": 8,
            "data.train": [
                {
                    "path": str(FOLDER / "data" / "dpo.json"),
                    "format": "sharegpt-ranking",
                    "column_map": {"conversations": "turns"},
                    "max_samples": 1000,
                }
            ],
        },
        "",
    ),
    "llamafactory-full-sft.yaml": (
        {"method": "sft", "lora": None, "data.eval_size": 0.1, "training.eval_steps": 500, "model.chat_template": None},
        "",
    ),
    "llamafactory-qlora-sft.yaml": (
        {
            "sft.loss_on": "last",
            "quantization": {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": False,
            },
            "lora.lora_alpha": 32.0,
            "lora.target_modules": ["q_proj", "v_proj"],
            "lora.use_rslora": True,
            "lora.lora_dropout": 0.1,
        },
        "neat_packing",
    ),
    "llamafactory-kto.yaml": (
        {"dpo.loss": {"type": "kto", "beta": 0.1}, "data.train": [{"path": "kto_en_demo", "max_samples": 1000}]},
        "dataset",
    ),
    "llamafactory-simpo.json": (
        {
            "dpo.loss": {"type": "simpo", "beta": 2.5, "gamma_beta_ratio": 0.4},
            "model.dtype": "bfloat16",
            "training.num_train_epochs": 3.0,
            "training.lr_scheduler_type": "linear",
        },
        "use_galore",
    ),
    "llamafactory-dpo.sh": (
        {
            "dpo.loss": {"type": "hinge", "beta": 0.1, "sft_weight": 0.1},
            "dpo.reference.path": "Qwen/Qwen2.5-1.5B-Instruct",
            "model.model_name_or_path": "saves/qwen/sft",
            "lora": {"start": "continue"},
            "training.warmup_steps": 20,
        },
        "",
    ),
    "torchtune-lora-dpo.yaml": (
        {
            "training.max_steps": 1000,
            "training.global_batch_size": 32,
            "training.warmup_steps": 100,
            "training.weight_decay": 0.05,
            "training.max_grad_norm": None,
            "dpo.loss": {"type": "sigmoid", "beta": 0.1},
            "lora.target_modules": ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            "training.output_dir": "/tmp/torchtune/lora_dpo",
        },
        "",
    ),
    "torchtune-full-dpo.yaml": (
        {
            "dpo.loss": {"type": "sigmoid", "beta": 0.05, "label_smoothing": 0.1},
            "training.optim": "paged_adamw_8bit",
            "training.lr_scheduler_type": "constant",
            "training.num_train_epochs": 2.0,
            "training.seed": 3,
            "training.torch_compile": True,
            "data.max_length": 1_000_000,
        },
        "",
    ),
    "torchtune-qlora-sft.yaml": (
        {
            "method": "sft",
            "quantization": {"load_in_4bit": True},
            "data.train": [{"path": "yahma/alpaca-cleaned", "format": "alpaca"}],
            "data.max_length": 4096,
            "training.global_batch_size": 16,
        },
        "dataset.packed dataset.train_on_input",
    ),
    "torchtune-run.sh": ({"training.global_batch_size": 64, "training.learning_rate": 1e-5}, ""),
}


def at(recipe: dict[str, Any], path: str) -> Any:
    for part in path.split("."):
        recipe = recipe.get(part) if isinstance(recipe, dict) else None  # type: ignore[assignment]
    return recipe


def test_there_are_thirty_configs_and_each_is_counted_by_hand() -> None:
    assert len(CONFIGS) == 30
    assert sorted(TABLE) == CONFIGS


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_becomes_a_recipe_that_dpoctl_accepts(name: str) -> None:
    found = import_config(FOLDER / name, template="mine.jinja")
    values, lost = TABLE[name]
    recipe = yaml.safe_load(found.text)
    assert {path: at(recipe, path) for path in values} == values
    assert found.problems == []
    parse_recipe(found.text, name, command=recipe["method"])
    reported = [line.theirs.partition(":")[0] for line in found.report.lost]
    assert set(lost.split()) <= {key.split(" ")[0] for key in reported}


def test_a_key_of_another_method_is_said_to_be_lost(tmp_path: Path) -> None:
    config = {"model_name_or_path": "some/model", "dataset_name": "some/pairs", "output_dir": "x", "beta": 0.1}
    (tmp_path / "dpo.yaml").write_text(yaml.safe_dump(config | {"loss_type": "sigmoid", "neftune_noise_alpha": 5}))
    found = import_config(tmp_path / "dpo.yaml")
    assert [line.why for line in found.report.lost] == ["here it is a key of `dpoctl sft`"]


@pytest.mark.parametrize("name", CONFIGS)
def test_no_key_of_a_config_is_lost_without_a_word(name: str) -> None:
    report = import_config(FOLDER / name).report
    said = report.text()
    keys = read_foreign(FOLDER / name).config
    silent = [key for key, value in keys.items() if key not in said and value not in (None, False, "", "no", [])]
    assert set(silent) <= SILENT.get(report.tool, set())


# Keys whose content is reported, under another name.
HF = {"dataset_train_split", "dataset_test_split", "dataset_splits", "use_peft", "eval_strategy", "evaluation_strategy"}
HF |= {
    "dataset_mixture",
    "datasets",
    "torch_dtype",
    "truncation_mode",
    "loss_weights",
    "sync_ref_model",
    "dataset_config",
}
SILENT = {
    "TRL": HF,
    "the alignment-handbook": HF,
    "axolotl": {"special_tokens"},
    "LLaMA-Factory": {"double_quantization", "dataset_dir", "eval_strategy"},
    "torchtune": {"model", "tokenizer", "checkpointer", "epochs", "max_steps_per_epoch"},
}


def test_keys_are_carried_over_as_soon_as_the_schema_has_them() -> None:
    assert known_target("adam_beta2") == "training.adam_beta2"
    assert known_target("peft_use_rslora") == "lora.use_rslora"
    assert known_target("method") is None
    job = Translation("TRL", {"seed": 3, "warp": 9, "logging_steps": 0.5, "optim": "adamw_hf", "tf32": False}, 1, "")
    job.finish()
    assert job.recipe == {"training": {"seed": 3, "optim": "adamw"}}
    assert [str(line) for line in job.report.lost] == ["warp: 9: dpoctl does not know this key: look up what it does"]
    assert [line.theirs for line in job.report.needless] == ["logging_steps: 0.5"]
    assert job.report.unset == ["tf32"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.yaml", "rl: grpo\nbase_model: x\n", "rl: grpo is a method that dpoctl does not have"),
        ("a.yaml", "stage: ppo\ncutoff_len: 3\n", "stage: ppo is a method that dpoctl does not have"),
        ("a.yaml", "finetuning_type: freeze\ndataset: x\n", "finetuning_type: freeze is not offered"),
        ("a.yaml", "model_name_or_path: x\nlearning_rate: 1\n", "the config names no data set"),
        ("a.yaml", "reward_funcs: [x]\nmodel_name_or_path: x\n", "reward_funcs is for a method"),
        ("a.yaml", "what: 1\n", "no config of TRL, axolotl"),
        ("a.yaml", "- 1\n", "no mapping of keys to values"),
        ("a.yaml", "a: [1\n", "a.yaml:2:1: cannot be read"),
        ("a.json", "{", "a.json: cannot be read"),
        ("run.sh", "trl dpo --config gone.yaml\n", "its config 'gone.yaml' is not there"),
        ("gone", "", "there is no file"),
        ("loss.yaml", "model: {_component_: m}\nloss: {_component_: a.PPOLoss}\n", "PPOLoss is of a method"),
        ("model.yaml", "model: {_component_: m}\ndataset: {_component_: d}\n", "the config names no model"),
    ],
)
def test_what_cannot_be_imported_is_refused_in_one_line(name: str, text: str, said: str, tmp_path: Path) -> None:
    if name != "gone":
        (tmp_path / name).write_text(text)
    with pytest.raises(UsageError) as refused:
        import_config(tmp_path / name)
    assert said in refused.value.message
    assert "\n" not in refused.value.message


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Any]:
    """Call `dpoctl` in an empty folder, and return its exit code and what it prints."""
    from dpoctl.cli.app import main

    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dpoctl", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


def test_the_command_writes_the_recipe_its_template_and_the_report(call: Callable[..., Any]) -> None:
    code, out, err = call("import", str(FOLDER / "handbook-sft-full.yaml"), "-o", "mine.yaml", "--num-processes", "8")
    assert (code, out) == (0, "")
    assert "changed in form or meaning:" in err
    assert "16 rows x 1 micro-batch x 8 devices" in err
    recipe = yaml.safe_load(Path("mine.yaml").read_text())
    assert recipe["training"]["global_batch_size"] == 128
    assert recipe["model"]["chat_template"] == "mine.jinja"
    assert Path("mine.jinja").read_text().startswith("{% for message in messages %}")
    code, _, err = call("import", str(FOLDER / "handbook-sft-full.yaml"), "-o", "mine.yaml")
    assert (code, "exists already" in err) == (2, True)
    code, out, _ = call("import", str(FOLDER / "trl-dpo.sh"), "--json")
    found = json.loads(out)
    assert found["report"]["tool"] == "TRL"
    assert found["problems"] == []
    assert "global_batch_size: 64" in found["recipe"]


def test_a_config_that_is_run_by_mistake_names_the_command(call: Callable[..., Any]) -> None:
    for name in ("trl-dpo-full.yaml", "axolotl-dpo.yml", "llamafactory-lora-dpo.yaml", "torchtune-full-dpo.yaml"):
        code, _, err = call("dpo", str(FOLDER / name))
        assert code == 2
        assert f"not a recipe; `dpoctl import {FOLDER / name}` makes a recipe of it" in err
        assert len(err.splitlines()) == 3

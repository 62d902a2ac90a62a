"""A config of TRL, and the recipe that `dpoctl import` makes of it: their first losses are the same.

Of a config only model, data and the size of a batch are changed, so that a tiny model on a CPU can take its steps.
"""

import math
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset
from parity.two_programs import Row, World, forget_processes, in_order_of_the_plan
from tiny_runs import metrics_of, sentence, write_rows
from transformers import AutoModelForCausalLM

import dpoctl
from dpoctl.recipe.imports import import_config
from dpoctl.recipe.imports.reading import read_foreign

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

FOLDER = Path(__file__).parents[1] / "recipe" / "foreign"
STEPS = 3
BATCHES = (2, 2)
"""Rows of a micro-batch, and micro-batches of a step."""
COUPLED = ("trl-dpo-mpo.yaml",)
"""Their likelihood is averaged over a micro-batch by TRL, and over a step by dpoctl: they get one micro-batch."""
GONE = ("max_prompt_length", "max_completion_length", "rpo_alpha", "evaluation_strategy", "max_seq_length")
"""Keys that TRL 1.16 no longer has; `rpo_alpha` is a mixture there."""
CONFIGS = (
    *("trl-dpo-full.yaml", "trl-dpo-lora.yaml", "trl-dpo-mpo.yaml", "trl-dpo-robust.yaml", "trl-dpo.sh"),
    *("trl-sft-messages.yaml", "trl-sft.sh", "handbook-dpo-full.yaml", "handbook-dpo-qlora.yaml"),
    *("handbook-sft-full.yaml", "handbook-launch.sh"),
)


@pytest.mark.parametrize("name", CONFIGS)
def test_an_imported_config_gives_the_same_first_losses(name: str, world: World) -> None:
    foreign = read_foreign(FOLDER / name)
    config = shrunk(foreign.config, world, (math.prod(BATCHES), 1) if name in COUPLED else BATCHES)
    method = foreign.method if "beta" not in config and "loss_type" not in config else "dpo"
    rows = pairs() if method == "dpo" else demonstrations()
    data = write_rows(world.root / "rows.jsonl", rows)
    file = world.root / f"{method}-config.yaml"
    file.write_text(yaml.safe_dump(config | {"dataset_name": str(data)}))
    imported = import_config(file)
    assert imported.problems == []
    recipe = yaml.safe_load(imported.text)
    recipe["training"] |= {"output_dir": str(world.root / "ours"), "logging_steps": 1, "max_steps": STEPS}
    recipe["training"].pop("num_train_epochs", None)
    if recipe.get("lora", {}).pop("lora_dropout", None):
        recipe["model"].pop("disable_dropout")  # the two programs draw it from different generators
    forget_processes()
    run = (dpoctl.dpo if method == "dpo" else dpoctl.sft)(recipe, overwrite=True)
    mine = [row["loss"] for row in metrics_of(run["output_dir"]) if "grad_norm" in row]
    theirs = with_trl(method, config, in_order_of_the_plan(rows), recipe, world)
    print(f"{name}: {mine} and {theirs}")  # noqa: T201
    assert len(mine) == len(theirs) == STEPS
    assert mine == pytest.approx(theirs, abs=1e-5)


def shrunk(config: Row, world: World, batch: tuple[int, int]) -> Row:
    """Put a tiny model, short rows and small batches in the place of a config's own."""
    kept = {key: value for key, value in config.items() if key not in ("dataset_mixture", "dataset_mixer", "datasets")}
    for key in ("dataset_splits", "dataset_train_split", "dataset_test_split", "model_revision", "attn_implementation"):
        kept.pop(key, None)
    for key in ("load_in_4bit", "use_bnb_nested_quant", "chat_template", "chat_template_path", "eos_token", "packing"):
        kept.pop(key, None)
    for key in ("deepspeed", "torch_dtype", "push_to_hub", "run_name", "hub_model_id", "fp16", "optim", "do_eval"):
        kept.pop(key, None)
    if kept.pop("warmup_ratio", None):
        kept["warmup_steps"] = 2  # TRL 1.16 has no ratio
    return kept | {
        "model_name_or_path": str(world.model),
        "output_dir": str(world.root / "theirs"),
        "eval_strategy": "no",
        "bf16": False,
        "dtype": "float32",
        "seed": 1,
        "per_device_train_batch_size": batch[0],
        "gradient_accumulation_steps": batch[1],
        "gradient_checkpointing": False,
        "report_to": "none",
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-6,
        "max_steps": STEPS,
        "save_strategy": "no",
        "max_length": 256,
    }


def pairs() -> list[Row]:
    rng = random.Random(0)
    return [
        {
            "prompt": f"{number}: {sentence(rng, 10)}?",
            "chosen": f" no {sentence(rng, 12)}",
            "rejected": f" yes {sentence(rng, 12)}",
        }
        for number in range(STEPS * math.prod(BATCHES))
    ]


def demonstrations() -> list[Row]:
    return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs()]


def with_trl(method: str, config: Row, rows: list[Row], recipe: Row, world: World) -> list[float]:
    """Train with TRL as its own script would, on rows in a given order and from a given adapter."""
    import trl
    from transformers import HfArgumentParser

    forget_processes()
    kept = {key: value for key, value in config.items() if key not in GONE}
    arguments: Any
    kind: Any = trl.DPOConfig if method == "dpo" else trl.SFTConfig
    arguments, model = HfArgumentParser((kind, trl.ModelConfig)).parse_dict(
        kept | {"logging_steps": 1, "use_cpu": True, "train_sampling_strategy": "sequential", "disable_tqdm": True},
        allow_extra_keys=True,
    )
    arguments.model_init_kwargs = {"dtype": "float32"}
    trainer: Any = trl.DPOTrainer if method == "dpo" else trl.SFTTrainer
    running = trainer(
        model=adapted(recipe, world) if model.use_peft else str(world.model),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=world.tokenizer,
    )
    running.train()
    return [row["loss"] for row in running.state.log_history if "grad_norm" in row]


def adapted(recipe: Row, world: World) -> Any:
    """The model under the adapter that dpoctl starts from."""
    from dpoctl.model.lora import add_adapter
    from dpoctl.recipe.schema import LoraSection

    base = AutoModelForCausalLM.from_pretrained(world.model).requires_grad_(False)
    return add_adapter(base, LoraSection(**recipe["lora"]), seed=recipe["training"]["seed"])

"""The same few steps by dpoctl and by TRL: same files, same order of rows, same hyperparameters."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset
from memory_store import MemoryStore, random_pairs
from peft import PeftModel
from tiny_runs import merge, metrics_of, sentence, write_rows
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import dpoctl
from dpoctl.core.planner import Lengths, Plan
from dpoctl.model.lora import add_adapter
from dpoctl.recipe.schema import LoraSection

Row = dict[str, Any]

STEPS, BATCH, SEED = 5, 4, 1
LORA = {"r": 4, "lora_alpha": 8.0}
LENGTH = 256
OPTIMISATION: Row = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
    # The usual 1e-8 makes whole updates of the rounding of gradients that are all but zero.
    "adam_epsilon": 1e-6,
    "logging_steps": 1,
    "seed": SEED,
}
"""What both call by the same name."""

# TRL takes seconds to import, which a collection of all tests must not pay.
TRAINERS: dict[str, tuple[str, str, Row]] = {
    "dpo": ("trl", "DPO", {"max_length": None, "model_init_kwargs": {"dtype": "float32"}}),
    "kto": ("trl", "KTO", {"max_length": None, "model_init_kwargs": {"dtype": "float32"}}),
    "cpo": ("trl.experimental.cpo", "CPO", {"max_length": LENGTH}),
    "orpo": ("trl.experimental.orpo", "ORPO", {"max_length": LENGTH}),
}
"""By name: where its trainer and configuration are, and what makes it keep every row whole and in float32."""


@dataclass(frozen=True)
class Course:
    """What a program logged at each step."""

    rows: list[Row]

    def __getitem__(self, name: str) -> list[float]:
        return [row[name] for row in self.rows]


def alike(mine: Course, theirs: Course) -> bool:
    """Whether two courses are the same but for rounding: losses within 1e-5, gradients within 1e-4 of their norm."""
    assert len(mine.rows) == len(theirs.rows) == STEPS
    assert mine["learning_rate"] == pytest.approx(theirs["learning_rate"])
    gap = max(abs(a - b) / max(1.0, abs(a)) for a, b in zip(mine["loss"], theirs["loss"], strict=True))
    norm_gap = max(abs(a - b) / abs(a) for a, b in zip(mine["grad_norm"], theirs["grad_norm"], strict=True))
    print(f"largest difference: loss {gap:.1e}, norm of the gradient {norm_gap:.1e}")  # noqa: T201
    return gap < 1e-5 and norm_gap < 1e-4


def pair_rows(*, one_token_prompts: bool = False) -> list[Row]:
    """Preference pairs of plain text and uneven lengths."""
    rng = random.Random(0)
    return [
        {
            "prompt": chr(ord("A") + number) if one_token_prompts else f"{number}: {sentence(rng, 10)}?",
            "chosen": f" no {sentence(rng, 12)}",
            "rejected": f" yes {sentence(rng, 12)}",
        }
        for number in range(STEPS * BATCH)
    ]


def in_order_of_the_plan(rows: Sequence[Row]) -> list[Row]:
    """The rows as dpoctl's seed shuffles them."""
    plan = Plan(Lengths.of(MemoryStore(random_pairs(len(rows)))), BATCH, seed=SEED)  # type: ignore[arg-type]
    return [rows[record] for step in plan for record in step.records]


@dataclass(frozen=True)
class World:
    """A model on disk, and a folder for what is made of it."""

    root: Path
    model: Path
    tokenizer: PreTrainedTokenizerFast

    def ours(self, loss: Any, rows: Sequence[Row], *, lora: bool = False, **training: Any) -> Course:
        """Train on preferences with dpoctl; `loss` is the recipe's."""
        forget_processes()
        run = dpoctl.dpo(self.recipe(rows, loss, lora=lora, **training), overwrite=True)
        return Course([row for row in metrics_of(run["output_dir"]) if "grad_norm" in row])

    def imitate(self, rows: Sequence[Row], **training: Any) -> tuple["World", Course]:
        """Train on demonstrations with dpoctl, and return the world in which the model has learnt them."""
        forget_processes()
        recipe = merge(self.recipe(rows, None, **training), {"method": "sft", "training.output_dir": self.root / "sft"})
        run = Path(dpoctl.sft(recipe, overwrite=True)["output_dir"])
        return replace(self, model=run), Course([row for row in metrics_of(run) if "grad_norm" in row])

    def recipe(self, rows: Sequence[Row], loss: Any, *, lora: bool = False, **training: Any) -> Row:
        """What tells dpoctl to do what TRL is told."""
        data = write_rows(self.root / "rows.jsonl", list(rows))
        settings = {"output_dir": str(self.root / "ours"), "global_batch_size": BATCH}
        return {
            "method": "dpo",
            "model": {"model_name_or_path": str(self.model), "dtype": "float32"},
            "data": {"train": [{"path": str(data)}], "max_length": LENGTH},
            "training": settings | OPTIMISATION | training,
            **({"dpo": {"loss": loss}} if loss else {}),
            **({"lora": LORA} if lora else {}),
        }

    def theirs(
        self,
        trainer: str,
        rows: Sequence[Row],
        *,
        lora: bool = False,
        micro_batches: int = 1,
        learning_rate: float = OPTIMISATION["learning_rate"],
        edit: Callable[[Dataset], Dataset] | None = None,
        **options: Any,
    ) -> Course:
        """Train with TRL; `edit` changes its tokens just before."""
        forget_processes()
        place, name, fixed = TRAINERS[trainer]
        module = import_module(place)
        arguments = getattr(module, f"{name}Config")(
            output_dir=str(self.root / "theirs"),
            per_device_train_batch_size=BATCH // micro_batches,
            gradient_accumulation_steps=micro_batches,
            num_train_epochs=1,
            train_sampling_strategy="sequential",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **OPTIMISATION | {"learning_rate": learning_rate},
            **fixed,
            **options,
        )
        running = getattr(module, f"{name}Trainer")(
            model=self.adapted() if lora else str(self.model),
            args=arguments,
            train_dataset=Dataset.from_list(in_order_of_the_plan(rows)),
            processing_class=self.tokenizer,
        )
        if edit is not None:
            running.train_dataset = edit(running.train_dataset)
        running.train()
        return Course([row for row in running.state.log_history if "grad_norm" in row])

    def adapted(self) -> PeftModel:
        """The model under the adapter that dpoctl starts from."""
        base = AutoModelForCausalLM.from_pretrained(self.model).requires_grad_(False)
        return add_adapter(base, LoraSection(**LORA), seed=SEED)  # type: ignore[arg-type]


def forget_processes() -> None:
    """Let the next program set accelerate up in its own way."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()

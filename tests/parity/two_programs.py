"""The same few steps by dpoctl and by TRL: same files, same order of rows, same hyperparameters."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset
from memory_store import MemoryStore, random_pairs
from peft import PeftModel
from tiny_runs import merge, metrics_of, sentence, write_rows
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

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
    "logging_steps": 1,
    "seed": SEED,
}
"""What both call by the same name."""

TRAINERS: dict[str, tuple[type[Trainer], type[Any], Row]] = {
    "dpo": (DPOTrainer, DPOConfig, {"max_length": None, "model_init_kwargs": {"dtype": "float32"}}),
    "kto": (KTOTrainer, KTOConfig, {"max_length": None, "model_init_kwargs": {"dtype": "float32"}}),
    "cpo": (CPOTrainer, CPOConfig, {"max_length": LENGTH}),
    "orpo": (ORPOTrainer, ORPOConfig, {"max_length": LENGTH}),
}
"""By name: the trainer, its configuration, and what makes it keep every row whole and in float32."""


@dataclass(frozen=True)
class Course:
    """What a program logged at each step."""

    rows: list[Row]

    def __getitem__(self, name: str) -> list[float]:
        return [row[name] for row in self.rows]

    def gap(self, other: "Course", name: str) -> float:
        """The largest difference between two courses, relative to the value where that is above 1."""
        pairs = zip(self[name], other[name], strict=True)
        return max(abs(mine - theirs) / max(1.0, abs(mine)) for mine, theirs in pairs)

    def relative_gap(self, other: "Course", name: str) -> float:
        """The largest difference between two courses, relative to the value."""
        return max(abs(mine - theirs) / abs(mine) for mine, theirs in zip(self[name], other[name], strict=True))


def pair_rows(prompt_words: int = 10, count: int = STEPS * BATCH) -> list[Row]:
    """Preference pairs of plain text and uneven lengths."""
    rng = random.Random(0)
    return [
        {
            "prompt": f"{number}: {sentence(rng, prompt_words)}?" if prompt_words else chr(ord("A") + number),
            "chosen": f" no {sentence(rng, 12)}",
            "rejected": f" yes {sentence(rng, 12)}",
        }
        for number in range(count)
    ]


def labelled_rows() -> list[Row]:
    """Completions of different prompts, every third of them undesirable."""
    return [
        {"prompt": row["prompt"], "completion": row["chosen" if number % 3 else "rejected"], "label": number % 3 > 0}
        for number, row in enumerate(pair_rows())
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

    def ours(self, loss: Any, rows: Sequence[Row], *, lora: bool = False, **changes: Any) -> Course:
        """Train with dpoctl; `loss` is the recipe's."""
        _forget_processes()
        write_rows(self.root / "rows.jsonl", list(rows))
        run = self.root / "ours"
        recipe = {
            "method": "dpo",
            "model": {"model_name_or_path": str(self.model), "dtype": "float32"},
            "data": {"train": [{"path": str(self.root / "rows.jsonl")}], "max_length": LENGTH},
            "dpo": {"loss": loss},
            "training": {"output_dir": str(run), "global_batch_size": BATCH} | OPTIMISATION,
        }
        dpoctl.dpo(merge(recipe, ({"lora": LORA} if lora else {}) | changes), overwrite=True)
        return Course([row for row in metrics_of(run) if "grad_norm" in row])

    def theirs(
        self,
        trainer: str,
        rows: Sequence[Row],
        *,
        lora: bool = False,
        micro_batches: int = 1,
        edit: Callable[[Dataset], Dataset] | None = None,
        **options: Any,
    ) -> Course:
        """Train with TRL; `edit` changes its tokens just before."""
        _forget_processes()
        kind, config, fixed = TRAINERS[trainer]
        arguments = config(
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
            **OPTIMISATION,
            **_without_model(fixed, lora=lora),
            **options,
        )
        running = kind(
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


def _without_model(options: Mapping[str, Any], *, lora: bool) -> Row:
    """How to load a model is no question where it is given."""
    return {name: value for name, value in options.items() if not (lora and name == "model_init_kwargs")}


def _forget_processes() -> None:
    """Each program sets accelerate up in its own way."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()

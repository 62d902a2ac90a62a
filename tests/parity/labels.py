"""KTO by the core of dpoctl, on rows that are tokenized here, with the mismatched answers in the open."""

from collections.abc import Sequence

import numpy as np
import yaml
from accelerate import Accelerator
from datasets import Dataset
from loop_samples import Notes
from memory_store import MemoryStore
from parity.two_programs import BATCH, LENGTH, SEED, Course, Row, World, forget_processes, pair_rows
from transformers import PreTrainedTokenizerFast

from dpoctl.core.guard import Guard
from dpoctl.core.loop import Cadence, fit
from dpoctl.core.planner import Lengths, Plan
from dpoctl.core.schedule import learning_rate
from dpoctl.core.step import MemoryRetry, Stepper
from dpoctl.data.mismatched import Mismatched
from dpoctl.data.tokenize import Example
from dpoctl.model.load import load_policy
from dpoctl.model.probe import ProbeResult
from dpoctl.recipe import parse_recipe
from dpoctl.tasks.reference import Reference
from dpoctl.tasks.setup import Setup


def labelled_rows() -> list[Row]:
    """Completions of different prompts, every third of them undesirable."""
    return [
        {"prompt": row["prompt"], "completion": row["chosen" if number % 3 else "rejected"], "label": number % 3 > 0}
        for number, row in enumerate(pair_rows())
    ]


def labelled_store(rows: Sequence[Row], tokenizer: PreTrainedTokenizerFast) -> Mismatched:
    """The rows as tokens, each beside an answer to another prompt."""

    def example(row: Row) -> Example:
        prompt, answer = (
            np.array(tokenizer(text)["input_ids"]) for text in (row["prompt"], row["completion"] + tokenizer.eos_token)
        )
        scored = np.ones(len(answer), dtype=bool)
        pairs = np.zeros((0, 2), dtype=np.int64)
        return Example(prompt, np.zeros(len(prompt), dtype=bool), (answer,), (scored,), pairs, label=int(row["label"]))

    return Mismatched(MemoryStore([example(row) for row in rows]), LENGTH)  # type: ignore[arg-type]


def train_on_labels(world: World, loss: Row, store: Mismatched, *, lora: bool = False) -> Course:
    """Train with dpoctl's own loop, optimizer, reference and loss."""
    forget_processes()
    text = yaml.safe_dump(world.recipe(labelled_rows(), loss, lora=lora))
    recipe = parse_recipe(text, "recipe", command="dpo")
    accelerator = Accelerator(cpu=True)
    policy = load_policy(recipe, world.tokenizer, accelerator.device)
    setup = Setup(recipe, accelerator, world.tokenizer, policy, ProbeResult("shared", True, ""))
    plan = Plan(Lengths.of(store), BATCH, seed=SEED)
    reader = Reference(setup).read_into(setup.reader(store, ""), plan.max_tokens)
    scorer, optimizer, clip = setup.prepare()
    stepper = Stepper(
        setup.objective(scorer),
        optimizer,
        plan,
        reader,
        Guard(accelerator),
        learning_rate=learning_rate(recipe.training, plan.num_steps),
        max_grad_norm=recipe.training.max_grad_norm,
        retry=MemoryRetry(allowed=False),
        clip=clip,
    )
    notes = Notes()
    fit(stepper, notes, Cadence(logging=1), {})
    return Course([row for _, row in notes.rows])


def mismatched_like(store: Mismatched, dataset: Dataset) -> Dataset:
    """TRL's tokens with the mismatched answers of a store."""
    order = [record for step in Plan(Lengths.of(store), BATCH, seed=SEED) for record in step.records]
    examples = [store.example(record) for record in order]
    for row, example in zip(dataset, examples, strict=True):
        assert row["prompt_ids"] == example.shared.tolist()
        assert row["completion_ids"] == example.suffixes[0].tolist()
    others = [example.suffixes[1].tolist() for example in examples]
    return dataset.remove_columns("KL_completion_ids").add_column("KL_completion_ids", others)

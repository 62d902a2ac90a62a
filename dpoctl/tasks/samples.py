"""Samples: what the policy and its reference write to the same prompts, drawn with the same random numbers."""

import json
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.table import Table
from rich.text import Text as Styled
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpoctl import console
from dpoctl.core.loop import Metrics
from dpoctl.data.preview import shown
from dpoctl.data.records import Text
from dpoctl.data.store import TokenStore
from dpoctl.data.tokenize import render_prompts
from dpoctl.model.generate import Generation, Sampling, generate
from dpoctl.model.policy import Policy
from dpoctl.recipe.schema import Recipe, SamplesSection
from dpoctl.runs.files import write_atomically
from dpoctl.tasks.finished import FinishedRun
from dpoctl.tasks.journal import Journal
from dpoctl.tasks.judge import KeywordJudge

FOLDER = "samples"
SHOWN = 3
# Prompt and text of all rows of a batch: the cache of a 7B model stays small, and tiny models have full batches.
TOKENS, MOST_ROWS = 16384, 64
STEP_FILE = re.compile(r"step-(\d+)\.jsonl")


@dataclass(frozen=True)
class Sample:
    """A prompt, and what was written to it.

    Attributes:
        prompt: as it stands in the data.
        policy: the text of the model that is trained.
        reference: that of the model it is compared with; None where that is not at hand.
    """

    prompt: Text
    policy: Generation
    reference: Generation | None

    def row(self) -> dict[str, Any]:
        """Return it as a line of the file."""
        sides = {"reference": self.reference, "policy": self.policy}
        known = {name: side for name, side in sides.items() if side is not None}
        texts = {name: side.text for name, side in known.items()}
        return {"prompt": self.prompt, **texts, **{f"{name}_finished": side.finished for name, side in known.items()}}


class Sampler:
    """Draws texts for the prompts of a recipe, shared out over the ranks.

    Args:
        section: how many prompts, which, and how texts are drawn.
        recipe: of the run.
        tokenizer: of the model.
        stores: the evaluation sets.
        accelerator: ranks and precision.
        limit: use no more prompts than this of each set.
    """

    def __init__(
        self,
        section: SamplesSection,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerBase,
        stores: Mapping[str, TokenStore],
        accelerator: Accelerator,
        limit: int | None = None,
    ) -> None:
        self._tokenizer, self._accelerator = tokenizer, accelerator
        kwargs = recipe.data.chat_template_kwargs
        if section.prompts is None:
            count = section.num if limit is None else min(section.num, limit)
            found = [each for store in stores.values() for each in _first_prompts(store, tokenizer, kwargs, count)]
        else:
            found = _given_prompts(section.prompts, next(iter(stores.values())), tokenizer, kwargs)
        self._prompts = [each for each in found for _ in range(section.per_prompt)]
        longest = max((len(ids) for _, ids in found), default=0) + section.max_new_tokens
        rows = max(1, min(MOST_ROWS, TOKENS // longest))
        self._sampling = Sampling(section.max_new_tokens, section.temperature, section.top_p, section.seed, rows)

    def draw(self, causal: PreTrainedModel) -> list[Generation]:
        """Return a text for each prompt; every rank calls this and gets all of them."""
        # The same prompt again is another draw, which only a rank that sees them all can count.
        alike: dict[tuple[int, ...], list[int]] = {}
        for index, (_, ids) in enumerate(self._prompts):
            alike.setdefault(tuple(ids), []).append(index)
        rank, ranks = self._accelerator.process_index, self._accelerator.num_processes
        mine = [index for group in list(alike.values())[rank::ranks] for index in group]
        with torch.no_grad(), self._accelerator.autocast():
            texts = generate(causal, self._tokenizer, [self._prompts[index][1] for index in mine], self._sampling)
        found: dict[int, Generation] = dict(gather_object(list(zip(mine, texts, strict=True))))
        return [found[index] for index in range(len(self._prompts))]

    def pair(self, policy: Sequence[Generation], reference: Sequence[Generation] | None) -> list[Sample]:
        """Put texts beside their prompts."""
        others: Sequence[Generation | None] = reference or [None] * len(policy)
        return [
            Sample(prompt, text, other) for (prompt, _), text, other in zip(self._prompts, policy, others, strict=True)
        ]


class Samples:
    """The samples of a training run; every rank makes one before the first step, and calls it at each evaluation.

    Args:
        recipe: of the run.
        folder: the run directory.
        accelerator: ranks and precision.
        tokenizer: of the model.
        policy: as it was before its first update.
        stores: the evaluation sets.
        start: the step that the run goes on from; -1 if it starts.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        accelerator: Accelerator,
        tokenizer: PreTrainedTokenizerBase,
        policy: Policy,
        stores: Mapping[str, TokenStore],
        start: int,
    ) -> None:
        self._folder, self._accelerator, self._causal = folder / FOLDER, accelerator, policy.causal
        self._judge, self._reference = recipe.eval.judge, None
        self._sampler = None
        if accelerator.is_main_process:
            _forget_after(self._folder, start)
        if (section := recipe.eval.samples) is None or not section.num or not stores:
            return
        self._sampler = Sampler(section, recipe, tokenizer, stores, accelerator)
        if recipe.method == "dpo" and recipe.dpo.reference.path is not None:
            console.note(
                "samples in training are the policy's alone: its reference is another model; dpoctl eval shows both"
            )
        elif policy.has_live_reference:
            with policy.reference():
                self._reference = self._sampler.draw(policy.causal)
        else:
            self._reference = self._sampler.draw(policy.causal)

    def write(self, journal: Journal, step: int) -> None:
        """Draw from the policy as it is now, and write, show and log its samples."""
        if self._sampler is None:
            return
        # Before the first step the two are the same.
        texts = self._reference if step == 0 and self._reference else self._sampler.draw(self._causal)
        samples = self._sampler.pair(texts, self._reference)
        journal.log(step, self._metrics(samples))
        if not self._accelerator.is_main_process:
            return
        write(self._folder / f"step-{step:06d}.jsonl", samples, {"step": step})
        show(samples, f"samples at step {step}")
        texts_by_name = {f"samples/{number}": as_text(one) for number, one in enumerate(_first(samples), start=1)}
        journal.log_texts(step, texts_by_name)

    def _metrics(self, samples: Sequence[Sample]) -> Metrics:
        """What is worth a learning curve."""
        numbers = describe(samples)
        metrics = {f"eval_samples/{name}": float(numbers[f"{name}_policy"]) for name in ("finished", "median_length")}
        if self._judge is not None:
            target = self._judge.target
            shares = KeywordJudge(self._judge.categories).count([one.policy.text for one in samples])
            metrics[f"eval_judge/{target}"] = shares[target]["share"]
        return metrics


def sample_finished(
    finished: FinishedRun,
    recipe: Recipe,
    accelerator: Accelerator,
    stores: Mapping[str, TokenStore],
    limit: int | None = None,
) -> tuple[dict[str, Any], list[Sample]]:
    """Sample a finished run and its reference; every rank calls this.

    Args:
        finished: the run.
        recipe: its recipe, with the data that it is evaluated on.
        accelerator: ranks and precision.
        stores: the evaluation sets.
        limit: use no more prompts than this of each set.

    Returns:
        The numbers, under `samples` and `judge`, and the samples; nothing where the recipe asks for none.
    """
    section, judge = recipe.eval.samples, recipe.eval.judge
    if section is None or not section.num or not stores:
        return {}, []
    sampler = Sampler(section, recipe, finished.tokenizer, stores, accelerator, limit)
    policy = sampler.draw(finished.policy.causal)
    with finished.reference() as causal:
        reference = sampler.draw(causal)
    samples = sampler.pair(policy, reference)
    report: dict[str, Any] = {"samples": describe(samples)}
    if judge is not None:
        count = KeywordJudge(judge.categories).count
        sides = {"reference": reference, "policy": policy}
        shares = {name: count([one.text for one in side]) for name, side in sides.items()}
        report["judge"] = {"target": judge.target, **shares}
    return report, samples


def describe(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return how many samples there are, and for each side how many ended or are distinct, and their words."""
    sides: dict[str, list[Generation | None]] = {
        "reference": [one.reference for one in samples],
        "policy": [one.policy for one in samples],
    }
    numbers: dict[str, Any] = {"num": len(samples)}
    for name, side in sides.items():
        texts = [one for one in side if one is not None]
        if texts:
            numbers[f"finished_{name}"] = statistics.fmean(one.finished for one in texts)
            numbers[f"distinct_{name}"] = len({one.text for one in texts})
            numbers[f"median_length_{name}"] = statistics.median(len(one.text.split()) for one in texts)
    return numbers


def write(path: Path, samples: Sequence[Sample], head: Mapping[str, Any]) -> None:
    """Write a file of samples, one a line, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({**head, **one.row()}) + "\n" for one in samples]
    write_atomically(path, "".join(lines))


def show(samples: Sequence[Sample], title: str) -> None:
    """Show the first samples: side by side on a terminal, one after the other elsewhere."""
    first = _first(samples)
    if not console.stderr().is_terminal:
        console.say("\n".join([title, *(as_text(one) for one in first)]))
        return
    table = Table(title=title, title_justify="left", show_lines=True)
    for name in ("prompt", "reference", "policy"):
        table.add_column(name, ratio=1, overflow="fold")
    for one in first:
        table.add_row(*(Styled(text) for text in (_prompt_text(one), _text(one.reference), _text(one.policy))))
    console.say(table)


def as_text(sample: Sample) -> str:
    """Return a sample as lines of plain text."""
    sides = {"prompt": _prompt_text(sample), "reference": _text(sample.reference), "policy": _text(sample.policy)}
    return "\n".join(f"  {name}: {text}".replace("\n", "\n    ") for name, text in sides.items() if text)


def _first(samples: Sequence[Sample]) -> list[Sample]:
    """The first samples to different prompts."""
    found: dict[str, Sample] = {}
    for one in samples:
        found.setdefault(_prompt_text(one), one)
    return list(found.values())[:SHOWN]


def _text(generation: Generation | None) -> str:
    if generation is None:
        return ""
    return shown(generation.text) + ("" if generation.finished else " [cut off]")


def _prompt_text(sample: Sample) -> str:
    if isinstance(sample.prompt, str):
        return shown(sample.prompt)
    if len(sample.prompt) == 1:
        return shown(str(sample.prompt[0]["content"]))
    return shown("\n".join(f"{message['role']}: {message['content']}" for message in sample.prompt))


def _first_prompts(
    store: TokenStore, tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any], count: int
) -> Iterator[tuple[Text, list[int]]]:
    """Yield the first prompts of a store, with the ids that training has of them."""
    records = range(min(count, len(store)))
    prompts = [store.texts(index).prompt for index in records]
    for index, prompt, ids in zip(records, prompts, render_prompts(tokenizer, prompts, template_kwargs), strict=True):
        example = store.example(index)
        kept = example.shared[: len(ids)].tolist()
        if kept != ids:  # the prompt was too long, and was cut: it ends where the answer begins
            scored = example.shared_scored
            kept = example.shared[: int(scored.argmax()) if scored.any() else len(scored)].tolist()
        yield prompt, kept


def _given_prompts(
    texts: Sequence[str], store: TokenStore, tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any]
) -> list[tuple[Text, list[int]]]:
    """Return prompts of the recipe as the data have theirs: as messages, or as text."""
    as_messages = not isinstance(store.texts(0).prompt, str)
    prompts: list[Text] = [[{"role": "user", "content": text}] if as_messages else text for text in texts]
    return list(zip(prompts, render_prompts(tokenizer, prompts, template_kwargs), strict=True))


def _forget_after(folder: Path, step: int) -> None:
    """Delete samples of steps that are to come again."""
    for file in folder.glob("step-*.jsonl"):
        if (match := STEP_FILE.fullmatch(file.name)) and int(match[1]) > step:
            file.unlink()

"""Samples: texts of the policy and of its reference for the same prompts, drawn with the same random numbers.

A keyword judge counts them, with confidence intervals.
"""

import copy
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from accelerate.utils import broadcast_object_list, gather_object
from rich.table import Table
from rich.text import Text as Styled
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpoctl import console
from dpoctl.core.loop import Metrics
from dpoctl.data.preview import shown
from dpoctl.data.records import Text
from dpoctl.data.store import TokenStore
from dpoctl.data.tokenize import render_prompts
from dpoctl.files import write_atomically
from dpoctl.model.continuations import InStep, batch_size, continuation_divergences
from dpoctl.model.generate import Generation, SamplingParams, generate
from dpoctl.recipe.judge_section import UNDECIDED
from dpoctl.recipe.schema import SamplesSection
from dpoctl.runs.names import own_folder
from dpoctl.runs.statistics import share
from dpoctl.tasks.judges import Vote
from dpoctl.tasks.served import Client, Reply, Request
from dpoctl.tasks.setup import Setup

FOLDER = "samples"
SHOWN = 3
Value = TypeVar("Value")
# Limits of a batch, prompts included: the KV cache of a 7B model stays small, and tiny models get full batches.
TOKENS, MOST_ROWS = 16384, 64
STEP_FILE = re.compile(r"step-(\d+)\.jsonl")


@dataclass(frozen=True)
class Sample:
    """A prompt and its generated texts.

    Attributes:
        prompt: the prompt, as in the data.
        policy: the text of the trained model.
        reference: the text of the reference; None if it is not loaded.
        repeat: the number of the draw, where the evaluation is repeated.
        vote: the vote of a judge that compares; None if there is none.
    """

    prompt: Text
    policy: Generation
    reference: Generation | None
    repeat: int = 0
    vote: Vote | None = None

    def row(self) -> dict[str, Any]:
        """Return the sample as a row of the file."""
        sides = {"reference": self.reference, "policy": self.policy}
        known = {name: side for name, side in sides.items() if side is not None}
        texts = {name: side.text for name, side in known.items()}
        ends = {f"{name}_finished": side.finished for name, side in known.items()}
        repeat = {"repeat": self.repeat} if self.repeat else {}
        return {"prompt": self.prompt, **texts, **ends, **repeat, **({"judge": self.vote.row()} if self.vote else {})}


class Sampler:
    """Generates texts for the prompts of a recipe, distributed over the ranks.

    Args:
        section: the prompts, and how texts are drawn.
        setup: the setup of the run.
        found: the prompts with their tokens.
    """

    def __init__(self, section: SamplesSection, setup: Setup, found: Sequence[tuple[Text, list[int]]]) -> None:
        self._setup, self._tokenizer, self._accelerator = setup, setup.tokenizer, setup.accelerator
        self._prompts = [each for each in found for _ in range(section.per_prompt)]
        longest = max((len(ids) for _, ids in found), default=0) + section.max_new_tokens
        rows = max(1, min(MOST_ROWS, TOKENS // longest))
        self._sampling = replace(sampling_of(section), batch_size=rows)

    @classmethod
    def of(
        cls,
        section: SamplesSection,
        setup: Setup,
        stores: Mapping[str, TokenStore],
        limit: int | None = None,
        *,
        is_own: bool = True,
    ) -> Self:
        """Take the prompts of eval sets, or those of the recipe.

        Args:
            section: the prompts, and how texts are drawn.
            setup: the setup of the run.
            stores: the eval sets.
            limit: use only the first prompts of each set.
            is_own: whether the sets have the tokens of this model; prompts that are cut there are cut here.
        """
        tokenizer, kwargs = setup.tokenizer, setup.recipe.data.chat_template_kwargs
        if section.prompts is None:
            count = section.num if limit is None else min(section.num, limit)
            first = [_first_prompts(store, tokenizer, kwargs, count, is_own) for store in stores.values()]
            found = list(chain.from_iterable(first))
        else:
            found = _given_prompts(section.prompts, next(iter(stores.values())), tokenizer, kwargs)
        return cls(section, setup, found)

    def of_model(self, setup: Setup) -> Self:
        """Return a sampler of the same prompts for another model with the same tokens."""
        other = copy.copy(self)
        other._setup = setup
        return other

    @property
    def setup(self) -> Setup:
        """The setup of the model."""
        return self._setup

    @property
    def prompts(self) -> list[Text]:
        """The prompt of each text, in the order of the texts."""
        return [prompt for prompt, _ in self._prompts]

    def draw(self, causal: PreTrainedModel, repeat: int = 0) -> list[Generation]:
        """Return a text for each prompt; every rank calls this and gets all of them.

        Args:
            causal: the model.
            repeat: the number of the draw: each has random numbers of its own.
        """
        sampling = replace(self._sampling, seed=self._sampling.seed + repeat)
        mine, most = self._shares([ids for _, ids in self._prompts])
        prompts = [self._prompts[index][1] for index in mine]
        with (
            console.WorkProgress("drawing samples", len(prompts), "texts") as progress,
            torch.no_grad(),
            self._accelerator.autocast(),
        ):
            texts = self._generate(causal, prompts, most, sampling, progress.advance)
        return self._gathered(mine, texts)

    def ask(self, client: Client, repeat: int = 0) -> list[Generation]:
        """Return a text of a served model for each prompt; every rank calls this, and the first one asks."""
        texts: list[Any] = [None]
        if self._accelerator.is_main_process:
            replies = ask(client, self.prompts, self._sampling, repeat)
            texts = [[Generation(one.text, one.finished) for one in replies]]
        return list(broadcast_object_list(texts)[0])

    def divergences(
        self,
        policy: PreTrainedModel,
        reference: Callable[[], AbstractContextManager[PreTrainedModel]],
        texts: Sequence[Generation],
        other: Setup,
    ) -> list[float]:
        """Return the divergence of a model from a reference over each of its texts, in nats.

        Every rank calls this and gets all of them.

        Args:
            policy: the model.
            reference: a context with the reference.
            texts: of the model, one for each prompt.
            other: the setup of the reference.
        """
        rows = [(ids, text) for (_, ids), text in zip(self._prompts, self.tokens(texts), strict=True)]
        joined = [(*prompt, *text) for prompt, text in rows]
        mine, most = self._shares(joined)
        longest, in_step = max(map(len, joined)), None
        if self._setup.sharded is not None:
            in_step = InStep(self._setup.inside, other.inside, -(-most // batch_size(longest)), rows[0])
        with (
            console.WorkProgress("computing the divergence", len(mine), "texts") as progress,
            self._accelerator.autocast(),
        ):
            own = [rows[index] for index in mine]
            found = continuation_divergences(policy, reference, own, progress.advance, longest=longest, in_step=in_step)
        return self._gathered(mine, found)

    def tokens(self, texts: Sequence[Generation]) -> list[Sequence[int]]:
        """Return the tokens of each text; of one that a served model wrote, those of its text."""
        stop = self._tokenizer.eos_token_id
        end = [stop] if isinstance(stop, int) else []
        encode = self._tokenizer.encode
        return [text.ids or [*encode(text.text, add_special_tokens=False), *end] for text in texts]

    def _shares(self, rows: Sequence[Sequence[int]]) -> tuple[list[int], int]:
        """Return the numbers of this rank's rows, and the most that a rank has."""
        # A repeated prompt is another draw; one rank must see all its repetitions to count them.
        same: dict[tuple[int, ...], list[int]] = {}
        for index, ids in enumerate(rows):
            same.setdefault(tuple(ids), []).append(index)
        ranks, groups = self._accelerator.num_processes, list(same.values())
        shares = [[index for group in groups[rank::ranks] for index in group] for rank in range(ranks)]
        return shares[self._accelerator.process_index], max(map(len, shares))

    def _gathered(self, mine: Sequence[int], values: Sequence[Value]) -> list[Value]:
        """Return the values of all ranks, in the order of the prompts."""
        found: dict[int, Value] = dict(gather_object(list(zip(mine, values, strict=True))))
        return [found[index] for index in range(len(self._prompts))]

    def _generate(
        self,
        causal: PreTrainedModel,
        prompts: list[list[int]],
        most: int,
        sampling: SamplingParams,
        on_batch: Callable[[int], None],
    ) -> list[Generation]:
        """Continue the prompts of this rank; the ranks of a sharded model, with at most `most` prompts, in step."""
        if self._setup.sharded is None:
            return generate(causal, self._tokenizer, prompts, sampling, on_batch=on_batch)
        some, rounds = prompts or [self._prompts[0][1]], -(-most // sampling.batch_size)
        texts = self._setup.inside(
            lambda: generate(causal, self._tokenizer, some, sampling, on_batch=on_batch, rounds=rounds)
        )
        return texts[: len(prompts)]

    def pair(
        self, policy: Sequence[Generation], reference: Sequence[Generation] | None, repeat: int = 0
    ) -> list[Sample]:
        """Return a sample for each prompt."""
        others: Sequence[Generation | None] = reference or [None] * len(policy)
        rows = zip(self._prompts, policy, others, strict=True)
        return [Sample(prompt, text, other, repeat) for (prompt, _), text, other in rows]


class Samples:
    """The samples of a training run; every rank creates one before the first step, and draws at each evaluation.

    Args:
        setup: the setup of the run, with the policy before its first update.
        folder: the run directory.
        stores: the eval sets.
        start: the step that the run resumes from; -1 if it starts.
    """

    def __init__(self, setup: Setup, folder: Path, stores: Mapping[str, TokenStore], start: int) -> None:
        recipe, policy = setup.recipe, setup.policy
        self._folder, self._causal = folder / FOLDER, policy.causal
        self._judge, self._reference = recipe.eval.judge, None
        self._sampler, self._num_shown = None, 0
        if setup.accelerator.is_main_process:
            _delete_after(self._folder, start)
        if (section := recipe.eval.samples) is None or not section.num or not stores:
            return
        self._sampler = Sampler.of(section, setup, stores)
        if recipe.method == "dpo" and recipe.dpo.reference.path is not None:
            console.note(
                "samples in training show only the policy: the reference is another model; dpoctl eval shows both"
            )
        elif policy.has_live_reference:
            with policy.reference():
                self._reference = self._sampler.draw(policy.causal)
        else:
            self._reference = self._sampler.draw(policy.causal)

    def draw(self, step: int) -> list[Sample]:
        """Draw from the policy as it is now; every rank calls this, and gets none if the recipe asks for none."""
        if self._sampler is None:
            return []
        # Before the first step, policy and reference are the same.
        texts = self._reference if step == 0 and self._reference else self._sampler.draw(self._causal)
        return self._sampler.pair(texts, self._reference)

    def write(self, step: int, samples: Sequence[Sample]) -> dict[str, str]:
        """Write samples, show one of them, and return the first ones as texts by name, for trackers.

        Each evaluation shows another prompt. Before the first step, policy and reference say the same: none is shown.
        """
        write_atomically(own_folder(self._folder) / f"step-{step:06d}.jsonl", to_lines(samples, {"step": step}))
        if step > 0 or self._reference is None:
            first = _first(samples)
            show([first[self._num_shown % len(first)]], f"a sample at step {step}")
            self._num_shown += 1
        return {f"samples/{number}": as_text(one) for number, one in enumerate(_first(samples), start=1)}

    def metrics(self, samples: Sequence[Sample]) -> Metrics:
        """Return the statistics that get a curve."""
        numbers = describe(samples)
        metrics = {f"eval_samples/{name}": float(numbers[f"{name}_policy"]) for name in ("finished", "median_length")}
        lengths = [len(one.policy.text.split()) for one in samples]
        if len(lengths) > 1:
            # Of a median of values that are distributed normally.
            error = math.sqrt(math.pi / 2 * statistics.variance(lengths) / len(lengths))
            metrics["eval_samples/median_length_se"] = error
        if self._judge is not None and self._judge.target is not None:
            target = self._judge.target
            judge = KeywordJudge(self._judge.categories)
            hits = [judge.category(one.policy.text) == target for one in samples]
            metrics[f"eval_judge/{target}"] = statistics.fmean(hits)
        return metrics


def sampling_of(section: SamplesSection) -> SamplingParams:
    """Return how the texts of a recipe are drawn."""
    return SamplingParams(section.max_new_tokens, section.temperature, section.top_p, section.seed)


def ask(client: Client, prompts: Sequence[Text], sampling: SamplingParams, repeat: int = 0) -> list[Reply]:
    """Return an answer of a served model to each prompt.

    Args:
        client: asks the model.
        prompts: the prompts; one that is there several times gets several answers.
        sampling: how texts are drawn.
        repeat: the number of the draw of all of them.
    """
    seen: Counter[str] = Counter()
    requests = []
    for prompt in prompts:
        key = json.dumps(prompt, sort_keys=True)
        number = repeat * len(prompts) + seen[key]
        fields: dict[str, Any] = {"max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature}
        fields |= {"top_p": sampling.top_p, "seed": sampling.seed + number} if sampling.temperature else {}
        requests.append(Request(prompt, fields, repeat=number))
        seen[key] += 1
    return client.ask(requests, "drawing samples from")


def describe(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return the number of samples, and for each model the finished share, distinct texts and median words."""
    sides: dict[str, list[Generation | None]] = {
        "reference": [one.reference for one in samples],
        "policy": [one.policy for one in samples],
    }
    numbers: dict[str, Any] = {"num": len(samples)}
    for name, side in sides.items():
        texts = [one for one in side if one is not None]
        if texts:
            ends = [one.finished for one in texts if one.finished is not None]
            numbers |= {f"finished_{name}": statistics.fmean(ends)} if len(ends) == len(texts) else {}
            numbers[f"distinct_{name}"] = len({one.text for one in texts})
            numbers[f"median_length_{name}"] = statistics.median(len(one.text.split()) for one in texts)
    return numbers


def to_lines(samples: Sequence[Sample], head: Mapping[str, Any] | None = None) -> str:
    """Return a JSON line for each sample, each beginning with the same keys."""
    return "".join(json.dumps({**(head or {}), **one.row()}) + "\n" for one in samples)


def show(samples: Sequence[Sample], title: str) -> None:
    """Print the first samples: side by side on a terminal, else one after the other."""
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


class KeywordJudge:
    """Assigns texts to categories by whole words, ignoring case.

    Args:
        categories: the words of each category.
    """

    def __init__(self, categories: Mapping[str, Sequence[str]]) -> None:
        self._patterns = {
            name: re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)", re.IGNORECASE)
            for name, words in categories.items()
        }

    def category(self, text: str) -> str:
        """Return the category whose words a text contains, or `undecided` if there is not exactly one."""
        found = [name for name, pattern in self._patterns.items() if pattern.search(text)]
        return found[0] if len(found) == 1 else UNDECIDED

    def count(self, texts: Sequence[str], prompts: Sequence[Any]) -> dict[str, dict[str, Any]]:
        """Return the share of texts in each category, and of undecided ones, with 95 % intervals.

        Args:
            texts: the texts.
            prompts: the prompt of each: texts of the same one may be alike, and tell less than texts of several.
        """
        found = [self.category(text) for text in texts]
        shares = {name: share([float(one == name) for one in found], prompts) for name in (*self._patterns, UNDECIDED)}
        return {name: {"share": one.value, "ci": list(one.interval or (0.0, 1.0))} for name, one in shares.items()}


def _first(samples: Sequence[Sample]) -> list[Sample]:
    """Return the first samples of different prompts."""
    found: dict[str, Sample] = {}
    for one in samples:
        found.setdefault(_prompt_text(one), one)
    return list(found.values())[:SHOWN]


def _text(generation: Generation | None) -> str:
    if generation is None:
        return ""
    return (shown(generation.text) or "(empty)") + (" [cut off]" if generation.finished is False else "")


def _prompt_text(sample: Sample) -> str:
    if isinstance(sample.prompt, str):
        return shown(sample.prompt)
    if len(sample.prompt) == 1:
        return shown(str(sample.prompt[0]["content"]))
    return shown("\n".join(f"{message['role']}: {message['content']}" for message in sample.prompt))


def _first_prompts(
    store: TokenStore, tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any], count: int, is_own: bool
) -> Iterator[tuple[Text, list[int]]]:
    """Yield the first prompts of a store, with their token ids in training."""
    records = range(min(count, len(store)))
    prompts = [store.texts(index).prompt for index in records]
    for index, prompt, ids in zip(records, prompts, render_prompts(tokenizer, prompts, template_kwargs), strict=True):
        if not is_own:
            yield prompt, ids
            continue
        example = store.example(index)
        kept = example.shared[: len(ids)].tolist()
        if kept != ids:  # the prompt was too long and was truncated: it ends where the answer begins
            scored = example.shared_scored
            kept = example.shared[: int(scored.argmax()) if scored.any() else len(scored)].tolist()
        yield prompt, kept


def _given_prompts(
    texts: Sequence[str], store: TokenStore, tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any]
) -> list[tuple[Text, list[int]]]:
    """Return the prompts of the recipe in the form of the data: messages, or text."""
    as_messages = not isinstance(store.texts(0).prompt, str)
    prompts: list[Text] = [[{"role": "user", "content": text}] if as_messages else text for text in texts]
    return list(zip(prompts, render_prompts(tokenizer, prompts, template_kwargs), strict=True))


def _delete_after(folder: Path, step: int) -> None:
    """Delete the samples of steps that the run will do again."""
    for file in folder.glob("step-*.jsonl"):
        if (match := STEP_FILE.fullmatch(file.name)) and int(match[1]) > step:
            file.unlink()

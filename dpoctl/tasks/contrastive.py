"""`dpoctl convert-data --format contrastive`: a model writes both answers of a pair, under opposite instructions.

The pair is trained under a third instruction, the neutral one, that neither answer was written to.
"""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Self

import torch
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpoctl import console
from dpoctl.data.contrast import Examples, Prompts, Templates
from dpoctl.data.items import read_items
from dpoctl.data.records import Reject, Text
from dpoctl.data.sinks import WholeFile
from dpoctl.data.tokenize import render_prompts
from dpoctl.errors import DataError, RunError, UsageError
from dpoctl.model.generate import Generation, Sampling, generate
from dpoctl.model.load import load_run, resolve_dtype
from dpoctl.model.source import find_source
from dpoctl.model.tokenizer import read_tokenizer
from dpoctl.recipe.contrastive import ContrastiveRecipe, load_contrastive
from dpoctl.recipe.templates import template_text
from dpoctl.runs.progress import Progress
from dpoctl.tasks.machine import quiet_libraries

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json", "config.json")
LINES_OF_PROGRESS = 20
ALL = "all"
"""The only split where a recipe names none."""


def run(
    path: Path | str,
    *,
    output: Path | str,
    rejects: Path | str | None = None,
    overrides: Sequence[str] = (),
    json_output: bool = False,
) -> None:
    """Make pairs as a contrastive recipe asks for.

    Answers are kept beside the output until all pairs are there: the same command goes on after an interruption,
    and gives the same pairs.

    Args:
        path: the recipe.
        output: the file of pairs; with splits, their names are put into its name.
        rejects: a file for the items without a pair, one JSON object each.
        overrides: `key=value` texts that win over the recipe.
        json_output: print the counts as one JSON object on stdout.

    Raises:
        UsageError: the recipe is wrong.
        DataError: the items cannot be read, or give fewer pairs than a split needs.
        SetupError: the model cannot be reached.
    """
    quiet_libraries()
    recipe = load_contrastive(path, overrides)
    targets = _targets(Path(output), recipe.splits)
    items, left_out = read_items(recipe.items)
    wanted = sum(recipe.splits.values()) or len(items)
    if len(items) < wanted:
        raise DataError(f"{recipe.items.path}: {len(items):,} items, and the splits ask for {wanted:,} pairs")
    # The order of a list must not decide what is held out.
    random.Random(recipe.sampling.seed).shuffle(items)
    writer = Writer.load(recipe)
    side_file = Path(output).with_name(f"{Path(output).name}.partial")
    harvest = Harvest(left_out=left_out)
    with Answers(writer, side_file) as answers, Progress(wanted, unit="pair") as progress:
        _gather(recipe, items, wanted, answers, harvest, progress)
    sizes = _sizes(harvest, recipe.splits)
    _write(harvest, sizes, targets, None if rejects is None else Path(rejects))
    side_file.unlink(missing_ok=True)
    _report(harvest, recipe, sizes, targets)
    if json_output:
        console.emit(json.dumps(harvest.counts() | {"files": {name: str(file) for name, file in targets.items()}}))


@dataclass(frozen=True)
class Writer:
    """A model that answers prompts."""

    causal: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    template_kwargs: dict[str, Any]
    identity: str
    """Changes with anything but the prompt that decides an answer."""

    @classmethod
    def load(cls, recipe: ContrastiveRecipe) -> Self:
        """Load the model of a recipe, on an accelerator if there is one."""
        section, given = recipe.model, recipe.sampling
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = accelerator or torch.device("cpu")
        source = find_source(
            section.model_name_or_path, revision=section.revision, trust_remote_code=section.trust_remote_code
        )
        tokenizer = read_tokenizer(source)
        if section.chat_template is not None:
            tokenizer.chat_template = template_text(section.chat_template)
        if not tokenizer.chat_template:
            console.note(f"model '{source.name}' has no chat template: the prompts are plain text")
        policy = load_run(
            section.model_name_or_path,
            device,
            resolve_dtype(section.dtype, device),
            attn_implementation=section.attn_implementation,
            quantization=recipe.quantization,
            trust_remote_code=section.trust_remote_code,
            revision=section.revision,
        )
        count = sum(parameter.numel() for parameter in policy.causal.parameters())
        console.say(f"model: {type(policy.causal).__name__}, {count / 1e6:,.1f} M parameters on {device}")
        sampling = Sampling(given.max_new_tokens, given.temperature, given.top_p, given.seed, given.batch_size)
        return cls(policy.causal, tokenizer, sampling, section.chat_template_kwargs, _identity(recipe, sampling))

    def ask(self, prompt: str) -> Text:
        """Spell a prompt as the training data has it: messages, where the tokenizer has a template."""
        return [{"role": "user", "content": prompt}] if self.tokenizer.chat_template else prompt

    def reply(self, answer: str) -> Text:
        """Spell an answer as the training data has it."""
        return [{"role": "assistant", "content": answer}] if self.tokenizer.chat_template else answer

    def token_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """Tokenize prompts as training does."""
        return render_prompts(self.tokenizer, [self.ask(prompt) for prompt in prompts], self.template_kwargs)


class Answers:
    """Answers to prompts; those that were given before an interruption are read from a side file.

    Args:
        writer: answers what is new.
        side_file: one line an answer.
    """

    def __init__(self, writer: Writer, side_file: Path) -> None:
        self.writer = writer
        self._path = side_file
        self._known: dict[str, Generation] = {}

    def __enter__(self) -> Self:
        try:
            self._file = self._path.open("a+", encoding="utf-8", errors="replace", newline="\n")
        except OSError as error:
            raise UsageError(f"{self._path}: cannot be written: {error.strerror or error}") from error
        self._file.seek(0)
        for line in self._file:
            # A killed process leaves half a line, which the next one must not be joined to.
            with suppress(ValueError):
                row = json.loads(line)
                self._known[row["key"]] = Generation(row["text"], row["finished"])
        if self._file.tell():
            self._file.write("\n")
        if self._known:
            console.note(f"{self._path}: going on with the {len(self._known):,} answers of an earlier start")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __call__(self, prompts: Sequence[str]) -> list[Generation]:
        """Answer each prompt; what is new goes to the side file at once."""
        ids = self.writer.token_ids(prompts)
        keys = [_hash(self.writer.identity, prompt) for prompt in ids]
        new = [index for index, key in enumerate(keys) if key not in self._known]
        writer = self.writer
        try:
            drawn = generate(writer.causal, writer.tokenizer, [ids[index] for index in new], writer.sampling)
        except torch.OutOfMemoryError as error:
            raise RunError("the device is out of memory", hint="lower sampling.batch_size") from error
        for index, answer in zip(new, drawn, strict=True):
            self._known[keys[index]] = answer
            row = {"key": keys[index], "text": answer.text, "finished": answer.finished}
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()
        return [self._known[key] for key in keys]


@dataclass
class Harvest:
    """What became of the items."""

    left_out: Counter[str]
    """Items that were never asked about, by reason."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    rejects: list[dict[str, Any]] = field(default_factory=list)
    copies: int = 0
    """Answers that hold an example of their prompt word for word."""

    def counts(self) -> dict[str, Any]:
        """The numbers of it."""
        reasons = Counter(reject["reason"] for reject in self.rejects)
        return {
            "asked": len(self.rows) + len(self.rejects),
            "used": len(self.rows),
            "rejected": dict(sorted(reasons.items())),
            "left_out": dict(sorted(self.left_out.items())),
            "examples_copied": self.copies,
        }


def _gather(
    recipe: ContrastiveRecipe,
    items: Sequence[str],
    wanted: int,
    answers: Answers,
    harvest: Harvest,
    progress: Progress,
) -> None:
    """Ask about one item after the other until there are as many pairs as are wanted."""
    ask, size = _asker(recipe), recipe.sampling.batch_size
    said = 0
    for start in range(0, len(items), size):
        chunk = items[start : start + size]
        prompts = [ask(item) for item in chunk]
        drawn = answers([text for one in prompts for text in (one.negative, one.positive)])
        for index, (item, asked) in enumerate(zip(chunk, prompts, strict=True)):
            if len(harvest.rows) < wanted:
                _keep(recipe, item, asked, (drawn[2 * index], drawn[2 * index + 1]), answers.writer, harvest)
        done = len(harvest.rows)
        speaks = done * LINES_OF_PROGRESS // wanted > said
        said = done * LINES_OF_PROGRESS // wanted
        progress.update(done, {} if speaks else None)
        if done >= wanted:
            return


def _asker(recipe: ContrastiveRecipe) -> Callable[[str], Prompts]:
    """The prompts of an item; they depend on the item and the seed, not on other items."""
    texts, given = recipe.instructions, recipe.examples
    templates = Templates(texts.negative, texts.positive, texts.neutral, texts.example)
    examples = Examples() if given is None else Examples(given.negative, given.positive, given.per_side)
    return lambda item: templates.prompts(item, examples, random.Random(f"{recipe.sampling.seed}:{item}"))


def _keep(
    recipe: ContrastiveRecipe,
    item: str,
    asked: Prompts,
    drawn: tuple[Generation, Generation],
    writer: Writer,
    harvest: Harvest,
) -> None:
    """Make a pair of two answers, or note why they are none."""
    negative, positive = (answer.text.strip() for answer in drawn)
    if (reject := _fault(drawn)) is not None:
        row = {"item": item, "reason": reject.reason, "detail": reject.detail}
        harvest.rejects.append(row | {"negative": negative, "positive": positive})
        return
    chosen, rejected = (negative, positive) if recipe.chosen == "negative" else (positive, negative)
    harvest.rows.append(
        {
            "prompt": writer.ask(asked.neutral),
            "chosen": writer.reply(chosen),
            "rejected": writer.reply(rejected),
            "meta": {"synthetic_prompt": True, "item": item, "chosen": recipe.chosen},
        }
    )
    if recipe.examples is not None:
        for prompt, answer, known in (
            (asked.negative, negative, recipe.examples.negative),
            (asked.positive, positive, recipe.examples.positive),
        ):
            harvest.copies += any(example in prompt and example in answer for example in known)


def _fault(drawn: tuple[Generation, Generation]) -> Reject | None:
    for name, answer in zip(("negative", "positive"), drawn, strict=True):
        if not answer.text.strip():
            return Reject("empty", f"the {name} answer has no text")
        if not answer.finished:
            return Reject("cut_off", f"the {name} answer did not end by itself")
    if drawn[0].text.strip() == drawn[1].text.strip():
        return Reject("identical", "both answers are the same")
    return None


def _targets(output: Path, splits: dict[str, int]) -> dict[str, Path]:
    """The file of each split: `pairs.jsonl` becomes `pairs-train.jsonl`."""
    if not output.parent.is_dir():
        output.parent.mkdir(parents=True)
    stem, dot, suffixes = output.name.partition(".")
    return {name: output.with_name(f"{stem}-{name}{dot}{suffixes}") for name in splits} or {ALL: output}


def _sizes(harvest: Harvest, splits: dict[str, int]) -> dict[str, int]:
    """How many pairs go to each split: where there are fewer than asked for, the first one is smaller.

    Raises:
        DataError: nothing is left for the first.
    """
    pairs = len(harvest.rows)
    if not splits:
        splits = {ALL: pairs}
    first, *others = splits
    sizes = splits | {first: min(splits[first], pairs - sum(splits[name] for name in others))}
    if sizes[first] < 1:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in harvest.counts()["rejected"].items())
        raise DataError(f"{pairs:,} pairs are too few: {counts}")
    if sizes[first] < splits[first]:
        console.warn(f"split {first!r} has {sizes[first]:,} pairs, not {splits[first]:,}: there are no more items")
    return sizes


def _write(harvest: Harvest, sizes: dict[str, int], targets: dict[str, Path], rejects: Path | None) -> None:
    """Write every file, or none."""
    rows = iter(harvest.rows)
    with ExitStack() as stack:
        for name, size in sizes.items():
            _write_rows(stack.enter_context(WholeFile(targets[name])), islice(rows, size))
        if rejects is not None:
            _write_rows(stack.enter_context(WholeFile(rejects)), harvest.rejects)


def _write_rows(file: WholeFile, rows: Iterable[dict[str, Any]]) -> None:
    for row in rows:
        file.write(json.dumps(row, ensure_ascii=False))


def _report(harvest: Harvest, recipe: ContrastiveRecipe, sizes: dict[str, int], targets: dict[str, Path]) -> None:
    counts = harvest.counts()
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(justify="right")
    table.add_column()
    table.add_row(f"{counts['asked']:,}", "items asked about")
    table.add_row(f"{counts['used']:,}", f"pairs, the {recipe.chosen} answer chosen")
    for name, file in targets.items():
        table.add_row(f"{sizes[name]:,}", f"  {file}")
    for reason, count in {**counts["rejected"], **counts["left_out"]}.items():
        table.add_row(f"{count:,}", f"left out: {reason}")
    console.say(table)
    console.warn(
        "the pairs have the neutral prompt, which is not the one that either answer was written to; "
        "rows say so in meta.synthetic_prompt. DPO learns most from answers that are likely under the trained prompt: "
        "start it from a model that was fine-tuned on such prompts and answers (dpoctl sft)"
    )
    if harvest.copies:
        share = harvest.copies / (2 * counts["used"])
        console.note(f"{share:.0%} of the answers hold an example of their prompt word for word")


def _identity(recipe: ContrastiveRecipe, sampling: Sampling) -> str:
    """What besides the prompt decides an answer. The batch size does not."""
    section, packed = recipe.model, recipe.quantization
    folder = Path(section.model_name_or_path)
    files = sorted(file for pattern in WEIGHTS for file in folder.glob(pattern)) if folder.is_dir() else []
    weights = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    drawn = (sampling.max_new_tokens, sampling.temperature, sampling.top_p, sampling.seed)
    quantization = None if packed is None else packed.model_dump()
    return _hash(section.model_name_or_path, section.revision, section.dtype, quantization, weights, drawn)


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

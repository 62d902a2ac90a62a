"""`dpoctl convert-data --format contrastive`: a model writes both answers of a pair, under opposite instructions.

The prompt of the pair is a third, neutral instruction, for which neither answer was written. The items to write about
are the lines of a text file, or a column of any data source.
"""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpoctl import console
from dpoctl.data.instructions import Examples, Prompts, Templates
from dpoctl.data.output import WholeFile
from dpoctl.data.readers import read_text, suffix_of
from dpoctl.data.records import Reject, Row, Text
from dpoctl.data.sources import read_rows
from dpoctl.data.tokenize import render_prompts
from dpoctl.errors import DataError, RunError, UsageError, writing
from dpoctl.model.generate import Generation, SamplingParams, generate
from dpoctl.model.load import load_run, resolve_dtype
from dpoctl.model.source import find_source
from dpoctl.model.tokenizer import read_tokenizer
from dpoctl.recipe.data_section import Source
from dpoctl.recipe.pair_generation import ContrastiveRecipe, load_contrastive
from dpoctl.recipe.templates import template_text
from dpoctl.runs.metrics import Progress
from dpoctl.tasks.paths import check_contrastive_paths
from dpoctl.tasks.setup import quiet_libraries

if TYPE_CHECKING:
    from dpoctl.recipe.pair_generation import ItemsSection, SamplingSection, WriterSection
    from dpoctl.recipe.schema import QuantizationSection

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json", "config.json")
PROGRESS_LINES = 20
ALL = "all"
"""The name of the only split if a recipe names none."""


def run(
    path: Path | str,
    *,
    output: Path | str,
    rejects: Path | str | None = None,
    overrides: Sequence[str] = (),
    json_output: bool = False,
) -> None:
    """Generate the pairs of a contrastive recipe.

    Answers are kept in a file next to the output until all pairs are written: after an interruption the same command
    continues, and gives the same pairs.

    Args:
        path: the recipe.
        output: the file of pairs; the name of each split is added to its name.
        rejects: a file for the items without a pair, one JSON object each.
        overrides: `key=value` texts that replace values of the recipe.
        json_output: print the counts as one JSON object on stdout.

    Raises:
        UsageError: the recipe is wrong.
        DataError: the items cannot be read, or give fewer pairs than a split needs.
        SetupError: the model cannot be loaded.
    """
    quiet_libraries()
    recipe = load_contrastive(path, overrides)
    check_contrastive_paths(recipe, Path(path))
    targets = targets_of(Path(output), recipe.splits)
    items, left_out = read_items(recipe.items)
    wanted = sum(recipe.splits.values()) or len(items)
    if len(items) < wanted:
        raise DataError(f"{recipe.items.path}: it has {len(items):,} items, but the splits need {wanted:,} pairs")
    # The held-out items must not depend on the order of the list.
    random.Random(recipe.sampling.seed).shuffle(items)
    writer = Writer.load(recipe.model, recipe.quantization, recipe.sampling)
    side_file = Path(output).with_name(f"{Path(output).name}.partial")
    outcome = PairOutcome(left_out=left_out)
    with Answers(writer, side_file) as answers, Progress(wanted, unit="pair") as progress:
        _generate(recipe, items, wanted, answers, outcome, progress)
    sizes = sizes_of(outcome, recipe.splits)
    write_pairs(outcome, sizes, targets, None if rejects is None else Path(rejects))
    side_file.unlink(missing_ok=True)
    _report(outcome, recipe, sizes, targets)
    if json_output:
        console.emit(json.dumps(outcome.counts() | {"files": {name: str(file) for name, file in targets.items()}}))


@dataclass(frozen=True)
class Writer:
    """A model that answers prompts."""

    causal: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sampling: SamplingParams
    template_kwargs: dict[str, Any]
    identity: str
    """A hash of everything but the prompt that an answer depends on."""

    @classmethod
    def load(
        cls, section: "WriterSection", quantization: "QuantizationSection | None", given: "SamplingSection"
    ) -> Self:
        """Load the model of a recipe, on a GPU if there is one."""
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = accelerator or torch.device("cpu")
        source = find_source(
            section.model_name_or_path, revision=section.revision, trust_remote_code=section.trust_remote_code
        )
        tokenizer = read_tokenizer(source)
        if section.chat_template is not None:
            tokenizer.chat_template = template_text(section.chat_template)
        if not tokenizer.chat_template:
            console.note(f"model.model_name_or_path: {source.name} has no chat template; the prompts are plain text")
        policy = load_run(
            section.model_name_or_path,
            device,
            resolve_dtype(section.dtype, device),
            attn_implementation=section.attn_implementation,
            quantization=quantization,
            trust_remote_code=section.trust_remote_code,
            revision=section.revision,
        )
        count = sum(parameter.numel() for parameter in policy.causal.parameters())
        console.say(f"model: {type(policy.causal).__name__}, {count / 1e6:,.1f} M parameters on {device}")
        sampling = SamplingParams(given.max_new_tokens, given.temperature, given.top_p, given.seed, given.batch_size)
        return cls(
            policy.causal, tokenizer, sampling, section.chat_template_kwargs, _identity(section, quantization, sampling)
        )

    def as_prompt(self, prompt: Text) -> Text:
        """Return a prompt for the training data: messages if the tokenizer has a chat template, else text."""
        has_turns = isinstance(prompt, str) and self.tokenizer.chat_template
        return [{"role": "user", "content": prompt}] if has_turns else prompt

    def as_answer(self, answer: str) -> Text:
        """Return an answer for the training data."""
        return [{"role": "assistant", "content": answer}] if self.tokenizer.chat_template else answer

    def token_ids(self, prompts: Sequence[Text]) -> list[list[int]]:
        """Tokenize prompts as training does."""
        return render_prompts(self.tokenizer, [self.as_prompt(prompt) for prompt in prompts], self.template_kwargs)


class Answers:
    """Generates answers, and keeps them in a side file, which is read again after an interruption.

    Args:
        writer: the model.
        side_file: a file with one answer per line.
    """

    def __init__(self, writer: Writer, side_file: Path) -> None:
        self.writer = writer
        self._path = side_file
        self._known: dict[str, Generation] = {}

    def __enter__(self) -> Self:
        try:
            self._file = self._path.open("a+", encoding="utf-8", errors="replace", newline="\n")
        except OSError as error:
            raise UsageError(f"{self._path}: cannot write this file: {error.strerror or error}") from error
        self._file.seek(0)
        for line in self._file:
            # A killed process may leave half a line; the next answer must start on a new one.
            with suppress(ValueError):
                row = json.loads(line)
                self._known[row["key"]] = Generation(row["text"], row["finished"])
        if self._file.tell():
            self._file.write("\n")
        if self._known:
            console.note(f"{self._path}: continuing with {len(self._known):,} answers of an interrupted run")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __call__(self, prompts: Sequence[str]) -> list[Generation]:
        """Answer each prompt, and write new answers to the side file at once."""
        ids = self.writer.token_ids(prompts)
        keys = [_hash(self.writer.identity, prompt) for prompt in ids]
        new = [index for index, key in enumerate(keys) if key not in self._known]
        self._generate([ids[index] for index in new], [keys[index] for index in new])
        return [self._known[key] for key in keys]

    def as_prompt(self, prompt: Text) -> Text:
        """Return a prompt as the model is asked; see `Writer`."""
        return self.writer.as_prompt(prompt)

    def draw(self, prompts: Sequence[Text], count: int) -> list[list[Generation]]:
        """Answer each prompt several times; a prompt of which an answer is missing is answered anew."""
        ids = self.writer.token_ids(prompts)
        keys = [[_hash(self.writer.identity, prompt, number) for number in range(count)] for prompt in ids]
        new = [index for index, some in enumerate(keys) if any(key not in self._known for key in some)]
        self._generate([ids[index] for index in new for _ in range(count)], [key for at in new for key in keys[at]])
        return [[self._known[key] for key in some] for some in keys]

    def _generate(self, prompts: Sequence[list[int]], keys: Sequence[str]) -> None:
        writer = self.writer
        try:
            drawn = generate(writer.causal, writer.tokenizer, prompts, writer.sampling)
        except torch.OutOfMemoryError as error:
            raise RunError("out of memory", hint="lower sampling.batch_size") from error
        with writing(self._path.parent):
            for key, answer in zip(keys, drawn, strict=True):
                self._known[key] = answer
                row = {"key": key, "text": answer.text, "finished": answer.finished}
                self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._file.flush()


@dataclass
class PairOutcome:
    """The generated pairs and the items without a pair."""

    left_out: Counter[str]
    """Number of items that were not used, by reason."""
    rows: list[list[dict[str, Any]]] = field(default_factory=list)
    """The pairs of each item that has any."""
    rejects: list[dict[str, Any]] = field(default_factory=list)
    copies: int = 0
    """Number of answers that copy an example from their prompt."""

    def counts(self) -> dict[str, Any]:
        """Return the counts."""
        reasons = Counter(reject["reason"] for reject in self.rejects)
        return {
            "asked": len(self.rows) + len(self.rejects),
            "used": len(self.rows),
            "rejected": dict(sorted(reasons.items())),
            "left_out": dict(sorted(self.left_out.items())),
            "examples_copied": self.copies,
        }

    def cause(self) -> str | None:
        """Return why there are too few pairs, in words; None if nothing was rejected."""
        return f"first: {self.rejects[0]['detail']}" if self.rejects else None


def read_items(section: "ItemsSection", name: str = "items") -> tuple[list[str], Counter[str]]:
    """Read the items, without duplicates.

    Args:
        section: names their source.
        name: the name of the section in the recipe.

    Returns:
        The items in the order of their source, and the number of unused items by reason.

    Raises:
        UsageError: The column is missing, or has no effect.
        DataError: The source cannot be read, or has no items.
        SetupError: The hub cannot be reached.
    """
    is_text = suffix_of(Path(section.path)) == ".txt"
    if is_text and section.column is not None:
        raise UsageError(
            f"{name}.column has no effect: {section.path} is a text file, whose lines are the {name}",
            hint="remove the key",
        )
    left_out: Counter[str] = Counter()
    items: dict[str, None] = {}
    lines = (line for line in read_text(Path(section.path)) if line.strip())
    for text in lines if is_text else _column(section):
        if isinstance(text, Reject):
            left_out[text.reason] += 1
        elif not (item := text.strip()):
            left_out["empty_item"] += 1
        elif item in items:
            left_out["duplicate_item"] += 1
        else:
            items[item] = None
    if not items:
        raise DataError(f"{name}.path: {section.path} has no {name}")
    return list(items), left_out


def _generate(
    recipe: ContrastiveRecipe,
    items: Sequence[str],
    wanted: int,
    answers: Answers,
    outcome: PairOutcome,
    progress: Progress,
) -> None:
    """Generate answers item by item until there are enough pairs."""
    prompts_of, size = _prompt_builder(recipe), recipe.sampling.batch_size
    lines = 0
    for start in range(0, len(items), size):
        chunk = items[start : start + size]
        prompts = [prompts_of(item) for item in chunk]
        drawn = answers([text for one in prompts for text in (one.negative, one.positive)])
        for index, (item, asked) in enumerate(zip(chunk, prompts, strict=True)):
            if len(outcome.rows) < wanted:
                _add_pair(recipe, item, asked, (drawn[2 * index], drawn[2 * index + 1]), answers.writer, outcome)
        done = len(outcome.rows)
        due = done * PROGRESS_LINES // wanted
        progress.update(done, {} if due > lines else None)
        lines = due
        if done >= wanted:
            return


def _prompt_builder(recipe: ContrastiveRecipe) -> Callable[[str], Prompts]:
    """Return a function from an item to its prompts, which depend only on the item and the seed."""
    texts, given = recipe.instructions, recipe.examples
    templates = Templates(texts.negative, texts.positive, texts.neutral, texts.example)
    examples = Examples() if given is None else Examples(given.negative, given.positive, given.per_side)
    return lambda item: templates.prompts(item, examples, random.Random(f"{recipe.sampling.seed}:{item}"))


def _add_pair(
    recipe: ContrastiveRecipe,
    item: str,
    asked: Prompts,
    drawn: tuple[Generation, Generation],
    writer: Writer,
    outcome: PairOutcome,
) -> None:
    """Add a pair of two answers, or the reason why they are no pair."""
    negative, positive = (answer.text.strip() for answer in drawn)
    if (reject := _rejection(drawn)) is not None:
        dropped = {"item": item, "reason": reject.reason, "detail": reject.detail}
        outcome.rejects.append(dropped | {"negative": negative, "positive": positive})
        return
    chosen, rejected = (negative, positive) if recipe.chosen == "negative" else (positive, negative)
    pair = {
        "prompt": writer.as_prompt(asked.neutral),
        "chosen": writer.as_answer(chosen),
        "rejected": writer.as_answer(rejected),
        "meta": {"synthetic_prompt": True, "item": item, "chosen": recipe.chosen},
    }
    outcome.rows.append([pair])
    if recipe.examples is not None:
        for prompt, answer, known in (
            (asked.negative, negative, recipe.examples.negative),
            (asked.positive, positive, recipe.examples.positive),
        ):
            outcome.copies += any(example in prompt and example in answer for example in known)


def _rejection(drawn: tuple[Generation, Generation]) -> Reject | None:
    for name, answer in zip(("negative", "positive"), drawn, strict=True):
        if not answer.text.strip():
            return Reject("empty", f"the {name} answer has no text")
        if not answer.finished:
            return Reject("cut_off", f"the {name} answer did not end by itself")
    if drawn[0].text.strip() == drawn[1].text.strip():
        return Reject("identical", "both answers are the same")
    return None


def targets_of(output: Path, splits: dict[str, int]) -> dict[str, Path]:
    """Return the file of each split: `pairs.jsonl` becomes `pairs-train.jsonl`."""
    if not output.parent.is_dir():
        output.parent.mkdir(parents=True)
    stem, dot, suffixes = output.name.partition(".")
    return {name: output.with_name(f"{stem}-{name}{dot}{suffixes}") for name in splits} or {ALL: output}


def sizes_of(outcome: PairOutcome, splits: dict[str, int]) -> dict[str, int]:
    """Return the number of pairs in each split; if there are too few pairs, the first split is smaller.

    Raises:
        DataError: the first split would be empty.
    """
    pairs = len(outcome.rows)
    if not splits:
        splits = {ALL: pairs}
    first, *others = splits
    sizes = splits | {first: min(splits[first], pairs - sum(splits[name] for name in others))}
    if sizes[first] < 1:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in outcome.counts()["rejected"].items())
        made = f"only {pairs:,} pairs were made, too few for all splits" if pairs else "no pairs were made"
        raise DataError(f"splits: {made}; dropped: {counts or 'none'}", hint=outcome.cause())
    if sizes[first] < splits[first]:
        console.warn(f"splits.{first}: only {sizes[first]:,} of {splits[first]:,} pairs: there are no more items")
    return sizes


def write_pairs(outcome: PairOutcome, sizes: dict[str, int], targets: dict[str, Path], rejects: Path | None) -> None:
    """Write all files, or none."""
    rows = iter(outcome.rows)
    with ExitStack() as stack:
        for name, size in sizes.items():
            _write_rows(stack.enter_context(WholeFile(targets[name])), chain.from_iterable(islice(rows, size)))
        if rejects is not None:
            _write_rows(stack.enter_context(WholeFile(rejects)), outcome.rejects)


def _write_rows(file: WholeFile, rows: Iterable[dict[str, Any]]) -> None:
    for row in rows:
        file.write(json.dumps(row, ensure_ascii=False))


def _report(outcome: PairOutcome, recipe: ContrastiveRecipe, sizes: dict[str, int], targets: dict[str, Path]) -> None:
    counts = outcome.counts()
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(justify="right")
    table.add_column()
    table.add_row(f"{counts['asked']:,}", "items used as prompts")
    table.add_row(f"{counts['used']:,}", f"pairs; the {recipe.chosen} answer is chosen")
    for name, file in targets.items():
        table.add_row(f"{sizes[name]:,}", f"  {file}")
    for reason, count in {**counts["rejected"], **counts["left_out"]}.items():
        table.add_row(f"{count:,}", f"not used: {reason}")
    console.say(table)
    console.warn(
        "neither answer of a pair was written for its prompt, the neutral one (rows have meta.synthetic_prompt); "
        "DPO works best with answers that are likely for their prompt: start it from a model that was fine-tuned on "
        "such prompts and answers with dpoctl sft"
    )
    if outcome.copies:
        share = outcome.copies / (2 * counts["used"])
        console.note(f"{share:.0%} of the answers copy an example from their prompt")


def _identity(section: "WriterSection", quantized: "QuantizationSection | None", sampling: SamplingParams) -> str:
    """Return a hash of everything but the prompt that an answer depends on; the batch size is not part of it."""
    folder = Path(section.model_name_or_path)
    files = sorted(file for pattern in WEIGHTS for file in folder.glob(pattern)) if folder.is_dir() else []
    weights = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    drawn = (sampling.max_new_tokens, sampling.temperature, sampling.top_p, sampling.seed)
    quantization = None if quantized is None else quantized.model_dump()
    return _hash(section.model_name_or_path, section.revision, section.dtype, quantization, weights, drawn)


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _column(section: "ItemsSection") -> Iterator[str | Reject]:
    column = section.column
    for found in read_rows(Source(path=section.path, split=section.split), method="titles"):
        if isinstance(found.row, Reject):
            yield found.row
            continue
        if column is None:
            column = _only_column(found.row, section.path)
        value = found.row.get(column)
        yield value if isinstance(value, str) else Reject("no_item", f"no text in column {column!r}")


def _only_column(row: Row, path: str) -> str:
    texts = [name for name, value in row.items() if isinstance(value, str)]
    if len(texts) != 1:
        raise UsageError(
            f"items.path: {path} does not have exactly one text column",
            hint=f"set items.column to one of {', '.join(row)}",
        )
    return texts[0]
